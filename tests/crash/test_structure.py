"""Power cuts in snapshots, resizing and expansion of zero clusters.

Each state that a cut may leave opens, as the image was before or as it is wanted, with
every byte; a check finds leaks at most. While a snapshot is made or deleted COPIED may be
missing as well, which a repair sets right.
"""

import os
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from nbdserve.errors import ImageError
from nbdserve.formats.qcow2.amend import Amendment, amend_image
from nbdserve.formats.qcow2.check import check_image
from nbdserve.formats.qcow2.image import Qcow2Image
from nbdserve.formats.qcow2.open import Qcow2Driver
from nbdserve.formats.qcow2.repair import repair_image
from nbdserve.formats.raw import RawImage
from nbdserve.storage.memory import MemoryStorage
from tests.crash.cuts import Cache
from tests.crash.disk import SECTOR, Applied, Disk, Ended, Event, Files, Sized, Synced
from tests.helpers.tools import run

KIB = 1 << 10
SIZE = 40 * KIB + 512
#: About how many choices of what survives are tried at each event.
PER_EVENT = 60

Work = Callable[[Qcow2Image], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Seen:
    """What an image shows: its bytes, those of each snapshot by name, its backing name.

    And what each of its bitmaps has recorded, None if it can't be used.
    """

    disk: bytes
    snapshots: tuple[tuple[bytes, bytes], ...]
    backing_name: bytes | None
    bitmaps: tuple[tuple[str, tuple[tuple[int, int], ...] | None], ...] = ()


async def opened(
    content: bytes | bytearray, base: bytes | None, *, read_only: bool, record: bool
) -> tuple[Qcow2Image, Disk]:
    """Open the bytes of an image."""
    disk = Disk(content, record=record)
    below = None
    if base is not None:
        below = RawImage(MemoryStorage(base, name="base"), read_only=True)
    driver = Qcow2Driver()
    if disk.external is not None:
        driver = driver.with_data(disk.external)
    image = await driver.open(
        disk, read_only=read_only, backing=below, writethrough=False
    )
    assert isinstance(image, Qcow2Image)
    if not read_only:
        assert image._space is not None
        # 64 clusters at a time; clusters smaller than 64 KiB count as that large
        image._space.pool._bytes = 64 << max(image.header.cluster_bits, 16)
    return image, disk


async def look(content: bytes | bytearray, base: bytes | None) -> Seen:
    """Read all that there is."""
    image, _ = await opened(content, base, read_only=True, record=False)
    shown = await image.read(0, image.size)
    snapshots = []
    for each in await image.snapshots():
        view = await image.at_snapshot(each.name.decode())
        snapshots.append((each.name, await view.read(0, view.size)))
    bitmaps = []
    for bitmap in await image.bitmaps():
        dirty = None
        if bitmap.problem is None:
            dirty = tuple((await image.dirty_bitmap(bitmap.name)).dirty())
        bitmaps.append((bitmap.name, dirty))
    return Seen(shown, tuple(snapshots), image.header.backing_name, tuple(bitmaps))


@contextmanager
def recorded(fd: int, *, barriers: bool) -> Iterator[list[Event]]:
    """Note what is written to a descriptor, and each fsync if they are to count."""
    events: list[Event] = []
    pwrite, fsync = os.pwrite, os.fsync

    def write(where: int, data: bytes, offset: int) -> int:
        if where != fd:
            return pwrite(where, data, offset)
        old = os.fstat(fd).st_size
        count = pwrite(fd, data, offset)
        call = len(events)
        end = offset + count
        if end > old:
            events.append(Sized(call, end))
        first, last = offset // SECTOR, (end - 1) // SECTOR
        events.append(
            Applied(
                call,
                {
                    sector: os.pread(fd, SECTOR, sector * SECTOR).ljust(SECTOR, b"\0")
                    for sector in range(first, last + 1)
                },
            )
        )
        events.append(Ended(call))
        return count

    def sync(where: int) -> None:
        fsync(where)
        if where == fd and barriers:
            events.append(Synced(len(events)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", write)
        patch.setattr(os, "fsync", sync)
        yield events


@dataclass(slots=True)
class Cutter:
    """Cuts the power in one piece of work, everywhere."""

    start: bytes | Files
    base: bytes | None
    copied_may_lack: bool
    broken: bool = False
    bitmaps: bool = False
    states: int = 0

    async def run(self, work: Work, seed: int) -> Files:
        """Do the work and examine every cut; return the file as it was left."""
        image, disk = await opened(self.start, self.base, read_only=False, record=True)
        # a pool that is there already, so that the cuts are those of the work
        await image.write(0, await image.read(0, 512))
        await image.flush()
        await work(image)
        await image.close()
        await self._cut(disk.log or [], disk.files(), seed)
        return disk.files()

    async def run_on_file(
        self, path: Path, work: Callable[[int], None], *, barriers: bool = True
    ) -> bytes:
        """Do work that takes a descriptor, and examine every cut."""
        path.write_bytes(self.start)
        fd = os.open(path, os.O_RDWR)
        try:
            with recorded(fd, barriers=barriers) as events:
                work(fd)
        finally:
            os.close(fd)
        content = path.read_bytes()
        await self._cut(events, content, seed=4)
        return content

    async def _cut(
        self, events: list[Event], after: bytes | bytearray, seed: int
    ) -> None:
        allowed = {await look(self.start, self.base), await look(after, self.base)}
        chance = random.Random(seed)
        cache = Cache(Files.of(self.start))
        judged: set[int] = set()
        for now, event in enumerate(events):
            fresh = cache.take(event, now)
            if not fresh:
                continue
            for choice in cache.choices(fresh, PER_EVENT, chance):
                key = cache.key(choice)
                if key in judged:
                    continue
                judged.add(key)
                content = cache.build(choice)
                story = f"after event {now}, survived: {cache.story(choice)}"
                recover = not chance.randrange(9)
                await self._judge(content, allowed, story, recover=recover)
        self.states += len(judged)

    async def _judge(
        self, content: Files, allowed: set[Seen], story: str, *, recover: bool
    ) -> None:
        seen = await look(content, self.base)
        assert seen in allowed or self._but_bitmaps(seen, allowed), story
        fd = os.memfd_create("state")
        try:
            os.pwrite(fd, content, 0)
            os.ftruncate(fd, len(content))
            result = check_image(fd, "state")
            wrong = [each for each in result.messages if each.startswith("ERROR")]
            if self.copied_may_lack:
                wrong = [each for each in wrong if "OFLAG_COPIED" not in each]
            assert self.broken or not wrong, story
            assert not result.check_errors, story
            if recover and not wrong:
                await self._recover(content, seen, story)
            if recover:
                repair = repair_image(
                    fd, "state", everything=True, agree=lambda _: False
                )
                assert not repair.after.corruptions, story
                assert not repair.after.leaks, story
                repaired = Files(os.pread(fd, os.fstat(fd).st_size, 0))
                repaired.external = content.external
                assert await look(repaired, self.base) == seen, story
        finally:
            os.close(fd)

    def _but_bitmaps(self, seen: Seen, allowed: set[Seen]) -> bool:
        """Return whether all is as before or as wanted, but for bitmaps in use."""
        if not self.bitmaps or replace(seen, bitmaps=()) not in {
            replace(each, bitmaps=()) for each in allowed
        }:
            return False
        names = [name for name, _ in seen.bitmaps]
        if names not in [[name for name, _ in each.bitmaps] for each in allowed]:
            return False
        known = {bitmap for each in allowed for bitmap in each.bitmaps}
        return all(
            dirty is None or (name, dirty) in known for name, dirty in seen.bitmaps
        )

    async def _recover(self, content: bytearray, seen: Seen, story: str) -> None:
        """Write and close: the bytes are right, and the snapshots as they were."""
        image, disk = await opened(content, self.base, read_only=False, record=False)
        data = b"recovered" * 100
        offset = min(5000, image.size - len(data))
        await image.write(offset, data)
        await image.close()
        after = await look(disk.files(), self.base)
        if self.bitmaps:
            # what could be used can still be, and knows of more
            assert [name for name, _ in after.bitmaps] == [
                name for name, _ in seen.bitmaps
            ], story
            after = replace(after, bitmaps=seen.bitmaps)
        expected = seen.disk[:offset] + data + seen.disk[offset + len(data) :]
        assert after == replace(seen, disk=expected), story


def made(tmp_path: Path, options: str, *, backing: bytes | None = None) -> bytes:
    """Make an image with content, and a snapshot that shares half of it."""
    path = tmp_path / "image"
    if backing is None:
        raw = tmp_path / "raw"
        raw.write_bytes(random.Random(1).randbytes(SIZE))
        run("qemu-img", "convert", "-O", "qcow2", "-o", options, raw, path)
    else:
        (tmp_path / "base").write_bytes(backing)
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options]
        run(*argv, "-b", "base", "-F", "raw", path, str(SIZE))
        run("qemu-io", "-c", "write -z 0 12k", "-c", "write -P 3 16k 8k", path)
    run("qemu-img", "snapshot", "-c", "old", path)
    run("qemu-io", "-c", "write -P 1 8k 9k", "-c", "write -z 12k 20k", path)
    return path.read_bytes()


async def create(image: Qcow2Image) -> None:
    await image.create_snapshot("new")


async def delete(image: Qcow2Image) -> None:
    await image.delete_snapshot("old")


async def apply(image: Qcow2Image) -> None:
    await image.apply_snapshot("old")


async def grow(image: Qcow2Image) -> None:
    await image.resize(3 * SIZE // 2)


async def grow_far(image: Qcow2Image) -> None:
    await image.resize(300 * KIB)


async def shrink(image: Qcow2Image) -> None:
    await image.resize(SIZE // 3, shrink=True)


async def preallocate(image: Qcow2Image) -> None:
    await image.preallocate(0, image.size, "metadata", lambda _: None)


async def expand(image: Qcow2Image) -> None:
    await image.prepare_version(2)


WORK = {
    "create": create,
    "delete": delete,
    "apply": apply,
    "grow": grow,
    "grow far": grow_far,
    "shrink": shrink,
    "expand": expand,
    "preallocate": preallocate,
}


SUBCLUSTERS = "cluster_size=16k,extended_l2=on"


async def grow_tables(image: Qcow2Image) -> None:
    await image.resize(17 << 20)


@pytest.mark.parametrize("name", ["create", "delete", "apply", "grow", "shrink"])
@pytest.mark.parametrize("backed", [False, True])
async def test_power_cuts_with_subclusters(
    tmp_path: Path, name: str, backed: bool
) -> None:
    base = random.Random(2).randbytes(SIZE + 8 * KIB) if backed else None
    start = made(tmp_path, SUBCLUSTERS, backing=base)
    cutter = Cutter(start, base, name in {"create", "delete"})
    await cutter.run(grow_tables if name == "grow" else WORK[name], seed=5)
    assert cutter.states > 3


@pytest.mark.parametrize("options", ["cluster_size=4k", "cluster_size=512"])
@pytest.mark.parametrize("name", list(WORK))
async def test_power_cuts(tmp_path: Path, name: str, options: str) -> None:
    cutter = Cutter(made(tmp_path, options), None, name in {"create", "delete"})
    await cutter.run(WORK[name], seed=1)
    assert cutter.states > 3


@pytest.mark.parametrize("name", ["grow", "shrink", "expand", "apply"])
async def test_power_cuts_over_a_backing_file(tmp_path: Path, name: str) -> None:
    base = random.Random(2).randbytes(SIZE + 8 * KIB)
    start = made(tmp_path, "cluster_size=4k", backing=base)
    cutter = Cutter(start, base, copied_may_lack=False)
    await cutter.run(WORK[name], seed=2)
    assert cutter.states > 3


async def add_bitmap(image: Qcow2Image) -> None:
    await image.add_bitmap("new", granularity=512)


async def remove_bitmap(image: Qcow2Image) -> None:
    await image.remove_bitmap("live")


async def remove_another(image: Qcow2Image) -> None:
    await image.remove_bitmap("still")


async def clear_bitmap(image: Qcow2Image) -> None:
    await image.clear_bitmap("still")


async def merge_bitmap(image: Qcow2Image) -> None:
    await image.merge_bitmap("still", await image.dirty_bitmap("live"))


async def disable_bitmap(image: Qcow2Image) -> None:
    await image.enable_bitmap("live", enabled=False)


async def nothing(image: Qcow2Image) -> None:
    """What opening, writing and closing do is enough."""


BITMAP_WORK = {
    "add": add_bitmap,
    "remove": remove_bitmap,
    "clear": clear_bitmap,
    "merge": merge_bitmap,
    "disable": disable_bitmap,
    "nothing": nothing,
    "grow": grow_far,
    "shrink": shrink,
}


def with_bitmaps(path: Path) -> bytes:
    """Give an image a bitmap that records and one that does not, of other granularity."""
    run("qemu-img", "bitmap", "--add", "-g", "512", path, "still")
    run("qemu-io", "-c", "write -P 9 3k 1k", "-c", "write -P 8 30k 512", path)
    run("qemu-img", "bitmap", "--disable", path, "still")
    run("qemu-img", "bitmap", "--add", "-g", "2k", path, "live")
    run("qemu-io", "-c", "write -P 7 20k 5k", path)
    return path.read_bytes()


@pytest.mark.parametrize("name", list(BITMAP_WORK))
async def test_power_cuts_with_bitmaps(tmp_path: Path, name: str) -> None:
    options = "cluster_size=512" if name in {"grow", "nothing"} else "cluster_size=16k"
    made(tmp_path, options)
    start = with_bitmaps(tmp_path / "image")
    cutter = Cutter(start, None, copied_may_lack=False, bitmaps=True)
    content = await cutter.run(BITMAP_WORK[name], seed=5)
    assert cutter.states > 3
    seen = await look(content, None)
    # the first granule was written before the work began
    for bitmap, dirty in seen.bitmaps:
        assert dirty is not None
        if bitmap == "live":
            assert dirty[0] == (0, 2 * KIB)


@pytest.mark.parametrize("options", ["cluster_size=16k", "cluster_size=512"])
async def test_power_cuts_with_the_first_and_the_last_bitmap(
    tmp_path: Path, options: str
) -> None:
    """The header gets an extension, which may lie behind its first sector, and loses it."""
    start: bytes | Files = made(tmp_path, options)
    cutter = Cutter(start, None, copied_may_lack=False, bitmaps=True)
    await cutter.run(add_bitmap, seed=6)
    assert cutter.states > 3
    start = with_bitmaps(tmp_path / "image")
    for seed, work in enumerate((remove_bitmap, remove_another)):
        cutter = Cutter(start, None, copied_may_lack=False, bitmaps=True)
        start = await cutter.run(work, seed)
    assert not (await look(start, None)).bitmaps


@pytest.mark.parametrize("raw", ["off", "on"])
@pytest.mark.parametrize("name", ["grow", "grow far", "shrink", "preallocate"])
async def test_power_cuts_with_a_data_file(tmp_path: Path, name: str, raw: str) -> None:
    path, data = tmp_path / "image", tmp_path / "data"
    options = f"cluster_size=4k,data_file={data},data_file_raw={raw}"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(SIZE))
    run("qemu-io", "-c", "write -P 1 8k 9k", "-c", f"write -P 2 36k {4 * KIB}",
        "-c", "write -z 12k 4k", path)  # fmt: skip
    start = Files(path.read_bytes())
    # as an interrupted shrink may leave it
    start.external = bytearray(data.read_bytes() + b"cut off" * 100 * KIB)
    cutter = Cutter(start, None, copied_may_lack=False)
    await cutter.run(WORK[name], seed=5)
    # in a raw one all is mapped already
    assert cutter.states > (1 if name == "preallocate" else 3)


async def test_one_after_the_other(tmp_path: Path) -> None:
    """Each begins with what the one before has left."""
    content: bytes | Files = made(tmp_path, "cluster_size=4k")
    for seed, name in enumerate(("create", "shrink", "delete", "grow far", "expand")):
        cutter = Cutter(content, None, name in {"create", "delete"})
        content = await cutter.run(WORK[name], seed)


AMENDMENTS = {
    "to 2": ("cluster_size=4k", Amendment(version=2)),
    "to 2, names": ("cluster_size=16k", Amendment(version=2)),
    "to 3": ("cluster_size=4k,compat=0.10", Amendment(version=3)),
    "to 3, names": ("cluster_size=16k,compat=0.10", Amendment(version=3)),
    "wider": ("cluster_size=512", Amendment(refcount_bits=64)),
    "narrower": ("cluster_size=4k", Amendment(refcount_bits=2, lazy_refcounts=True)),
}


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("name", list(AMENDMENTS))
async def test_power_cuts_while_amending(
    tmp_path: Path, name: str, backed: bool
) -> None:
    options, amendment = AMENDMENTS[name]
    base = random.Random(2).randbytes(SIZE) if backed else None
    start = made(tmp_path, options, backing=base)
    image, disk = await opened(start, base, read_only=False, record=False)
    await image.prepare_version(amendment.version or 3)
    await image.close()
    cutter = Cutter(bytes(disk.data), base, copied_may_lack=False)
    await cutter.run_on_file(
        tmp_path / "amended", lambda fd: amend_image(fd, "image", amendment)
    )
    assert cutter.states > 0


@pytest.mark.parametrize("name", ["wider", "to 3, names"])
async def test_the_oracle_sees_a_missing_fsync(tmp_path: Path, name: str) -> None:
    options, amendment = AMENDMENTS[name]
    base = random.Random(2).randbytes(SIZE)
    start = made(tmp_path, options, backing=base)
    image, disk = await opened(start, base, read_only=False, record=False)
    await image.prepare_version(amendment.version or 3)
    await image.close()
    cutter = Cutter(bytes(disk.data), base, copied_may_lack=False)
    with pytest.raises((AssertionError, ImageError)):
        await cutter.run_on_file(
            tmp_path / "amended",
            lambda fd: amend_image(fd, "image", amendment),
            barriers=False,
        )


@pytest.mark.parametrize("field", ["table", "block"])
async def test_power_cuts_while_repairing(tmp_path: Path, field: str) -> None:
    data = bytearray(made(tmp_path, "cluster_size=4k"))
    table = int.from_bytes(data[48:56], "big")
    block = int.from_bytes(data[table : table + 8], "big")
    where = table if field == "table" else block
    data[where : where + 40] = bytes(40)
    cutter = Cutter(bytes(data), None, copied_may_lack=True, broken=True)

    def repair(fd: int) -> None:
        result = repair_image(fd, "image", everything=True, agree=lambda _: False)
        assert not result.after.corruptions

    await cutter.run_on_file(tmp_path / "repaired", repair)
    assert cutter.states > 0


@pytest.mark.replaces
async def test_the_oracle_sees_a_missing_barrier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without barriers a cut leaves what none of the promises allows."""
    monkeypatch.setattr("nbdserve.formats.mapped.commit.Committer.barrier", _no_barrier)
    found = 0
    for name in ("create", "delete", "apply", "grow far"):
        cutter = Cutter(made(tmp_path, "cluster_size=4k"), None, copied_may_lack=True)
        try:
            await cutter.run(WORK[name], seed=3)
        except Exception:  # noqa: BLE001 -- whatever it leaves, it must not pass
            found += 1
    assert found == 4


async def _no_barrier(self: object) -> None:
    return
