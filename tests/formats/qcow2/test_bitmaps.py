"""Persistent bitmaps: kept while an image is open, and the same to qemu and to us."""

import asyncio
import random
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from nbdserve.errors import ConfigError, ImageCorruptError, ImageError, RequestError
from nbdserve.formats.check import check_image
from nbdserve.formats.mapped.redo import Link
from nbdserve.formats.open import open_image
from nbdserve.formats.qcow2.bitmaps import BitmapInfo
from nbdserve.formats.qcow2.image import Qcow2Image
from nbdserve.storage.faults import NO_FAULT, Fault
from tests.helpers.bitmaps import Ranges, qemu_bitmaps, seen_by_qemu
from tests.helpers.engine import HEADER_AUTOCLEAR, make, open_bytes, u32, u64
from tests.helpers.tools import run

KIB = 1 << 10
MIB = 1 << 20
SIZE = 16 * MIB
#: From the header extension's magic on.
EXTENSION = struct.Struct(">IIIIQQ")


@asynccontextmanager
async def opened(path: Path, *, read_only: bool = False) -> AsyncIterator[Qcow2Image]:
    async with open_image(path, read_only=read_only) as image:
        assert isinstance(image, Qcow2Image)
        yield image


def marked(folder: Path, *, options: str = "", granularity: str = "64k") -> Path:
    """Make an image with a bitmap that records."""
    path = make(folder, SIZE, options=options)
    run("qemu-img", "bitmap", "--add", "-g", granularity, path, "b")
    return path


def faults(path: Path) -> tuple[int, int]:
    """Return leaks and corruptions that our check finds."""
    result = check_image(path)
    assert result is not None
    return result.leaks, result.corruptions


async def dirty(image: Qcow2Image, name: str = "b") -> Ranges:
    return list((await image.dirty_bitmap(name)).dirty())


def directory_of(content: bytes | bytearray) -> tuple[int, int]:
    """Return where the bitmaps extension and the directory are."""
    at = bytes(content[: 64 * KIB]).index(b"\x23\x85\x28\x75")
    return at, EXTENSION.unpack_from(content, at)[5]


LAYOUTS = [
    ("", "64k"),
    ("", "512"),
    ("cluster_size=512", "4k"),
    ("cluster_size=4k", "512"),
    ("cluster_size=2M", "1M"),
    ("extended_l2=on,cluster_size=16k", "4k"),
]


@pytest.mark.parametrize(("options", "granularity"), LAYOUTS)
async def test_what_is_written_is_known_to_qemu(
    tmp_path: Path, options: str, granularity: str
) -> None:
    """The same work by qemu and by us gives the same bitmap, over several sessions."""
    ours = marked(tmp_path, options=options, granularity=granularity)
    theirs = tmp_path / "theirs.qcow2"
    theirs.write_bytes(ours.read_bytes())
    chance = random.Random(options + granularity)
    expected: Ranges = []
    for _ in range(3):
        commands: list[str] = []
        async with opened(ours) as image:
            for _ in range(12):
                length = chance.choice([512, 4096, 70 * KIB, MIB])
                offset = chance.randrange((SIZE - length) // 512) * 512
                pick = chance.random()
                if pick < 0.6:
                    await image.write(offset, bytes([1]) * length)
                    commands.append(f"write -P 1 {offset} {length}")
                elif pick < 0.8:
                    await image.write_zeroes(offset, length)
                    commands.append(f"write -z {offset} {length}")
                else:
                    await image.trim(offset, length)
                    commands.append(f"discard {offset} {length}")
            expected = await dirty(image)
        run("qemu-io", "-d", "unmap", *[w for c in commands for w in ("-c", c)], theirs)
        run("qemu-img", "check", ours)
        assert faults(ours) == (0, 0)
        assert qemu_bitmaps(ours) == qemu_bitmaps(theirs)
        async with opened(theirs, read_only=True) as image:
            assert await dirty(image) == expected
        async with opened(ours) as image:
            assert not image.notes
            assert await dirty(image) == expected
    (tmp_path / "q").mkdir()
    assert seen_by_qemu(ours, "b", tmp_path / "q") == expected
    assert seen_by_qemu(theirs, "b", tmp_path / "q") == expected


async def test_what_we_make_qemu_uses(tmp_path: Path) -> None:
    path = make(tmp_path, SIZE)
    async with opened(path) as image:
        assert await image.bitmaps() == []
        await image.add_bitmap("one")
        await image.add_bitmap("two", granularity=512, enabled=False)
        await image.write(MIB, b"x")
        await image.enable_bitmap("two")
        await image.write(2 * MIB, b"x")
        await image.enable_bitmap("one", enabled=False)
        await image.write(3 * MIB, b"x")
        assert await image.bitmaps() == [
            BitmapInfo("one", 64 * KIB, enabled=False),
            BitmapInfo("two", 512, enabled=True),
        ]
    assert {name: each["flags"] for name, each in qemu_bitmaps(path).items()} == {
        "one": [],
        "two": ["auto"],
    }
    assert seen_by_qemu(path, "one", tmp_path) == [
        (MIB, 64 * KIB),
        (2 * MIB, 64 * KIB),
    ]
    assert seen_by_qemu(path, "two", tmp_path) == [(2 * MIB, 512), (3 * MIB, 512)]
    run("qemu-img", "bitmap", "--merge", "one", path, "two")
    run("qemu-img", "bitmap", "--remove", path, "one")
    run("qemu-img", "check", path)
    async with opened(path) as image:
        assert await dirty(image, "two") == [
            (MIB, 64 * KIB),
            (2 * MIB, 64 * KIB),
            (3 * MIB, 512),
        ]
        await image.clear_bitmap("two")
        assert await dirty(image, "two") == []
        await image.remove_bitmap("two")
    assert not qemu_bitmaps(path)
    run("qemu-img", "check", path)
    assert faults(path) == (0, 0)


@pytest.mark.parametrize(
    ("one", "other"), [("64k", "512"), ("512", "64k"), ("4k", "4k")]
)
async def test_merging_as_qemu(tmp_path: Path, one: str, other: str) -> None:
    path = marked(tmp_path, granularity=one)
    run("qemu-io", "-c", "write 1M 1k", path)
    run("qemu-img", "bitmap", "--add", "-g", other, path, "source")
    run(
        "qemu-io",
        "-c",
        "write 5k 512",
        "-c",
        "write 9M 300k",
        "-c",
        "write 1100k 1k",
        path,
    )
    theirs = tmp_path / "theirs.qcow2"
    theirs.write_bytes(path.read_bytes())
    run("qemu-img", "bitmap", "--merge", "source", theirs, "b")
    async with opened(path) as image, opened(theirs, read_only=True) as reference:
        await image.merge_bitmap("b", await reference.dirty_bitmap("source"))
        assert await dirty(image) == await dirty(reference)
        assert await dirty(image, "source") == await dirty(reference, "source")
    run("qemu-img", "check", path)
    async with opened(path) as image, opened(theirs, read_only=True) as reference:
        assert await dirty(image) == await dirty(reference)
        small = make(tmp_path, MIB)
        run("qemu-img", "bitmap", "--add", small, "small")
        async with opened(small) as another:
            with pytest.raises(ConfigError, match="can't be merged"):
                await image.merge_bitmap("b", await another.dirty_bitmap("small"))


async def test_resizing_as_qemu(tmp_path: Path) -> None:
    path = marked(tmp_path, granularity="512")
    run("qemu-io", "-c", "write 1M 1M", "-c", "write 15M 1M", path)
    run("qemu-img", "bitmap", "--add", "--disable", "-g", "4k", path, "still")
    run("qemu-img", "bitmap", "--merge", "b", path, "still")
    theirs = tmp_path / "theirs.qcow2"
    theirs.write_bytes(path.read_bytes())
    for size in (40 * MIB, 1537 * KIB + 512, 1537 * KIB + 4096, 5 << 30):
        async with opened(path) as image:
            await image.resize(size, shrink=True)
            ours = [await dirty(image), await dirty(image, "still")]
            assert image.notes == []
        run("qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", theirs, str(size))
        run("qemu-img", "check", path)
        assert qemu_bitmaps(path) == qemu_bitmaps(theirs)
        async with opened(theirs) as image:
            assert ours == [await dirty(image), await dirty(image, "still")]
        async with opened(path) as image:
            assert ours == [await dirty(image), await dirty(image, "still")]


async def test_resizing_while_it_is_written(tmp_path: Path) -> None:
    path = marked(tmp_path)
    async with opened(path) as image:
        await image.write(0, b"x")
        await image.resize(20 * MIB)
        await image.write(19 * MIB, b"x")
    async with opened(path) as image:
        assert await dirty(image) == [(0, 64 * KIB), (19 * MIB, 64 * KIB)]


async def test_snapshots_keep_bitmaps_and_are_not_applied(tmp_path: Path) -> None:
    """As with qemu-img: what a snapshot would change, no bitmap could say."""
    path = marked(tmp_path)
    async with opened(path) as image:
        await image.write(0, b"x")
        await image.create_snapshot("s")
        await image.write(MIB, b"x")
        with pytest.raises(ImageError, match="remove them first"):
            await image.apply_snapshot("s")
        await image.delete_snapshot("s")
    async with opened(path) as image:
        assert await dirty(image) == [(0, 64 * KIB), (MIB, 64 * KIB)]
    run("qemu-img", "snapshot", "-c", "s", path)
    run("qemu-img", "snapshot", "-a", "s", path, expect=[1])


async def test_a_killed_session_leaves_it_in_use(tmp_path: Path) -> None:
    path = marked(tmp_path)
    run("qemu-io", "-c", "write 0 64k", path)
    run("qemu-img", "bitmap", "--add", "--disable", path, "still")
    before = path.read_bytes()
    disk = await open_bytes(tmp_path, before)
    assert disk.memory.content() == before
    await disk.image.write(MIB, b"x")
    saved = disk.saved()
    flags = {name: each["flags"] for name, each in qemu_bitmaps(saved).items()}
    assert flags == {"b": ["in-use", "auto"], "still": []}
    run("qemu-img", "check", saved, expect=[0, 3])
    await disk.image.close()
    for read_only in (True, False):
        async with opened(saved, read_only=read_only) as image:
            [note] = image.notes
            assert "bitmap 'b' was not stored" in note
            found = {each.name: each.problem for each in await image.bitmaps()}
            assert found["b"] is not None
            assert found["still"] is None
            for work in (image.dirty_bitmap, image.clear_bitmap, image.enable_bitmap):
                with pytest.raises((ImageError, RequestError)) as refused:
                    await work("b")
                assert read_only or "bitmap remove" in str(refused.value)
    async with opened(saved) as image:
        await image.write(2 * MIB, b"x")
        with pytest.raises(ImageError, match="bitmap 'b'"):
            await image.resize(2 * SIZE)
        await image.add_bitmap("new")
    assert qemu_bitmaps(saved)["b"]["flags"] == ["in-use", "auto"]
    async with opened(saved) as image:
        await image.remove_bitmap("b")
        assert not await dirty(image, "new")
    run("qemu-img", "check", saved, expect=[3])  # what the kill left reserved
    run("qemu-img", "check", "-q", "-r", "leaks", saved)
    run("qemu-img", "check", saved)


async def test_a_look_changes_nothing(tmp_path: Path) -> None:
    path = marked(tmp_path)
    before = path.read_bytes()
    for read_only in (True, False):
        async with opened(path, read_only=read_only) as image:
            assert await dirty(image) == []
            await image.read(0, 100)
            await image.flush()
        assert path.read_bytes() == before


async def test_what_a_killed_server_acknowledged_is_marked(tmp_path: Path) -> None:
    path = marked(tmp_path)
    async with opened(path) as image:
        await image.replay([Link(17, 1, 0)])
        await image.write(0, b"x")
        assert await dirty(image) == [(0, 64 * KIB), (17 * 64 * KIB, 64 * KIB)]


async def test_the_file_has_no_room_for_what_was_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image is closed as it should be, and the bitmap stays in use."""
    path = marked(tmp_path)
    run("qemu-io", "-c", "write 0 1k", path)
    disk = await open_bytes(tmp_path, path.read_bytes())
    await disk.write(MIB, b"x" * 100)
    await disk.image.flush()
    image = disk.image
    assert isinstance(image, Qcow2Image)

    async def no_room(*_: object) -> int:
        raise OSError(28, "No space left on device")

    assert image._structure is not None
    monkeypatch.setattr(image._structure, "take", no_room)
    with pytest.raises(OSError, match="No space"):
        await image.add_bitmap("more")
    with pytest.raises(OSError, match="No space"):
        await image.clear_bitmap("b")
    assert await dirty(image) == [(0, 64 * KIB), (MIB, 64 * KIB)]
    with pytest.raises(OSError, match="No space"):
        await image.close()
    saved = disk.saved()
    assert qemu_bitmaps(saved)["b"]["flags"] == ["in-use", "auto"]
    run("qemu-img", "check", saved)


@pytest.mark.parametrize("seed", range(12))
async def test_calls_that_fail_while_it_is_stored(tmp_path: Path, seed: int) -> None:
    """Whatever call fails, the bitmap in the file is right or in use."""
    path = marked(tmp_path, options="cluster_size=4k", granularity="4k")
    disk = await open_bytes(tmp_path, path.read_bytes())
    image = disk.image
    assert isinstance(image, Qcow2Image)
    await disk.write(MIB, b"x" * 5000)
    await image.flush()
    # counted from the first call of the change
    disk.storage.calls = 0
    disk.storage.fault = Fault(at=seed, error=28)
    failed = False
    try:
        await image.merge_bitmap("b", await image.dirty_bitmap("b"))
        await image.close()
    except OSError:
        failed = True
        disk.storage.fault = NO_FAULT
        with suppress(OSError):
            await image.close()
    saved = disk.saved()
    run("qemu-img", "check", saved, expect=[0, 3])
    async with opened(saved, read_only=True) as again:
        [info] = await again.bitmaps()
        assert failed or info.problem is None
        if info.problem is None:
            assert await dirty(again) == [(MIB, 8192)]


@pytest.mark.parametrize("number", range(5))
async def test_closing_says_what_failed_first(tmp_path: Path, number: int) -> None:
    """Not that nothing more is written after that, as with a header that is in doubt."""
    path = marked(tmp_path, options="cluster_size=4k", granularity="4k")
    disk = await open_bytes(tmp_path, path.read_bytes())
    await disk.write(MIB, b"x" * 5000)
    await disk.image.flush()
    disk.storage.calls = 0
    disk.storage.fault = Fault(at=number, error=28, kinds=frozenset({"write"}))
    with pytest.raises(OSError, match=r"^\[Errno 28\]"):
        await disk.image.close()
    assert disk.storage.failed == ["write"]


async def test_names_and_sizes_that_cant_be(tmp_path: Path) -> None:
    path = marked(tmp_path)
    async with opened(path) as image:
        for name in ("", "x" * 1024, "a\0b", "b"):
            with pytest.raises(ConfigError, match="bitmap"):
                await image.add_bitmap(name)
        for granularity in (0, 256, 3000, 1 << 32):
            with pytest.raises(ConfigError, match="power of two"):
                await image.add_bitmap("new", granularity=granularity)
        with pytest.raises(ConfigError, match="no bitmap 'new'"):
            await image.remove_bitmap("new")
        await image.add_bitmap("ü" * 511)
        await image.resize(64 << 40)
        with pytest.raises(ConfigError, match="take a larger one"):
            await image.add_bitmap("new", granularity=512)
    assert "ü" * 511 in qemu_bitmaps(path)
    old = make(tmp_path, SIZE, options="compat=0.10")
    async with opened(old) as image:
        with pytest.raises(ImageError, match="version 3"):
            await image.add_bitmap("b")
    empty = make(tmp_path, 0)
    async with opened(empty) as image:
        with pytest.raises(ConfigError, match="0 bytes"):
            await image.add_bitmap("b")


# -- what others have left, or mean


async def test_bitmaps_that_another_program_ignored_are_dropped(tmp_path: Path) -> None:
    path = marked(tmp_path)
    content = bytearray(path.read_bytes())
    content[HEADER_AUTOCLEAR : HEADER_AUTOCLEAR + 8] = bytes(8)
    path.write_bytes(content)
    async with opened(path) as image:
        assert "ignored" in image.notes[0]
        assert await image.bitmaps() == []
        await image.write(0, b"x")
        await image.add_bitmap("b")
    assert list(qemu_bitmaps(path)) == ["b"]
    run("qemu-img", "check", path, expect=[3])  # those of before are lost clusters


def _table(content: bytearray, value: int) -> None:
    struct.pack_into(">Q", content, directory_of(content)[1], value)


def _entries(content: bytearray) -> int:
    return u64(content, directory_of(content)[1])


BROKEN_BITMAPS: dict[str, Callable[[bytearray], None]] = {
    "table past the end": lambda c: _table(c, 1 << 40),
    "table not aligned": lambda c: _table(c, _entries(c) + 512),
    "table is the refcount table": lambda c: _table(c, u64(c, 48)),
    "table is the directory": lambda c: _table(c, directory_of(c)[1]),
    "too many entries": lambda c: struct.pack_into(">I", c, directory_of(c)[1] + 8, 2),
    "far too many entries": lambda c: struct.pack_into(
        ">I", c, directory_of(c)[1] + 8, 0x800_0000 // 8
    ),
    "data past the end": lambda c: struct.pack_into(">Q", c, _entries(c), 1 << 40),
    "data is the L1 table": lambda c: struct.pack_into(
        ">Q", c, _entries(c), u64(c, 40)
    ),
    "data is the table": lambda c: struct.pack_into(">Q", c, _entries(c), _entries(c)),
    "data not aligned": lambda c: struct.pack_into(">Q", c, _entries(c), 0x1_0200),
    "data and ones": lambda c: struct.pack_into(">Q", c, _entries(c), 0x10_0001),
    "reserved bits": lambda c: struct.pack_into(">Q", c, _entries(c), 1 << 60),
}
BROKEN_DIRECTORIES: dict[str, Callable[[bytearray], None]] = {
    "past the end": lambda c: struct.pack_into(
        ">Q", c, directory_of(c)[0] + 24, 1 << 40
    ),
    "is the header": lambda c: struct.pack_into(">Q", c, directory_of(c)[0] + 24, 0),
    "is the L1 table": lambda c: struct.pack_into(
        ">Q", c, directory_of(c)[0] + 24, u64(c, 40)
    ),
    "two bitmaps": lambda c: struct.pack_into(">I", c, directory_of(c)[0] + 8, 2),
    "huge": lambda c: struct.pack_into(">Q", c, directory_of(c)[0] + 16, 1 << 25),
    "reserved flags": lambda c: struct.pack_into(
        ">I", c, directory_of(c)[1] + 12, 1 << 20
    ),
    "granularity": lambda c: c.__setitem__(directory_of(c)[1] + 17, 40),
    "cut": lambda c: struct.pack_into(">Q", c, directory_of(c)[0] + 16, 16),
}


def content_with_data(folder: Path) -> bytearray:
    """An image with a bitmap in which something is marked."""
    path = marked(folder)
    run("qemu-io", "-c", "write -P 5 0 1M", path)
    return bytearray(path.read_bytes())


@pytest.mark.parametrize("name", BROKEN_BITMAPS)
async def test_a_broken_bitmap_is_not_used_and_can_be_removed(
    tmp_path: Path, name: str
) -> None:
    content = content_with_data(tmp_path)
    BROKEN_BITMAPS[name](content)
    path = tmp_path / "broken.qcow2"
    path.write_bytes(content)
    for read_only in (True, False):
        async with opened(path, read_only=read_only) as image:
            assert len(image.notes) == 1
            with pytest.raises(ImageError, match="can't be used"):
                await image.dirty_bitmap("b")
    async with opened(path) as image:
        await image.write(MIB, b"x" * 5000)
    found = path.read_bytes()
    assert u32(found, directory_of(found)[1] + 12) == 3
    async with opened(path) as image:
        await image.remove_bitmap("b")
        assert await image.read(0, MIB) == b"\5" * MIB
        assert await image.read(MIB, 5000) == b"x" * 5000
    # what it led to is lost, nothing else
    run("qemu-img", "check", path, expect=[0, 3])
    assert faults(path)[1] == 0


@pytest.mark.parametrize("name", BROKEN_DIRECTORIES)
async def test_a_broken_directory_spoils_nothing_else(
    tmp_path: Path, name: str
) -> None:
    content = content_with_data(tmp_path)
    BROKEN_DIRECTORIES[name](content)
    path = tmp_path / "broken.qcow2"
    path.write_bytes(content)
    for read_only in (True, False):
        async with opened(path, read_only=read_only) as image:
            assert "the next write drops them" in image.notes[0]
            with pytest.raises(ImageCorruptError, match="can't be used"):
                await image.bitmaps()
            if not read_only:
                with pytest.raises(ImageCorruptError, match="can't be used"):
                    await image.add_bitmap("new")
                await image.write(MIB, b"x" * 5000)
    assert u64(path.read_bytes(), HEADER_AUTOCLEAR) == 0
    async with opened(path) as image:
        assert await image.read(0, MIB) == b"\5" * MIB
        assert await image.read(MIB, 5000) == b"x" * 5000
        await image.add_bitmap("new")
    assert list(qemu_bitmaps(path)) == ["new"]
    run("qemu-img", "check", path, expect=[0, 3])


async def test_bits_that_are_all_ones_need_no_cluster(tmp_path: Path) -> None:
    content = content_with_data(tmp_path)
    struct.pack_into(">Q", content, _entries(content), 1)
    disk = await open_bytes(tmp_path, bytes(content))
    image = disk.image
    assert isinstance(image, Qcow2Image)
    assert await dirty(image) == [(0, SIZE)]
    await image.write(0, b"x")
    await image.close()
    saved = disk.saved()
    run("qemu-img", "check", saved, expect=[0, 3])
    assert seen_by_qemu(saved, "b", tmp_path) == [(0, SIZE)]


@pytest.mark.parametrize("seed", range(3))
async def test_nothing_is_missed_while_the_structure_changes(
    tmp_path: Path, seed: int
) -> None:
    """Writers go on while snapshots, sizes, other bitmaps and compaction keep them waiting."""
    path = marked(tmp_path, options="cluster_size=4k", granularity="4k")
    disk = await open_bytes(tmp_path, path.read_bytes(), suspending=True)
    image, chance = disk.image, random.Random(seed)
    assert isinstance(image, Qcow2Image)
    busy = True

    async def write(worker: int) -> None:
        while busy:
            length = chance.choice([512, 5000, 60_000])
            offset = chance.randrange(SIZE // 4 - length) + worker * SIZE // 4
            await disk.write(offset, bytes([worker + 1]) * length)

    writers = [asyncio.create_task(write(worker)) for worker in range(3)]
    await image.add_bitmap("other", granularity=512, enabled=False)
    await image.create_snapshot("s")
    await image.merge_bitmap("other", await image.dirty_bitmap("b"))
    await image.resize(SIZE + MIB)
    await image.remove_bitmap("other")
    await image.delete_snapshot("s")
    await image.compact()
    await image.add_bitmap("late", enabled=False)
    busy = False
    await asyncio.gather(*writers)
    disk.model.extend(bytes(MIB))
    await disk.assert_content()
    await image.close()
    saved = disk.saved()
    run("qemu-img", "check", saved)
    assert [each["flags"] for each in qemu_bitmaps(saved).values()] == [["auto"], []]
    async with opened(saved, read_only=True) as after:
        bits = await after.dirty_bitmap("b")
        for offset in range(0, SIZE, 4096):
            [(_, dirty)] = bits.runs(offset, 1, max_runs=1)
            assert dirty or not any(disk.model[offset : offset + 4096])


@pytest.mark.parametrize("seed", range(4))
async def test_mutated_bitmaps_harm_nothing(tmp_path: Path, seed: int) -> None:
    """Only typed errors; and where a check finds no corruption, every byte is right."""
    chance = random.Random(seed)
    whole = bytes(content_with_data(tmp_path))
    extension, directory = directory_of(whole)
    places = [(extension + 8, 24), (directory, 32), (u64(whole, directory), 8)]
    changes = [
        Qcow2Image.dirty_bitmap,
        Qcow2Image.remove_bitmap,
        Qcow2Image.clear_bitmap,
        Qcow2Image.add_bitmap,
    ]
    for number in range(10):
        content = bytearray(whole)
        for _ in range(chance.choice([1, 2, 4])):
            start, length = chance.choice(places)
            at = start + chance.randrange(length)
            if chance.random() < 0.7:
                content[at] ^= 1 << chance.randrange(8)
            else:
                cluster = chance.randrange(len(content) // (64 * KIB) + 2)
                struct.pack_into(">Q", content, at & ~7, cluster * 64 * KIB)
        path = tmp_path / f"mutated-{number}"
        path.write_bytes(content)
        sound = faults(path)[1] == 0
        model = bytearray(b"\5" * MIB + bytes(SIZE - MIB))
        disk = await open_bytes(tmp_path, bytes(content))
        image = disk.image
        assert isinstance(image, Qcow2Image)
        for _ in range(5):
            offset = chance.randrange(2 * MIB)
            with suppress(ImageError, ConfigError):
                if chance.random() < 0.5:
                    await image.write(offset, b"z" * 9000)
                    model[offset : offset + 9000] = b"z" * 9000
                else:
                    await chance.choice(changes)(image, "b")
        if sound:
            assert await image.read(0, SIZE) == model
            await image.close()
            async with opened(disk.saved(), read_only=True) as again:
                assert await again.read(0, SIZE) == model
            continue
        with suppress(ImageError):
            await image.close()
