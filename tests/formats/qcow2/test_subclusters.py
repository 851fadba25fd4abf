"""Extended L2 entries: what qemu makes is served, what we write qemu reads and finds clean."""

import json
import random
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from nbdserve.block.device import BlockDevice
from nbdserve.errors import ConfigError, ImageCorruptError, ImageError
from nbdserve.formats.amend import prepare_to_amend
from nbdserve.formats.check import check_image
from nbdserve.formats.commit_overlay import commit_overlay
from nbdserve.formats.create import create_image
from nbdserve.formats.map import map_entries
from nbdserve.formats.mapped import subclusters
from nbdserve.formats.mapped.entries import (
    BAD,
    COMPRESSED,
    NORMAL,
    SPLIT,
    SPLIT_UNPLACED,
    UNALLOCATED,
    ZERO,
    ZERO_ALLOCATED,
)
from nbdserve.formats.open import open_image
from nbdserve.formats.qcow2.amend import Amendment
from nbdserve.formats.qcow2.entries import ExtendedEntries
from nbdserve.formats.qcow2.image import Qcow2Image
from nbdserve.formats.rebase import rebase
from nbdserve.formats.repair import repair_image
from tests.helpers.tools import run

KIB = 1 << 10
MIB = 1 << 20
CLUSTER = 64 * KIB
SUB = 2 * KIB
OFFSET = 0x00FF_FFFF_FFFF_FE00
EXTENDED = "extended_l2=on"


def made(
    folder: Path, *, size: int = MIB, options: str = EXTENDED, base: bytes | None = None
) -> Path:
    """Make an image with qemu-img, over a raw file if `base` is given."""
    path = folder / "disk.qcow2"
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options]
    if base is not None:
        (folder / "base.raw").write_bytes(base)
        argv += ["-b", "base.raw", "-F", "raw"]
    run(*argv, path, str(size))
    return path


def entry_offset(content: bytes | bytearray, guest_offset: int) -> int:
    """Return where in an image with clusters of 64 KiB an extended L2 entry is."""
    l1 = struct.unpack_from(">Q", content, 40)[0]
    covered = CLUSTER * (CLUSTER // 16)
    table = struct.unpack_from(">Q", content, l1 + 8 * (guest_offset // covered))[0]
    offset: int = (table & OFFSET) + guest_offset % covered // CLUSTER * 16
    return offset


def entry_of(path: Path, guest_offset: int) -> tuple[int, int]:
    """Return word and bitmap of a guest offset."""
    content = path.read_bytes()
    at = entry_offset(content, guest_offset)
    word, bitmap = struct.unpack_from(">QQ", content, at)
    return word, bitmap


def set_entry(path: Path, guest_offset: int, word: int, bitmap: int) -> None:
    """Replace word and bitmap of a guest offset."""
    content = bytearray(path.read_bytes())
    struct.pack_into(">QQ", content, entry_offset(content, guest_offset), word, bitmap)
    path.write_bytes(content)


def agrees(path: Path, content: bytes | bytearray) -> None:
    """qemu-img and our own check find nothing, and qemu-img reads this content."""
    run("qemu-img", "check", path)
    result = check_image(path)
    assert result is not None
    assert not result.corruptions + result.leaks + result.check_errors
    mirror = path.with_suffix(".mirror")
    mirror.write_bytes(content)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, mirror)


def put(content: bytearray, offset: int, data: bytes) -> bytes:
    """Put data into the content, and return it."""
    content[offset : offset + len(data)] = data
    return data


# -- the bitmap itself


def test_runs_of_a_mask() -> None:
    assert list(subclusters.runs(0)) == []
    assert list(subclusters.runs(subclusters.ALL)) == [(0, 32)]
    assert list(subclusters.runs(0b1)) == [(0, 1)]
    assert list(subclusters.runs(1 << 31 | 0b0110_1110)) == [(1, 4), (5, 7), (31, 32)]
    generator = random.Random(1)
    for _ in range(200):
        mask = generator.getrandbits(32) & generator.getrandbits(32)
        found = [n for first, end in subclusters.runs(mask) for n in range(first, end)]
        assert found == [n for n in range(32) if mask >> n & 1]


@pytest.mark.parametrize(
    ("within", "length", "mask"),
    [
        (0, 1, 1),
        (SUB - 1, 2, 0b11),
        (SUB, SUB, 0b10),
        (0, CLUSTER, subclusters.ALL),
        (CLUSTER - 1, 1, 1 << 31),
        (CLUSTER - 1, 5 * CLUSTER, 1 << 31),
    ],
)
def test_subclusters_that_a_range_meets(within: int, length: int, mask: int) -> None:
    assert subclusters.touched(within, length, 16) == mask


def test_alike_subclusters() -> None:
    bitmap = 0b1100 << 32 | 0b0011
    assert subclusters.alike(bitmap, 0) == (1, 0, 2)
    assert subclusters.alike(bitmap, 1) == (1, 0, 1)
    assert subclusters.alike(bitmap, 2) == (0, 1, 2)
    assert subclusters.alike(bitmap, 4) == (0, 0, 28)
    assert subclusters.alike(subclusters.ALL, 5) == (1, 0, 27)


PLACE = 1 << 63 | 5 * CLUSTER
PACKED = 1 << 62 | 5 * CLUSTER


@pytest.mark.parametrize(
    ("word", "bitmap", "kind"),
    [
        (0, 0, UNALLOCATED),
        (0, subclusters.ALL_ZERO, ZERO),
        (0, 1 << 40, SPLIT_UNPLACED),
        (0, 1, BAD),
        (PLACE, subclusters.ALL, NORMAL),
        (PLACE, subclusters.ALL_ZERO, ZERO_ALLOCATED),
        (PLACE, 0, SPLIT),
        (PLACE, 1 << 40 | 1, SPLIT),
        (PLACE, 1 << 32 | 1, BAD),
        (PLACE | 1, subclusters.ALL, BAD),
        (PLACE | 1 << 56, subclusters.ALL, BAD),
        (PLACE | 512, subclusters.ALL, BAD),
        (1 << 63, 0, BAD),
        (PACKED, 0, COMPRESSED),
        (PACKED, 1, BAD),
        (PACKED | 1 << 63, 0, BAD),
    ],
)
def test_kinds(word: int, bitmap: int, kind: int) -> None:
    assert ExtendedEntries(3, 16).classify(word, bitmap) == kind


# -- reading, writing, zeroing


async def test_a_small_write_copies_only_what_it_meets(tmp_path: Path) -> None:
    base = random.Random(1).randbytes(MIB)
    path = made(tmp_path, base=base)
    content = bytearray(base)
    async with open_image(path) as image:
        assert image.preferred_block == 4096
        # in the middle of subclusters 1 and 2 of cluster 2
        await image.write(
            2 * CLUSTER + 3000, put(content, 2 * CLUSTER + 3000, b"new" * 500)
        )
        # exactly subcluster 4
        await image.write(
            2 * CLUSTER + 4 * SUB, put(content, 2 * CLUSTER + 4 * SUB, b"x" * SUB)
        )
        assert await image.read(0, MIB) == content
    word, bitmap = entry_of(path, 2 * CLUSTER)
    assert bitmap == 0b10110
    host_offset = word & OFFSET
    place = path.read_bytes()[host_offset : host_offset + CLUSTER].ljust(CLUSTER, b"\0")
    assert not any(place[:SUB])
    assert place[SUB : 3 * SUB] == content[2 * CLUSTER + SUB :][: 2 * SUB]
    assert not any(place[5 * SUB :])
    agrees(path, content)


async def test_where_only_zeros_show_a_cluster_is_taken_whole(tmp_path: Path) -> None:
    """As fast as without subclusters: the next write finds it its own."""
    path = made(tmp_path, base=b"b" * CLUSTER)
    content = bytearray(b"b" * CLUSTER + bytes(MIB - CLUSTER))
    async with open_image(path) as image:
        await image.write(CLUSTER + 512, put(content, CLUSTER + 512, b"data" * 128))
    assert entry_of(path, CLUSTER)[1] == subclusters.ALL
    agrees(path, content)


async def test_zeroes_and_trims_of_single_subclusters(tmp_path: Path) -> None:
    base = random.Random(2).randbytes(MIB)
    path = made(tmp_path, base=base)
    content = bytearray(base)
    async with open_image(path) as image:
        # in the backing file's: no host cluster is needed
        await image.write_zeroes(3 * SUB, 2 * SUB)
        put(content, 3 * SUB, bytes(2 * SUB))
        # a whole cluster of data, of which some goes
        await image.write(CLUSTER, put(content, CLUSTER, b"d" * CLUSTER))
        await image.trim(CLUSTER + SUB + 7, 3 * SUB)
        put(content, CLUSTER + 2 * SUB, bytes(2 * SUB))
        # the last of what is there goes, and the cluster with it
        await image.write(2 * CLUSTER, put(content, 2 * CLUSTER, b"e" * SUB))
        await image.trim(2 * CLUSTER, SUB)
        put(content, 2 * CLUSTER, bytes(SUB))
        assert await image.read(0, MIB) == content
    assert entry_of(path, 0) == (0, 0b11000 << 32)
    word, bitmap = entry_of(path, CLUSTER)
    assert word & OFFSET
    assert bitmap == 0b1100 << 32 | subclusters.ALL & ~0b1100
    assert entry_of(path, 2 * CLUSTER) == (0, 1 << 32)
    agrees(path, content)


async def test_a_compressed_cluster_is_one_piece(tmp_path: Path) -> None:
    path = made(tmp_path, options=EXTENDED + ",compression_type=zstd")
    run("qemu-io", "-c", "write -c -P 9 0 192k", path)
    content = bytearray(b"\t" * 3 * CLUSTER + bytes(MIB - 3 * CLUSTER))
    async with open_image(path) as image:
        await image.trim(SUB, SUB)
        assert await image.read(0, MIB) == content
        await image.write_zeroes(CLUSTER + SUB, SUB)
        put(content, CLUSTER + SUB, bytes(SUB))
        await image.write(2 * CLUSTER + 5, put(content, 2 * CLUSTER + 5, b"five"))
        assert await image.read(0, MIB) == content
    assert entry_of(path, 0)[0] >> 62 == 1
    assert entry_of(path, CLUSTER)[1] == subclusters.ALL
    agrees(path, content)


@pytest.mark.parametrize("seed", range(4))
async def test_turns_with_qemu(tmp_path: Path, seed: int) -> None:
    """Each goes on where the other one stopped, and they see the same map."""
    generator = random.Random(seed)
    size = MIB + 3 * 512
    base = generator.randbytes(generator.choice([size, 700 * KIB + 512, 2 * MIB]))
    path = made(
        tmp_path,
        size=size,
        options=f"{EXTENDED},cluster_size={generator.choice(['16k', '64k', '256k'])}",
        base=base if seed else None,
    )
    content = bytearray(base[:size] if seed else b"").ljust(size, b"\0")
    for _ in range(3):
        async with open_image(path) as image:
            for _ in range(12):
                offset = generator.randrange(size)
                length = generator.choice([1, 512, 3000, SUB, 5 * SUB, 100_000])
                length = min(length, size - offset)
                if generator.random() < 0.6:
                    data = generator.randbytes(length)
                    await image.write(offset, put(content, offset, data))
                else:
                    await image.write_zeroes(offset, length)
                    put(content, offset, bytes(length))
            assert await image.read(0, size) == content
        agrees(path, content)
        for number in range(4):
            offset = generator.randrange(size // 512) * 512
            length = min(generator.choice([512, SUB, 40 * KIB]), size - offset)
            data, how = bytes([number + 1]) * length, f"-P {number + 1}"
            if number % 2:
                data, how = bytes(length), "-z -u"
            run("qemu-io", "-c", f"write {how} {offset} {length}", path)
            put(content, offset, data)
        agrees(path, content)
        assert await our_map(path) == qemu_map(path)


async def our_map(path: Path) -> list[tuple[object, ...]]:
    """Return what we know of each sector."""
    async with open_image(path, read_only=True) as image:
        return sectors([each.as_json() async for each in map_entries(image)])


def qemu_map(path: Path) -> list[tuple[object, ...]]:
    """Return what qemu-img knows of each sector."""
    return sectors(json.loads(run("qemu-img", "map", "--output=json", path)))


def sectors(found: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    """Return depth, presence, data, whether it is zeros and the place of each sector.

    Of data qemu-img says too whether they are a hole in the file.
    """
    return [
        (
            *(each[name] for name in ("depth", "present", "data")),
            each["zero"] and not each["data"],
            each["offset"] + at if "offset" in each else None,
        )
        for each in found
        for at in range(0, each["length"], 512)
    ]


async def test_a_preallocated_place_shows_the_backing_file(tmp_path: Path) -> None:
    base = random.Random(3).randbytes(MIB)
    path = made(tmp_path, base=base, options=EXTENDED + ",preallocation=metadata")
    content = bytearray(base)
    async with open_image(path) as image:
        assert await image.read(0, MIB) == content
        await image.write(100_001, put(content, 100_001, b"p" * 5000))
    word, bitmap = entry_of(path, CLUSTER)
    assert word & OFFSET
    assert 0 < bitmap < subclusters.ALL
    agrees(path, content)


# -- snapshots, sizes, other images


async def test_snapshots(tmp_path: Path) -> None:
    base = random.Random(4).randbytes(MIB)
    path = made(tmp_path, base=base)
    content = bytearray(base)
    async with open_image(path) as image:
        assert isinstance(image, Qcow2Image)
        await image.write(5000, put(content, 5000, b"1" * 3000))
        await image.write(CLUSTER, put(content, CLUSTER, b"2" * CLUSTER))
        await image.create_snapshot("one")
        before = bytes(content)
        # shared, in part and whole: copied, and what is not there stays away
        await image.write(9000, put(content, 9000, b"3" * 700))
        await image.write(CLUSTER + 1, put(content, CLUSTER + 1, b"4"))
        await image.write_zeroes(CLUSTER + SUB, SUB)
        put(content, CLUSTER + SUB, bytes(SUB))
        await image.create_snapshot("two")
        await image.write_zeroes(SUB, 4 * SUB)
        put(content, SUB, bytes(4 * SUB))
        assert await image.read(0, MIB) == content
        view = await image.at_snapshot("one")
        assert await view.read(0, MIB) == before
    assert entry_of(path, 0)[1] == 0b11110 << 32
    agrees(path, content)
    async with open_image(path) as image:
        assert isinstance(image, Qcow2Image)
        await image.delete_snapshot("two")
        await image.apply_snapshot("one")
        await image.write(5001, b"5")
    expected = bytearray(before)
    put(expected, 5001, b"5")
    agrees(path, expected)
    run("qemu-img", "snapshot", "-a", "one", path)
    agrees(path, before)


async def test_resize(tmp_path: Path) -> None:
    base = random.Random(5).randbytes(4 * MIB)
    path = made(tmp_path, base=base, size=MIB + 5 * 512)
    content = bytearray(base[: MIB + 5 * 512])
    async with open_image(path) as image:
        await image.write(MIB, put(content, MIB, b"tail" * 128))
        await image.resize(3 * MIB)
        # what the backing file has behind the old end must not come up
        content += bytes(3 * MIB - len(content))
        assert await image.read(0, image.size) == content
        await image.write(2 * MIB + 1, put(content, 2 * MIB + 1, b"w" * 9000))
        await image.resize(2 * MIB + 5000, shrink=True)
        del content[-(-(2 * MIB + 5000) // 512) * 512 :]
        # more than one L2 table maps
        await image.resize(600 * MIB)
        assert await image.read(0, len(content)) == content
        assert not any(await image.read(len(content), MIB))
    run("qemu-img", "resize", "-q", "--shrink", path, str(len(content)))
    agrees(path, content)


async def test_commit_and_rebase(tmp_path: Path) -> None:
    base = random.Random(6).randbytes(MIB)
    path = made(tmp_path, base=base)
    content = bytearray(base)
    run("qemu-io", "-c", "write -P 1 3k 512", "-c", "write -z 130k 2k", path)
    put(content, 3 * KIB, b"\1" * 512)
    put(content, 130 * KIB, bytes(SUB))
    other = bytearray(base)
    put(other, 300 * KIB, b"other" * 1000)
    (tmp_path / "other.raw").write_bytes(other)
    await rebase(path, "other.raw", "raw", progress=lambda _: None)
    agrees(path, content)
    # it has copied what differs, in pieces of 4 KiB
    copied = subclusters.touched(300 * KIB % CLUSTER, 8 * KIB, 16)
    assert entry_of(path, 300 * KIB)[1] == copied
    await commit_overlay(path, progress=lambda *_: None)
    assert (tmp_path / "other.raw").read_bytes() == content


async def test_amend_to_version_2_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path)
    before = path.read_bytes()
    with pytest.raises(ImageError, match="extended L2 entries"):
        await prepare_to_amend(path, Amendment(version=2))
    assert path.read_bytes() == before
    async with open_image(path) as image:
        assert isinstance(image, Qcow2Image)
        with pytest.raises(ImageError, match="extended L2 entries"):
            await image.prepare_version(2)


@pytest.mark.parametrize("cluster_size", [16 * KIB, CLUSTER, 2 * MIB])
async def test_create(tmp_path: Path, cluster_size: int) -> None:
    path = tmp_path / "new.qcow2"
    create_image(path, 200 * MIB, extended_l2=True, cluster_size=cluster_size)
    info = json.loads(run("qemu-img", "info", "--output=json", path))
    assert info["format-specific"]["data"]["extended-l2"] is True
    run("qemu-img", "check", path)
    async with open_image(path) as image:
        await image.write(199 * MIB, b"n" * 3000)
    run("qemu-io", "-c", f"read -P 110 {199 * MIB} 3000", path)
    run("qemu-img", "check", path)


def test_create_preallocated(tmp_path: Path) -> None:
    path = tmp_path / "new.qcow2"
    create_image(path, 40 * MIB, extended_l2=True, preallocation="falloc")
    agrees(path, bytes(40 * MIB))
    assert entry_of(path, 39 * MIB)[1] == subclusters.ALL


def test_what_can_not_have_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="extended L2 entries"):
        create_image(tmp_path / "new", MIB, extended_l2=True, cluster_size=8192)
    with pytest.raises(ConfigError, match="extended L2 entries"):
        create_image(tmp_path / "new", MIB, extended_l2=True, compat=2)
    with pytest.raises(ConfigError, match="qcow2 only"):
        create_image(tmp_path / "new", MIB, extended_l2=True, format="raw")


# -- entries that contradict themselves

BadEntry = tuple[Callable[[int], int], int]
BAD_ENTRIES: dict[str, BadEntry] = {
    "allocated and zero": (lambda word: word, 0b1_0000_0000 << 32 | subclusters.ALL),
    "allocated without a place": (lambda _: 0, 0b11),
    "zeros, and one without a place": (lambda _: 0, subclusters.ALL_ZERO | 1),
    "zero flag": (lambda word: word | 1, subclusters.ALL),
}


@pytest.mark.parametrize("name", BAD_ENTRIES)
async def test_bad_entries_are_found_and_repaired(tmp_path: Path, name: str) -> None:
    path = made(tmp_path)
    run("qemu-io", "-c", "write -P 7 0 192k", path)
    change, bitmap = BAD_ENTRIES[name]
    set_entry(path, CLUSTER, change(entry_of(path, CLUSTER)[0]), bitmap)
    content = bytearray(b"\7" * 3 * CLUSTER + bytes(MIB - 3 * CLUSTER))
    async with open_image(path, read_only=True) as image:
        assert await image.read(0, CLUSTER) == content[:CLUSTER]
        with pytest.raises(ImageCorruptError, match="L2 entry"):
            await image.read(CLUSTER, 512)
        with pytest.raises(ImageCorruptError, match="L2 entry"):
            await image.block_status(0, MIB)
    result = check_image(path)
    assert result is not None
    assert result.corruptions == 1
    if name != "zero flag":
        # which qemu-img check overlooks
        run("qemu-img", "check", path, expect=[2])
    lost: list[str] = []

    def agree(losses: list[str]) -> bool:
        lost.extend(losses)
        return True

    repair_image(path, everything=True, agree=agree)
    if "place" in name:
        # qemu-img's repair leaves such an image as it is
        assert any("no place" in each for each in lost)
        put(content, CLUSTER, bytes(CLUSTER))
    else:
        assert not lost
    agrees(path, content)


async def test_a_compressed_cluster_has_no_bitmap(tmp_path: Path) -> None:
    path = made(tmp_path)
    run("qemu-io", "-c", "write -c -P 7 0 64k", path)
    set_entry(path, 0, entry_of(path, 0)[0], 1 << 40)
    async with open_image(path, read_only=True) as image:
        with pytest.raises(ImageCorruptError, match="L2 entry"):
            await image.read(0, 512)
    run("qemu-img", "check", path, expect=[2])
    repair_image(path, everything=True, agree=lambda _: False)
    agrees(path, b"\7" * CLUSTER + bytes(MIB - CLUSTER))


CHANGES: dict[str, Callable[[BlockDevice], Awaitable[None]]] = {
    "write": lambda image: image.write(5, b"new"),
    "zero": lambda image: image.write_zeroes(0, SUB),
    "trim": lambda image: image.trim(SUB, SUB),
}


async def test_writing_to_a_bad_entry_changes_nothing(tmp_path: Path) -> None:
    path = made(tmp_path)
    run("qemu-io", "-c", "write -P 7 0 64k", path)
    bad = entry_of(path, 0)[0], 1 << 32 | subclusters.ALL
    set_entry(path, 0, *bad)
    for name, work in CHANGES.items():
        async with open_image(path) as image:
            with pytest.raises(ImageCorruptError):
                await work(image)
        assert entry_of(path, 0) == bad, name
        # found while writing: it is marked, and the mark is taken off for the next round
        content = bytearray(path.read_bytes())
        content[79] &= ~2
        path.write_bytes(content)
