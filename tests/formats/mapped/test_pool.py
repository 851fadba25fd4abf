"""The reserved pool: what may be named when, and when a freed cluster comes back."""

import asyncio
import errno
import random
from pathlib import Path

import pytest

from nbdserve.errors import ImageCorruptError
from nbdserve.formats.mapped import pool as pool_module
from nbdserve.formats.mapped.commit import Committer, Freed
from nbdserve.formats.mapped.opening import EngineOptions
from nbdserve.formats.mapped.pool import Durability, Pool, Written
from nbdserve.formats.mapped.waits import Pins
from nbdserve.storage.base import Storage
from nbdserve.storage.faults import NO_FAULT, Fault, FaultyStorage, RecordingStorage
from nbdserve.storage.memory import MemoryStorage
from tests.helpers.engine import OFFSET, convert, l2_entry_of, make, open_bytes, u64

BITS = 12
CLUSTER = 1 << BITS


class CountingPool(Pool):
    """A pool whose references are in memory, and which notes what it was asked."""

    def __init__(self, storage: Storage, durability: Durability) -> None:
        super().__init__(storage, BITS, durability, 4, {0, 1}, {2})
        self.counts: dict[int, int] = {}
        self.holes: list[tuple[int, int]] = []

    async def _reserve(self, runs: list[tuple[int, int]]) -> list[Written]:
        for start, count in runs:
            for cluster in range(start, start + count):
                assert not self.counts.get(cluster), f"{cluster} is in use"
                self.counts[cluster] = 1
        return []

    async def _unreserve(self, runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        free = []
        for start, count in runs:
            for cluster in range(start, start + count):
                self.counts[cluster] -= 1
                if not self.counts[cluster]:
                    free.append((cluster, 1))
        return free

    async def references(self, host_offset: int) -> int:
        return self.counts.get(host_offset >> BITS, 0)

    async def _old_holes(
        self, most: int, known: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        holes, self.holes = self.holes, []
        return holes


class LendingStorage(FaultyStorage):
    """Has pieces of two clusters, and is told what of them a peer has not read yet.

    Attributes:
        unread: Numbers of clusters.
        recall_fails: Whether nothing can be recalled.
    """

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.unread: set[int] = set()
        self.recall_fails = False

    def lent(self, offset: int, length: int) -> list[tuple[int, int]]:
        first, end = offset >> BITS, offset + length >> BITS
        return [
            (number << BITS, 2 * CLUSTER)
            for number in range(first & -2, end, 2)
            if self.unread & {number, number + 1}
        ]

    async def recall(self, offset: int, length: int) -> None:
        if self.recall_fails:
            raise OSError(errno.EAGAIN, "no thread can be started")

    def any_cached(self, offset: int, length: int) -> bool:
        return bool(self.lent(offset, length))


class Bench:
    """A pool over a storage that starts with four clusters of old bytes."""

    def __init__(self) -> None:
        self.memory = MemoryStorage(b"o" * 4 * CLUSTER)
        self.recorder = RecordingStorage(self.memory)
        self.storage = LendingStorage(self.recorder)
        self.gate = asyncio.Event()
        self.gate.set()
        self.barriers = self.ranges = 0
        self.pool = CountingPool(self.storage, self)

    async def barrier(self) -> None:
        await self.gate.wait()
        await self.storage.flush()
        self.barriers += 1

    async def barrier_of(self, offset: int, length: int) -> None:
        await self.gate.wait()
        await self.storage.flush_range(offset, length)
        self.ranges += 1

    def is_zero(self, cluster: int) -> bool:
        found = bytearray(CLUSTER)
        self.memory.try_read(cluster * CLUSTER, memoryview(found))
        return found == bytes(CLUSTER)


async def turn() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_cluster_is_granted_for_good_only_after_its_barrier() -> None:
    bench = Bench()
    pool = bench.pool
    assert pool.take(1) is None
    bench.gate.clear()
    refill = asyncio.create_task(pool.refill())
    await turn()
    assert pool.take(1) is None
    assert pool.take_whole(1) is None
    soft = pool.take(3, soft=True)
    assert soft is not None
    assert (soft.clusters, soft.durable) == (3, False)
    bench.gate.set()
    await refill
    durable = pool.take(2)
    assert durable is not None
    assert durable.durable
    assert durable.host_offset == soft.host_offset + 3 * CLUSTER
    await pool.close()


async def test_grants_never_overlap_and_read_as_zeros() -> None:
    bench = Bench()
    generator = random.Random(1)
    taken: set[int] = {0, 1, 2, 3}
    for _ in range(60):
        count = generator.randrange(1, 400)
        whole = generator.random() < 0.2
        grant = bench.pool.take_whole(9) if whole else bench.pool.take(count)
        if grant is None:
            await bench.pool.refill(9 if whole else 1)
            continue
        first = grant.host_offset >> BITS
        clusters = set(range(first, first + grant.clusters))
        assert not clusters & taken
        assert all(bench.is_zero(cluster) for cluster in list(clusters)[:3])
        taken |= clusters
    await bench.pool.close()


async def test_waiters_share_a_refill_and_its_failure() -> None:
    bench = Bench()
    bench.storage.fault = Fault(at=0, kinds=frozenset({"truncate"}), error=errno.ENOSPC)
    results = await asyncio.gather(
        *(bench.pool.refill() for _ in range(4)), return_exceptions=True
    )
    assert [type(each) for each in results] == [OSError] * 4
    assert bench.storage.failed == ["truncate"]
    # and it is not final
    await asyncio.gather(*(bench.pool.refill() for _ in range(4)))
    assert bench.ranges == 1
    assert not bench.barriers
    await bench.pool.close()


async def test_a_file_that_may_not_grow_so_far_grows_as_needed() -> None:
    bench = Bench()
    bench.storage.fault = Fault(at=0, kinds=frozenset({"truncate"}), error=errno.EFBIG)
    before = bench.memory.size
    await bench.pool.refill(3)
    assert bench.pool.take_whole(3) is not None
    assert bench.pool.take(1) is None
    assert bench.memory.size - before <= 4 * CLUSTER
    await bench.pool.close()


async def test_clusters_of_a_failed_reservation_are_not_lost() -> None:
    bench = Bench()
    reserve = bench.pool._reserve

    async def fail(runs: list[tuple[int, int]]) -> list[Written]:
        raise OSError(errno.EIO, "failed on command")

    bench.pool._reserve = fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="on command"):
        await bench.pool.refill()
    size = bench.memory.size
    bench.pool._reserve = reserve  # type: ignore[method-assign]
    await bench.pool.refill()
    assert bench.memory.size == size
    await bench.pool.close()


async def test_freed_clusters_are_punched_before_they_are_granted_again() -> None:
    bench = Bench()
    bench.pool.counts = {3: 2}
    await bench.pool.release([(3 * CLUSTER, CLUSTER)])
    assert not bench.is_zero(3), "somebody else has a reference"
    await bench.pool.release([(3 * CLUSTER, CLUSTER)])
    assert bench.is_zero(3)
    await bench.pool.refill()
    first = bench.pool.take(1)
    assert first is not None
    assert first.host_offset == 3 * CLUSTER
    assert bench.pool.counts[3] == 1
    await bench.pool.close()


async def test_neighbours_that_share_a_cluster_take_a_reference_each() -> None:
    """Compressed clusters: byte extents, two of them in one cluster."""
    bench = Bench()
    bench.pool.counts = {2: 1, 3: 3}
    bench.pool.tables.clear()
    await bench.pool.release(
        [
            (3 * CLUSTER + 100, 512),
            (3 * CLUSTER + 700, 512),
            (2 * CLUSTER + 4000, 512),
        ]
    )
    assert bench.pool.counts == {2: 0, 3: 0}


async def test_a_hole_that_could_not_be_zeroed_is_never_granted() -> None:
    """Its old bytes would show as somebody's zeros."""
    bench = Bench()
    bench.pool.holes = [(3, 1)]
    bench.storage.fault = Fault(at=0, kinds=frozenset({"zero"}))
    with pytest.raises(OSError, match="Input/output"):
        await bench.pool.refill()
    await bench.pool.refill()
    while (grant := bench.pool.take(1)) is not None:
        assert bench.is_zero(grant.host_offset >> BITS)
    await turn()
    await bench.pool.close()


@pytest.mark.parametrize("cluster", [0, 1, 2])
async def test_metadata_are_no_hole_whatever_a_refcount_says(cluster: int) -> None:
    bench = Bench()
    bench.pool.holes = [(cluster, 1)]
    with pytest.raises(ImageCorruptError, match="metadata"):
        await bench.pool.refill()
    assert not bench.is_zero(cluster)
    with pytest.raises(ImageCorruptError, match="metadata"):
        bench.pool.require_data(cluster * CLUSTER + 5, 1)
    bench.pool.require_data(3 * CLUSTER, 10 * CLUSTER)


async def test_closing_gives_everything_back_and_cuts_the_file() -> None:
    bench = Bench()
    await bench.pool.refill()
    grant = bench.pool.take(5)
    assert grant is not None
    await bench.pool.close()
    end = grant.host_offset + 5 * CLUSTER
    assert bench.memory.size == end
    assert sorted(c for c, count in bench.pool.counts.items() if count) == list(
        range(grant.host_offset >> BITS, end >> BITS)
    )


async def test_closing_never_cuts_what_was_there_before() -> None:
    bench = Bench()
    await bench.pool.close()
    assert bench.memory.content() == b"o" * 4 * CLUSTER


async def test_a_storage_of_fixed_size_is_zeroed_and_then_full() -> None:
    memory = MemoryStorage(b"o" * 12 * CLUSTER)
    memory.fixed_size = True
    storage = FaultyStorage(memory)
    commit = Committer(storage, Pins(), interval_s=1.0, writethrough=False)
    pool = CountingPool(storage, commit)
    await pool.refill()
    grant = pool.take(100)
    assert grant is not None
    assert (grant.host_offset, grant.clusters) == (4 * CLUSTER, 8)
    assert memory.content()[4 * CLUSTER :] == bytes(8 * CLUSTER)
    with pytest.raises(OSError, match="no free cluster") as caught:
        await pool.refill()
    assert caught.value.errno == errno.ENOSPC
    await pool.close()
    assert memory.size == 12 * CLUSTER


async def test_what_is_lent_is_neither_punched_nor_used_again() -> None:
    bench = Bench()
    await bench.pool.refill()
    grant = bench.pool.take(8)
    assert grant is not None
    first = grant.host_offset >> BITS
    await bench.storage.write(grant.host_offset, b"x" * 8 * CLUSTER)
    unread = bench.storage.unread
    unread |= {first + 2, first + 3, first + 5, first + 40}
    lent = unread & set(range(first, first + 8))
    barriers = bench.barriers + bench.ranges
    await bench.pool.release([(grant.host_offset, 8 * CLUSTER)])
    assert bench.barriers + bench.ranges > barriers, "only what is clean is forgotten"
    held = {n for n in range(first, first + 8) if not bench.is_zero(n)}
    # a piece of it is all held or all free
    assert lent <= held <= {first + 2, first + 3, first + 4, first + 5}
    assert not held & await _all_free(bench, 3)
    unread.discard(first + 2)
    unread.discard(first + 3)
    await bench.pool.release([])
    assert {n for n in held if not bench.is_zero(n)} == {first + 4, first + 5} & held
    unread.clear()
    assert held < await _all_free(bench, 5)
    assert all(bench.is_zero(n) for n in held)
    await bench.pool.close()
    assert not any(bench.pool.counts.values()), "all references were given back"


async def test_what_cannot_be_recalled_is_given_back_once_and_kept() -> None:
    """An error would have the next commit take its references once more."""
    bench = Bench()
    await bench.pool.refill()
    grant = bench.pool.take(4)
    assert grant is not None
    first = grant.host_offset >> BITS
    bench.storage.unread |= {first}
    bench.storage.recall_fails = True
    await bench.pool.release([(grant.host_offset, 4 * CLUSTER)])
    assert not any(bench.pool.counts[first + number] for number in range(4))
    assert first not in await _all_free(bench, 3)
    await bench.pool.close()


async def _all_free(bench: Bench, refills: int) -> set[int]:
    """Take all that the pool has, and what comes next; give it back."""
    taken: list[tuple[int, int]] = []
    for _ in range(refills):
        await bench.pool.refill()
        while (grant := bench.pool.take(1000)) is not None:
            taken.append((grant.host_offset, grant.clusters << BITS))
    await bench.pool.release(taken)
    return {
        cluster
        for offset, length in taken
        for cluster in range(offset >> BITS, offset + length >> BITS)
    }


# -- in an image


async def test_a_discarded_cluster_is_used_again_but_not_before_its_commit(
    tmp_path: Path,
) -> None:
    """Discard A, write B at once: B must not land where A still is on disk."""
    data = random.Random(1).randbytes(64 * CLUSTER)
    path = convert(tmp_path, data, options=f"cluster_size={CLUSTER}")
    content = path.read_bytes()
    old = u64(content, l2_entry_of(content, 0)) & OFFSET
    disk = await open_bytes(
        tmp_path, content, options=EngineOptions(commit_interval_s=1e6)
    )
    disk.model[: len(data)] = data
    await disk.image.trim(0, 32 * CLUSTER)
    disk.model[: 32 * CLUSTER] = bytes(32 * CLUSTER)
    await disk.write(0, b"B" * 16 * CLUSTER)
    assert disk.memory.content()[old : old + CLUSTER] == data[:CLUSTER]
    await disk.image.flush()
    await turn()
    assert disk.memory.content()[old : old + CLUSTER] == bytes(CLUSTER)
    await disk.assert_content()
    await disk.close_and_check()


async def test_a_cluster_is_not_punched_under_a_read_that_is_under_way(
    tmp_path: Path,
) -> None:
    data = random.Random(1).randbytes(4 * CLUSTER)
    content = convert(tmp_path, data, options=f"cluster_size={CLUSTER}").read_bytes()
    gate = asyncio.Event()

    class SlowReads(RecordingStorage):
        def try_read(self, offset: int, view: memoryview) -> bool:
            return False

        async def read(self, offset: int, view: memoryview) -> None:
            if len(view) == CLUSTER - 1:
                await gate.wait()
            await super().read(offset, view)

    disk = await open_bytes(tmp_path, content, wrap=SlowReads)
    reading = asyncio.create_task(disk.image.read(0, CLUSTER - 1))
    await turn()
    await disk.image.trim(0, CLUSTER)
    await disk.image.flush()
    await disk.image.write(2 * CLUSTER, b"x" * CLUSTER)
    await turn()
    gate.set()
    assert await reading == data[: CLUSTER - 1]
    await disk.image.close()


async def test_space_that_was_free_before_is_used_before_the_file_grows(
    tmp_path: Path,
) -> None:
    data = random.Random(1).randbytes(600 * CLUSTER)
    content = convert(tmp_path, data, options=f"cluster_size={CLUSTER}").read_bytes()
    disk = await open_bytes(tmp_path, content)
    disk.model[:] = data
    await disk.image.trim(0, 500 * CLUSTER)
    disk.model[: 500 * CLUSTER] = bytes(500 * CLUSTER)
    holey = await disk.close_and_check()
    again = await open_bytes(tmp_path, holey)
    again.model[:] = disk.model
    await again.write(0, data[: 400 * CLUSTER])
    await again.assert_content()
    after = await again.close_and_check()
    assert len(after) == len(holey)


async def test_a_clean_close_leaves_an_image_as_small_as_its_data(
    tmp_path: Path,
) -> None:
    disk = await open_bytes(tmp_path, make(tmp_path, 1 << 30).read_bytes())
    await disk.write(0, b"x")
    assert disk.memory.size > 4 << 20
    await disk.image.close()
    assert disk.memory.size == 6 * 65536


# -- giving back, with a disk that fails


@pytest.mark.parametrize("kind", ["zero", "write", "read"])
@pytest.mark.parametrize("fmt", ["qcow", "qcow2"])
async def test_nothing_is_leaked_by_a_disk_that_fails_for_a_while(
    tmp_path: Path, fmt: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step C fails; what was freed is given back once the disk works again."""
    monkeypatch.setattr(pool_module, "FIRST_RESERVATION", 1 << 16)
    content = random.Random(5).randbytes(1 << 20)
    path = convert(tmp_path, content, fmt=fmt)
    disk = await open_bytes(tmp_path, path.read_bytes(), fmt=fmt)
    disk.model[:] = content
    await disk.write(0, b"the tables are in memory now")
    await disk.image.trim(0, 1 << 19)
    disk.model[: 1 << 19] = bytes(1 << 19)
    release = disk.image._space.pool.release  # type: ignore[union-attr]

    async def failing(freed: list[Freed]) -> None:
        disk.storage.fault = Fault(at=disk.storage.calls, kinds=frozenset({kind}))
        try:
            await release(freed)
        finally:
            disk.storage.fault = NO_FAULT

    disk.image._space.commit.on_release(failing)  # type: ignore[union-attr]
    await disk.image._space.commit.settle()  # type: ignore[union-attr]
    await disk.assert_content()
    disk.image._space.commit.on_release(release)  # type: ignore[union-attr]
    for offset in range(0, 1 << 20, 1 << 16):
        await disk.write(offset + 100, b"again" * 1000)
    await disk.image.flush()
    await disk.assert_content()
    await disk.close_and_check()
