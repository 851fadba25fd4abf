"""The four steps of an allocation: each may fail, and gives back only what it took."""

import asyncio
import errno
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nbdserve.formats.mapped.opening import EngineOptions
from nbdserve.storage.base import Buffer, Storage
from nbdserve.storage.faults import Fault, WrappedStorage
from tests.helpers.engine import (
    OFFSET,
    Disk,
    convert,
    l1_of,
    l2_entry_of,
    make,
    open_bytes,
    u64,
)
from tests.helpers.tools import run

CLUSTER = 4096
TABLE_MAPS = CLUSTER * CLUSTER // 8
SIZE = 4 * TABLE_MAPS
NOISE = random.Random(9).randbytes(8 * CLUSTER)

STEPS = ["L2_ALLOC", "L2_LINK", "DATA_ALLOC", "DATA_LINK"]


class StepStorage(WrappedStorage):
    """Fails the write that belongs to one step of an allocation, once.

    Attributes:
        judge: Says of a write's offset and length whether it is the one.
        written: Bytes of it that are written all the same.
        error: Its errno.
        hits: How often it failed.
    """

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.judge: Callable[[int, int], bool] | None = None
        self.written = 0
        self.error = errno.EIO
        self.hits = 0

    def _fail(self, offset: int, data: Buffer) -> None:
        if self.judge is not None and self.judge(offset, len(data)):
            self.judge = None
            self.hits += 1
            self.inner.try_write(offset, memoryview(data)[: self.written])
            raise OSError(self.error, "failed on command")

    def try_write(self, offset: int, data: Buffer) -> bool:
        self._fail(offset, data)
        return super().try_write(offset, data)

    async def write(self, offset: int, data: Buffer, *, durable: bool = False) -> None:
        self._fail(offset, data)
        await super().write(offset, data, durable=durable)


class Lab:
    """A disk whose storage fails in one step of the next allocation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.step_storage: StepStorage | None = None

    def wrap(self, storage: Storage) -> Storage:
        self.step_storage = StepStorage(storage)
        return self.step_storage

    async def open(self, content: bytes, *, backing: bytes | None = None) -> Disk:
        return await open_bytes(self.folder, content, backing=backing, wrap=self.wrap)

    @property
    def storage(self) -> StepStorage:
        assert self.step_storage is not None
        return self.step_storage

    def fail(self, step: str, content: bytes, *, written: int, error: int) -> None:
        """Let one step fail: told apart by what is written where."""
        l1 = range(l1_of(content), l1_of(content) + CLUSTER)
        judges: dict[str, Callable[[int, int], bool]] = {
            # a copied table
            "L2_ALLOC": lambda offset, length: length == CLUSTER and offset not in l1,
            "L2_LINK": lambda offset, length: offset in l1,
            "DATA_ALLOC": lambda _, length: length in (100, CLUSTER),
            "DATA_LINK": lambda offset, length: length == 8 and offset not in l1,
        }
        self.storage.judge = judges[step]
        self.storage.written = written
        self.storage.error = error


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


async def fails(attempt: Awaitable[None], error: int) -> None:
    with pytest.raises(OSError, match="failed on command") as caught:
        await attempt
    assert caught.value.errno == error


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("written", [0, 3, 8])
@pytest.mark.parametrize("step", ["L2_LINK", "DATA_ALLOC", "DATA_LINK"])
async def test_a_failed_step_of_a_first_write(
    lab: Lab, step: str, written: int, error: int
) -> None:
    """The write gets the errno, the neighbours keep their bytes, and it works next time."""
    content = make(lab.folder, SIZE, options=f"cluster_size={CLUSTER}").read_bytes()
    disk = await lab.open(content)
    # reserved clusters, a neighbouring cluster and one in another table
    await disk.write(CLUSTER, NOISE)
    await disk.write(3 * TABLE_MAPS, NOISE)
    for target in (0, TABLE_MAPS):
        if step == "L2_LINK" and target == 0:
            continue
        lab.fail(step, content, written=written, error=error)
        await fails(disk.image.write(target + 50, b"n" * 100), error)
        # nothing was acknowledged: the old bytes, and for a data write that is all
        await disk.assert_content()
        await disk.write(target + CLUSTER * 20, NOISE)
        await disk.write(target + 50, b"n" * 100)
        await disk.assert_content()
    assert lab.storage.hits >= 1
    await disk.close_and_check()


@pytest.mark.parametrize("written", [0, 8])
@pytest.mark.parametrize("step", ["L2_LINK", "DATA_ALLOC", "DATA_LINK"])
async def test_a_failure_that_is_never_retried_leaves_no_trace(
    lab: Lab, step: str, written: int
) -> None:
    """What the step took is free again, without a leak, though the write is given up."""
    content = make(lab.folder, SIZE, options=f"cluster_size={CLUSTER}").read_bytes()
    disk = await lab.open(content)
    await disk.write(TABLE_MAPS, NOISE)
    lab.fail(step, content, written=written, error=errno.EIO)
    await fails(disk.image.write(0, b"n" * 100), errno.EIO)
    after = await disk.close_and_check()
    if step == "L2_LINK":
        assert u64(after, l1_of(after)) == 0, "a word that may be there is undone"


@pytest.mark.parametrize("step", ["DATA_ALLOC", "DATA_LINK"])
@pytest.mark.parametrize("whole", [False, True])
async def test_a_failed_copying_write(lab: Lab, step: str, whole: bool) -> None:
    """Over a backing file the link is held, so that it fails in the commit, and again works."""
    backing = random.Random(4).randbytes(SIZE // 2)
    content = make(lab.folder, SIZE, options=f"cluster_size={CLUSTER}").read_bytes()
    disk = await lab.open(content, backing=backing)
    data = NOISE[:CLUSTER] if whole else b"n" * 100
    await disk.write(5 * CLUSTER, data)
    lab.fail(step, content, written=3, error=errno.ENOSPC)
    await fails(disk.image.write(0, data), errno.ENOSPC)
    if step == "DATA_ALLOC":
        await disk.assert_content()
    await disk.write(0, data)
    await disk.write(9 * CLUSTER + 7, data)
    await disk.assert_content()
    await disk.image.close()
    path = disk.saved()
    run("qemu-img", "check", path)
    # without its backing file the image itself has nothing to say elsewhere
    again = await open_bytes(lab.folder, disk.memory.content(), backing=backing)
    again.model[:] = disk.model
    await again.assert_content()


@pytest.mark.parametrize("step", STEPS)
async def test_a_failed_step_where_a_snapshot_shares_everything(
    lab: Lab, step: str
) -> None:
    """The table is copied first; the snapshot's own must survive every failure."""
    data = random.Random(2).randbytes(8 * CLUSTER)
    path = convert(lab.folder, data, options=f"cluster_size={CLUSTER}")
    run("qemu-img", "snapshot", "-c", "one", path)
    content = path.read_bytes()
    disk = await lab.open(content)
    disk.model[:] = data
    lab.fail(step, content, written=100, error=errno.EIO)
    await fails(disk.image.write(CLUSTER, b"n" * 100), errno.EIO)
    await disk.write(CLUSTER, b"n" * 100)
    await disk.write(4 * CLUSTER, NOISE[:CLUSTER])
    await disk.assert_content()
    await disk.close_and_check()
    saved = disk.saved()
    out = lab.folder / "snapshot.raw"
    run("qemu-img", "convert", "-l", "one", "-O", "raw", saved, out)
    assert out.read_bytes() == data


async def test_requests_that_meet_share_one_allocation_and_its_table(
    tmp_path: Path,
) -> None:
    """Eight writers of one cluster in an empty table: one table, one cluster."""
    content = make(tmp_path, SIZE, options=f"cluster_size={CLUSTER}").read_bytes()
    disk = await open_bytes(tmp_path, content, suspending=True)
    await asyncio.gather(
        *(disk.write(512 * number, bytes([number + 1]) * 512) for number in range(8)),
        *(disk.write(TABLE_MAPS + 512 * n, bytes([n + 9]) * 512) for n in range(8)),
    )
    await disk.assert_content()
    after = await disk.close_and_check()
    extents = run("qemu-img", "map", disk.saved(), "--output=json")
    assert extents.count('"data": true') == 2
    # header, refcount table and block, L1, and then two tables with a cluster each
    assert len(after) == 8 * CLUSTER


async def test_those_who_wait_for_a_failed_allocation_try_for_themselves(
    lab: Lab,
) -> None:
    content = make(lab.folder, SIZE, options=f"cluster_size={CLUSTER}").read_bytes()
    disk = await lab.open(content)
    disk.storage.suspending = True
    lab.fail("L2_LINK", content, written=0, error=errno.EIO)
    results = await asyncio.gather(
        *(disk.image.write(CLUSTER * n, NOISE[:CLUSTER]) for n in range(4)),
        return_exceptions=True,
    )
    assert sum(isinstance(each, OSError) for each in results) == 1
    for number, result in enumerate(results):
        if result is None:
            start = number * CLUSTER
            disk.model[start : start + CLUSTER] = NOISE[:CLUSTER]
    await disk.assert_content()
    await disk.close_and_check()


@pytest.mark.parametrize("kinds", [{"truncate"}, {"write"}, {"truncate", "write"}])
async def test_no_space_is_not_final(tmp_path: Path, kinds: set[str]) -> None:
    """A full file system refuses for a while; the same writes work afterwards."""
    content = make(tmp_path, SIZE, options=f"cluster_size={CLUSTER}").read_bytes()
    disk = await open_bytes(tmp_path, content)
    await disk.write(0, NOISE)
    disk.storage.fault = Fault(
        at=0, error=errno.ENOSPC, kinds=frozenset(kinds), lasting=True
    )
    # the pool lasts for a while if only the file can't grow
    refused = 0
    for offset in range(TABLE_MAPS, 4 * TABLE_MAPS, CLUSTER * 64):
        try:
            await disk.write(offset, NOISE[:CLUSTER] * 64)
        except OSError as error:
            refused = offset if error.errno == errno.ENOSPC else 0
            break
    assert refused
    await disk.image.read(0, SIZE)
    disk.storage.fault = Fault(at=-1)
    await disk.write(refused, NOISE[:CLUSTER] * 64)
    await disk.assert_content()
    await disk.close_and_check()


async def test_a_partial_write_over_holes_of_the_backing_file_copies_nothing(
    tmp_path: Path,
) -> None:
    content = make(tmp_path, SIZE, options=f"cluster_size={CLUSTER}").read_bytes()
    below = await open_bytes(tmp_path, content, read_only=True)
    options = EngineOptions(commit_interval_s=1e6)
    disk = await open_bytes(tmp_path, content, backing=below.image, options=options)
    await disk.write(100, b"x" * 10)
    flushes = disk.memory.flush_count
    await disk.write(CLUSTER + 100, b"x" * 10)
    assert disk.memory.flush_count == flushes, "as good as a first write"
    assert u64(disk.memory.content(), l2_entry_of(disk.memory.content(), CLUSTER))
    await disk.assert_content()
    await disk.image.close()


async def test_a_first_write_costs_the_guests_bytes_and_one_word(
    tmp_path: Path,
) -> None:
    content = make(tmp_path, SIZE).read_bytes()
    disk = await open_bytes(tmp_path, content)
    await disk.write(0, b"x" * 4096)
    calls, flushes = disk.storage.calls, disk.memory.flush_count
    before = disk.memory.content()
    await disk.write(65536 + 8192, b"y" * 4096)
    assert disk.storage.calls - calls == 2
    assert disk.memory.flush_count == flushes
    after = disk.memory.content()
    entry = l2_entry_of(after, 65536)
    host_offset = (u64(after, entry) & OFFSET) + 8192
    assert after[host_offset : host_offset + 4096] == b"y" * 4096
    changed = [at for at in range(len(after)) if before[at] != after[at]]
    assert set(changed) <= {
        *range(entry, entry + 8),
        *range(host_offset, host_offset + 4096),
    }
    await disk.close_and_check()
