"""Internal snapshots, created, applied, deleted and served by us and by qemu-img."""

import asyncio
import contextlib
import random
from errno import EPERM
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nbdserve.errors import ConfigError, ImageCorruptError, ImageError, RequestError
from nbdserve.formats.check import check_image
from nbdserve.formats.mapped.redo import RedoLog
from nbdserve.formats.open import open_image
from nbdserve.formats.qcow2.image import Qcow2Image
from nbdserve.formats.qcow2.structure import Structure
from nbdserve.storage.faults import NO_FAULT, Fault
from tests.helpers.engine import HEADER_SNAPSHOTS, Disk, convert, make, open_bytes, u32
from tests.helpers.tools import run

if TYPE_CHECKING:
    from array import array

KIB = 1 << 10
MIB = 1 << 20
SIZE = 2 * MIB

#: Version, cluster size, refcount width; compressed or not.
FLAVOURS = [
    ("", False),
    ("compat=0.10", False),
    ("compat=0.10", True),
    ("cluster_size=1k", False),
    ("cluster_size=4k,refcount_bits=64", False),
    ("cluster_size=4k,refcount_bits=4", True),
    ("cluster_size=4k,refcount_bits=2", False),
    ("compression_type=zstd", True),
]


def content(seed: int, size: int = SIZE) -> bytes:
    """Return bytes with holes."""
    chance = random.Random(seed)
    data = bytearray(size)
    for start in range(0, size, 16 * KIB):
        if chance.random() < 0.6:
            data[start : start + 9 * KIB] = chance.randbytes(9 * KIB)
    return bytes(data)


async def opened(path: Path, **options: object) -> Qcow2Image:
    """Open a file for writing."""
    image = await open_image(path, **options)  # type: ignore[arg-type]
    assert isinstance(image, Qcow2Image)
    return image


def of_disk(disk: Disk) -> Qcow2Image:
    """Return the image of a disk as what it is."""
    assert isinstance(disk.image, Qcow2Image)
    return disk.image


def assert_reads(path: Path, expected: bytes, *, snapshot: str | None = None) -> None:
    """Compare what qemu-img reads."""
    out = path.with_suffix(".raw")
    which = ["-l", snapshot] if snapshot else []
    run("qemu-img", "convert", *which, "-O", "raw", path, out)
    assert out.read_bytes() == expected


def names(path: Path) -> list[str]:
    """Return what qemu-img lists."""
    lines = run("qemu-img", "snapshot", "-l", path).splitlines()
    return [line.split()[1] for line in lines[2:]]


@pytest.mark.parametrize(("options", "compressed"), FLAVOURS)
async def test_life_of_snapshots(
    tmp_path: Path, options: str, compressed: bool
) -> None:
    """Created, written over, read by qemu, applied, deleted: all bytes and counts are right."""
    first = content(1)
    path = convert(tmp_path, first, options=options, compressed=compressed)
    image = await opened(path)
    await image.create_snapshot("first")
    second = bytearray(first)
    second[100 * KIB : 300 * KIB] = random.Random(2).randbytes(200 * KIB)
    second[SIZE - 700 :] = bytes(700)
    await image.write(100 * KIB, bytes(second[100 * KIB : 300 * KIB]))
    await image.write(SIZE - 700, bytes(700))
    assert await image.read(0, SIZE) == second
    await image.create_snapshot("second")
    third = bytearray(second)
    third[MIB : MIB + 70 * KIB] = random.Random(3).randbytes(70 * KIB)
    await image.write(MIB, bytes(third[MIB : MIB + 70 * KIB]))
    await image.write_zeroes(256 * KIB, 128 * KIB)
    third[256 * KIB : 384 * KIB] = bytes(128 * KIB)
    assert await image.read(0, SIZE) == third
    await image.close()
    run("qemu-img", "check", path)
    assert names(path) == ["first", "second"]
    assert_reads(path, bytes(third))
    assert_reads(path, first, snapshot="first")
    assert_reads(path, bytes(second), snapshot="second")

    image = await opened(path)
    await image.apply_snapshot("first")
    assert await image.read(0, SIZE) == first
    await image.write(5, b"after")
    await image.delete_snapshot("first")
    assert await image.read(0, SIZE) == first[:5] + b"after" + first[10:]
    await image.close()
    run("qemu-img", "check", path)
    assert names(path) == ["second"]
    assert_reads(path, first[:5] + b"after" + first[10:])
    assert_reads(path, bytes(second), snapshot="second")

    image = await opened(path)
    await image.delete_snapshot("2")
    await image.write(SIZE // 2, b"in place again")
    await image.close()
    run("qemu-img", "check", path)
    assert names(path) == []


@pytest.mark.parametrize("options", ["", "compat=0.10", "cluster_size=512"])
async def test_qemu_goes_on(tmp_path: Path, options: str) -> None:
    """What we create qemu-img applies and deletes, and the other way round."""
    first = content(4)
    path = convert(tmp_path, first, options=options)
    run("qemu-img", "snapshot", "-c", "theirs", path)
    image = await opened(path)
    await image.write(64 * KIB, b"x" * 5000)
    await image.create_snapshot("ours")
    await image.write(64 * KIB, b"y" * 5000)
    await image.close()
    second = first[: 64 * KIB] + b"x" * 5000 + first[64 * KIB + 5000 :]
    run("qemu-img", "check", path)
    run("qemu-img", "snapshot", "-a", "ours", path)
    run("qemu-img", "check", path)
    assert_reads(path, second)
    run("qemu-img", "snapshot", "-d", "ours", path)
    run("qemu-img", "check", path)
    image = await opened(path)
    await image.apply_snapshot("theirs")
    await image.delete_snapshot("theirs")
    await image.close()
    run("qemu-img", "check", path)
    assert_reads(path, first)
    run("qemu-io", "-c", "write -P 7 0 1M", path)
    run("qemu-img", "check", path)


async def test_a_snapshot_has_its_own_size(tmp_path: Path) -> None:
    """Applying one restores the size of then, and its bytes."""
    first = content(5)
    path = convert(tmp_path, first, options="cluster_size=4k")
    run("qemu-img", "snapshot", "-c", "small", path)
    run("qemu-img", "resize", path, str(8 * MIB))
    run("qemu-io", "-c", f"write -P 9 {7 * MIB} 64k", path)
    async with open_image(path, read_only=True, snapshot="small") as disk:
        assert disk.size == SIZE
        assert await disk.read(0, SIZE) == first
    image = await opened(path)
    await image.create_snapshot("large")
    await image.apply_snapshot("small")
    assert image.size == SIZE
    assert await image.read(0, SIZE) == first
    await image.write(SIZE - 512, b"z" * 512)
    await image.close()
    run("qemu-img", "check", path)
    assert_reads(path, first[:-512] + b"z" * 512)
    image = await opened(path)
    await image.apply_snapshot("large")
    assert image.size == 8 * MIB
    assert await image.read(7 * MIB, 64 * KIB) == b"\x09" * 64 * KIB
    await image.close()
    run("qemu-img", "check", path)


async def test_a_snapshot_opened_read_only(tmp_path: Path) -> None:
    """By name or id, with backing file; it refuses writes."""
    base = tmp_path / "base.raw"
    below = content(6)
    base.write_bytes(below)
    path = tmp_path / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path)
    run("qemu-io", "-c", "write -P 1 64k 10k", path)
    run("qemu-img", "snapshot", "-c", "one", path)
    run("qemu-io", "-c", "write -P 2 60k 20k", path)
    expected = below[: 64 * KIB] + b"\1" * 10 * KIB + below[74 * KIB :]
    for name in ("one", "1"):
        async with open_image(path, read_only=True, snapshot=name) as disk:
            assert disk.read_only
            assert await disk.read(0, disk.size) == expected
            with pytest.raises(RequestError) as caught:
                await disk.write(0, b"x")
            assert caught.value.errno == EPERM
    with pytest.raises(ConfigError, match="no snapshot 'two'"):
        await open_image(path, read_only=True, snapshot="two")
    with pytest.raises(ConfigError, match="read-only"):
        await open_image(path, snapshot="one")
    with pytest.raises(ConfigError, match="only qcow2 images have"):
        await open_image(base, read_only=True, snapshot="one")


LANE = 64 * KIB
SLOTS = LANE // (4 * KIB)


def latest(content: bytes, lane: int) -> int:
    """Return the number of the last write of a lane, all of whose writes must be there."""
    slots = [
        int.from_bytes(content[at : at + 4], "big")
        for at in range(lane * LANE, (lane + 1) * LANE, 4 * KIB)
    ]
    last = max(slots)
    for number in range(max(last - SLOTS + 1, 1), last + 1):
        assert slots[number % SLOTS] == number, "a write that came before is missing"
    return last


@pytest.mark.parametrize("redo", [False, True])
async def test_writers_go_on_around_a_snapshot(tmp_path: Path, redo: bool) -> None:
    """A snapshot has all that was answered before, and nothing without what preceded it."""
    path = make(tmp_path, SIZE, options="cluster_size=4k")
    disk = await open_bytes(tmp_path, path.read_bytes(), suspending=True)
    image = of_disk(disk)
    if redo:
        image.use_redo(RedoLog(tmp_path / "redo"))
    stop = False
    answered = [0] * 5

    async def write(lane: int) -> None:
        number = 0
        while not stop:
            number += 1
            offset = lane * LANE + number % SLOTS * 4 * KIB
            await disk.write(
                offset, number.to_bytes(4, "big") * (KIB if lane % 2 else 2)
            )
            answered[lane] = number

    async def discard() -> None:
        while not stop:
            await image.trim(MIB, 256 * KIB)
            await disk.write(MIB + 3000, b"between" * 1000)
            await image.write_zeroes(MIB, 100 * KIB)
            disk.model[MIB : MIB + 256 * KIB] = bytes(256 * KIB)
            await image.trim(MIB, 256 * KIB)

    before: dict[str, list[int]] = {}
    async with asyncio.TaskGroup() as group:
        for lane in range(5):
            group.create_task(write(lane))
        group.create_task(discard())
        for each in range(6):
            await asyncio.sleep(0.01)
            before[f"s{each}"] = answered[:]
            await image.create_snapshot(f"s{each}")
            if each == 3:
                await image.delete_snapshot("s1")
        await disk.write(SIZE - 4, b"last")
        stop = True
    await disk.assert_content()
    assert image.longest_pause_s > 0
    await disk.close_and_check()
    saved = disk.saved()
    for name in ("s0", "s2", "s3", "s4", "s5"):
        out = tmp_path / "out"
        run("qemu-img", "convert", "-l", name, "-O", "raw", saved, out)
        content = out.read_bytes()
        for lane in range(5):
            assert latest(content, lane) >= before[name][lane]


async def test_what_is_being_read_is_not_punched_by_an_apply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path, SIZE)
    disk = await open_bytes(tmp_path, path.read_bytes())
    image = of_disk(disk)
    await image.create_snapshot("empty")
    await disk.write(0, b"read this" * 1000)
    pins = image._parts.pins
    generations: list[int] = []
    adopt = Structure.adopt_tree

    def read_and_adopt(self: Structure, host_offset: int, words: "array[int]") -> None:
        # a reader looked at the old tables a moment ago, and waits for the disk
        generations.append(pins.enter())
        adopt(self, host_offset, words)

    monkeypatch.setattr(Structure, "adopt_tree", read_and_adopt)
    applying = asyncio.create_task(image.apply_snapshot("empty"))
    for _ in range(200):
        await asyncio.sleep(0)
    assert generations
    assert b"read this" * 1000 in disk.memory.content()
    pins.leave(generations.pop())
    await applying
    assert b"read this" * 1000 not in disk.memory.content()
    disk.model[:] = bytes(SIZE)
    await disk.close_and_check()


async def test_names(tmp_path: Path) -> None:
    """A name is wanted, once; missing snapshots are named."""
    path = make(tmp_path, SIZE)
    image = await opened(path)
    await image.create_snapshot("one")
    with pytest.raises(ConfigError, match="already"):
        await image.create_snapshot("one")
    with pytest.raises(ConfigError, match="1 to 255"):
        await image.create_snapshot("")
    with pytest.raises(ConfigError, match="1 to 255"):
        await image.create_snapshot("x" * 256)
    with pytest.raises(ConfigError, match="no snapshot 'two'"):
        await image.delete_snapshot("two")
    with pytest.raises(ConfigError, match="no snapshot 'two'"):
        await image.apply_snapshot("two")
    assert [each.name for each in await image.snapshots()] == [b"one"]
    await image.close()
    run("qemu-img", "snapshot", "-c", "one", path)
    image = await opened(path)
    with pytest.raises(ConfigError, match=r"its id \(1, 2\)"):
        await image.delete_snapshot("one")
    await image.delete_snapshot("2")
    await image.close()
    run("qemu-img", "check", path)
    assert names(path) == ["one"]


async def test_no_room_in_a_refcount(tmp_path: Path) -> None:
    """One bit can't count two users: refused before anything is changed."""
    path = convert(tmp_path, content(7), options="refcount_bits=1")
    before = path.read_bytes()
    image = await opened(path)
    with pytest.raises(ImageError, match="refcounts of 1 bits"):
        await image.create_snapshot("one")
    await image.close()
    run("qemu-img", "check", path)
    assert path.read_bytes()[: len(before)] == before


async def test_a_broken_snapshot_is_not_given_back(tmp_path: Path) -> None:
    """Its L1 table names the header: nothing is freed, and the image stays as it was."""
    path = convert(tmp_path, content(8))
    run("qemu-img", "snapshot", "-c", "one", path)
    data = bytearray(path.read_bytes())
    table = int.from_bytes(data[64:72], "big")
    snapshot_l1 = int.from_bytes(data[table : table + 8], "big")
    # where qemu-img puts the refcount table
    data[snapshot_l1 : snapshot_l1 + 8] = (1 << 16).to_bytes(8, "big")
    disk = await open_bytes(tmp_path, bytes(data))
    with pytest.raises(ImageCorruptError, match="L1 entry 0"):
        await of_disk(disk).delete_snapshot("one")
    await disk.image.close()
    assert u32(disk.memory.content(), HEADER_SNAPSHOTS) == 1


@pytest.mark.parametrize("verb", ["create", "delete", "apply"])
async def test_a_failed_call_takes_nothing(tmp_path: Path, verb: str) -> None:
    """Whichever call fails: the disk is the old or the new one, and COPIED at most is wrong."""
    first = content(9, 256 * KIB)
    path = convert(tmp_path, first, options="cluster_size=4k")
    run("qemu-img", "snapshot", "-c", "old", path)
    run("qemu-io", "-c", "write -P 3 100k 30k", path)
    start = path.read_bytes()
    second = first[: 100 * KIB] + b"\3" * 30 * KIB + first[130 * KIB :]
    for number in range(60):
        disk = await open_bytes(tmp_path, start)
        image = of_disk(disk)
        # a pool, so that what fails is the snapshot's own
        await image.write(0, first[:512])
        await image.flush()
        disk.storage.calls = 0
        disk.storage.fault = Fault(at=number)
        work = {
            "create": image.create_snapshot,
            "delete": image.delete_snapshot,
            "apply": image.apply_snapshot,
        }[verb]
        with contextlib.suppress(OSError):
            await work("new" if verb == "create" else "old")
        failed, disk.storage.fault = disk.storage.failed, NO_FAULT
        shown = await image.read(0, image.size)
        assert shown == second or (verb == "apply" and shown == first)
        # after a failed sync it has to say that it could not be closed well
        with contextlib.suppress(OSError):
            await image.close()
        saved = disk.saved()
        run("qemu-img", "convert", "-O", "raw", saved, tmp_path / "out")
        found = (tmp_path / "out").read_bytes()
        assert found == shown or (verb == "apply" and found == first)
        result = check_image(saved)
        assert result is not None
        assert all(
            "OFLAG_COPIED" in each for each in result.messages if "ERROR" in each
        )
        if not failed:
            break
    else:
        pytest.fail("it never ended well")
    run("qemu-img", "check", saved)
