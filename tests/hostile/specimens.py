"""Valid images of every kind, made by qemu-img, and where their fields and tables are."""

import random
import struct
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from tests.helpers.encrypted import patiently
from tests.helpers.tools import run

KIB = 1 << 10
SIZE = 300 * KIB + 512
OFFSET = 0x00FF_FFFF_FFFF_FE00
BACKING = "backing.raw"
DATA_FILE = "guest.data"
#: More of each table than anything looks at would only thin out the mutations.
_MOST_WORDS = 24


class Place(NamedTuple):
    """A number in an image: what it is, where, and how many bytes it has."""

    name: str
    offset: int
    width: int


class Specimen(NamedTuple):
    """An image to be mutated.

    Attributes:
        content: The file.
        places: What is worth setting to something else.
        words: Values that mean something in this image: offsets and entries.
        fmt: qcow or qcow2.
    """

    content: bytes
    places: list[Place]
    words: list[int]
    fmt: str


def _content() -> bytes:
    generator = random.Random(7)
    pieces = [
        generator.randbytes(40 * KIB),
        bytes(30 * KIB),
        generator.randbytes(16) * (4 * KIB),
        bytes(60 * KIB),
        generator.randbytes(50 * KIB),
    ]
    return b"".join(pieces).ljust(SIZE, b"\0")[:SIZE]


def _convert(folder: Path, fmt: str, options: str, *more: str) -> Path:
    raw, path = folder / "content.raw", folder / "image"
    raw.write_bytes(_content())
    argv = ["qemu-img", "convert", "-q", "-f", "raw", "-O", fmt, *more]
    if options:
        argv += ["-o", options]
    # qemu-img 7.2 writes a compressed qcow image well, and then exits 1 in silence
    run(*argv, raw, path, expect=[0, 1] if fmt == "qcow" and more else [0])
    return path


def _overlay(folder: Path, fmt: str, options: str = "") -> Path:
    path = folder / "image"
    (folder / BACKING).write_bytes(_content())
    argv = ["qemu-img", "create", "-q", "-f", fmt, "-b", BACKING, "-F", "raw"]
    if options:
        argv += ["-o", options]
    run("env", "-C", folder, *argv, path, str(SIZE))
    commands = ["write -P 5 1k 5k", "write -P 6 100k 70k"]
    run("qemu-io", "-f", fmt, *(w for c in commands for w in ("-c", c)), path)
    return path


def _snapshots(folder: Path, options: str) -> Path:
    path = _convert(folder, "qcow2", options)
    run("qemu-img", "snapshot", "-c", "one", path)
    run("qemu-io", "-c", "write -P 9 10k 20k", path)
    run("qemu-img", "snapshot", "-c", "two", path)
    run("qemu-io", "-c", "write -P 8 0 4k", path)
    return path


def _bitmaps(folder: Path) -> Path:
    path = _convert(folder, "qcow2", "cluster_size=4k")
    run("qemu-img", "bitmap", "--add", "-g", "512", path, "fine")
    run("qemu-img", "bitmap", "--add", "--disable", path, "coarse")
    run("qemu-io", "-c", "write -P 9 10k 20k", path)
    return path


def _data_file(folder: Path) -> Path:
    options = f"cluster_size=4k,data_file={DATA_FILE}"
    path, here = folder / "image", ["env", "-C", str(folder)]
    run(
        *here, "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(SIZE)
    )
    run(*here, "qemu-io", "-f", "qcow2", "-c", "write -P 3 10k 50k", path)
    return path


def _luks(folder: Path) -> Path:
    """With a header that is there, and a secret that nobody gives us."""
    path, secret = folder / "image", folder / "secret"
    secret.write_bytes(b"pass")
    argv = ["qemu-img", "create", "-q", "-f", "qcow2"]
    argv += ["--object", f"secret,id=s,file={secret}"]
    options = "cluster_size=4k,encrypt.format=luks,encrypt.key-secret=s"
    patiently(*argv, "-o", f"{options},encrypt.iter-time=10", path, str(SIZE))
    return path


_MAKERS: dict[str, Callable[[Path], Path]] = {
    "v1": lambda folder: _convert(folder, "qcow", ""),
    "v1 compressed": lambda folder: _convert(folder, "qcow", "", "-c"),
    "v1 overlay": lambda folder: _overlay(folder, "qcow"),
    "v2": lambda folder: _convert(folder, "qcow2", "compat=0.10,cluster_size=4k"),
    "v2 snapshots": lambda folder: _snapshots(folder, "compat=0.10,cluster_size=4k"),
    "v3": lambda folder: _convert(folder, "qcow2", ""),
    "v3 512": lambda folder: _convert(folder, "qcow2", "cluster_size=512"),
    "v3 2M": lambda folder: _convert(folder, "qcow2", "cluster_size=2M"),
    "v3 refcount 1": lambda folder: _convert(
        folder, "qcow2", "cluster_size=4k,refcount_bits=1"
    ),
    "v3 refcount 64": lambda folder: _convert(
        folder, "qcow2", "cluster_size=4k,refcount_bits=64"
    ),
    "v3 lazy": lambda folder: _convert(
        folder, "qcow2", "cluster_size=4k,lazy_refcounts=on"
    ),
    "v3 zlib": lambda folder: _convert(folder, "qcow2", "cluster_size=4k", "-c"),
    "v3 zstd": lambda folder: _convert(
        folder, "qcow2", "cluster_size=4k,compression_type=zstd", "-c"
    ),
    "v3 snapshots": lambda folder: _snapshots(folder, "cluster_size=4k"),
    "v3 overlay": lambda folder: _overlay(folder, "qcow2", "cluster_size=4k"),
    "v3 bitmaps": _bitmaps,
    "v3 subclusters": lambda folder: _convert(
        folder, "qcow2", "cluster_size=16k,extended_l2=on"
    ),
    "v3 data file": _data_file,
    "v3 luks": _luks,
}
NAMES = list(_MAKERS)


@cache
def specimen(name: str) -> Specimen:
    """Return the image with that name of `NAMES`."""
    with TemporaryDirectory() as folder:
        content = _MAKERS[name](Path(folder)).read_bytes()
    if name.startswith("v1"):
        places = list(_places_of_v1(content))
        fmt = "qcow"
    else:
        places = list(_places_of_v2(content))
        fmt = "qcow2"
    words = {
        int.from_bytes(content[place.offset : place.offset + place.width], "big")
        for place in places
        if place.width == 8
    }
    return Specimen(content, places, sorted(words), fmt)


def neighbours(folder: Path) -> None:
    """Put the files that images refer to into a folder."""
    (folder / BACKING).write_bytes(_content())
    (folder / DATA_FILE).write_bytes(_content())


def _number(content: bytes, offset: int, width: int) -> int:
    return int.from_bytes(content[offset : offset + width], "big")


def _table(
    content: bytes, name: str, offset: int, count: int, width: int = 8
) -> Iterator[Place]:
    for index in range(min(count, _MOST_WORDS)):
        if offset + (index + 1) * width <= len(content):
            yield Place(f"{name} {index}", offset + index * width, width)


def _named(content: bytes, l1_offset: int, entries: int, mask: int) -> Iterator[int]:
    """Yield where the first L2 tables are."""
    words = [_number(content, l1_offset + 8 * at, 8) & mask for at in range(entries)]
    yield from [word for word in words if word][:3]


_V1_HEADER = [
    ("magic", 0, 4),
    ("version", 4, 4),
    ("backing offset", 8, 8),
    ("backing length", 16, 4),
    ("mtime", 20, 4),
    ("size", 24, 8),
    ("cluster_bits", 32, 1),
    ("l2_bits", 33, 1),
    ("crypt", 36, 4),
    ("l1 offset", 40, 8),
]
_V2_HEADER = [
    ("magic", 0, 4),
    ("version", 4, 4),
    ("backing offset", 8, 8),
    ("backing length", 16, 4),
    ("cluster_bits", 20, 4),
    ("size", 24, 8),
    ("crypt", 32, 4),
    ("l1 size", 36, 4),
    ("l1 offset", 40, 8),
    ("refcount table offset", 48, 8),
    ("refcount table clusters", 56, 4),
    ("snapshots", 60, 4),
    ("snapshots offset", 64, 8),
]
_V3_HEADER = [
    ("incompatible", 72, 8),
    ("compatible", 80, 8),
    ("autoclear", 88, 8),
    ("refcount order", 96, 4),
    ("header length", 100, 4),
    ("compression", 104, 1),
]


def _places_of_v1(content: bytes) -> Iterator[Place]:
    for field in _V1_HEADER:
        yield Place(*field)
    l1_offset = _number(content, 40, 8)
    cluster_bits, l2_bits = content[32], content[33]
    entries = -(-_number(content, 24, 8) >> (cluster_bits + l2_bits))
    yield from _table(content, "L1", l1_offset, entries)
    for l2_offset in _named(content, l1_offset, entries, (1 << 63) - 1):
        yield from _table(content, "L2", l2_offset, 1 << l2_bits)


def _places_of_v2(content: bytes) -> Iterator[Place]:
    for field in _V2_HEADER:
        yield Place(*field)
    cluster = 1 << _number(content, 20, 4)
    if content[7] >= 3:
        for field in _V3_HEADER:
            yield Place(*field)
        yield from _extensions(content)
    l1_offset, l1_size = _number(content, 40, 8), _number(content, 36, 4)
    yield from _table(content, "L1", l1_offset, l1_size)
    for l2_offset in _named(content, l1_offset, l1_size, OFFSET):
        yield from _table(content, "L2", l2_offset, cluster // 8)
    refcounts = _number(content, 48, 8)
    yield from _table(content, "refcount table", refcounts, 8)
    block = _number(content, refcounts, 8)
    yield from _table(content, "refcount block", block, cluster // 2, 2)
    yield from _snapshot_table(content)


def _extensions(content: bytes) -> Iterator[Place]:
    offset = _number(content, 100, 4)
    for _ in range(10):
        kind, length = struct.unpack_from(">II", content, offset)
        yield Place("extension type", offset, 4)
        yield Place("extension length", offset + 4, 4)
        yield from _table(content, "extension data", offset + 8, length // 8)
        if kind == 0x2385_2875 and length >= 24:
            size, directory = struct.unpack_from(">QQ", content, offset + 16)
            yield from _table(content, "bitmap directory", directory, size // 4, 4)
            table = _number(content, directory, 8)
            yield from _table(content, "bitmap table", table, 4)
        if kind == 0x0537_BE77 and length >= 16:
            yield from _luks_header(_number(content, offset + 8, 8))
        if not kind:
            return
        offset += 8 + -(-length // 8) * 8


def _luks_header(offset: int) -> Iterator[Place]:
    """Yield its numbers, and where its texts begin."""
    fields = [(0, 4), (4, 4), (8, 8), (40, 8), (72, 8), (104, 4), (108, 4), (164, 4)]
    for slot in range(208, 592, 48):
        fields += [(slot, 4), (slot + 4, 4), (slot + 40, 4), (slot + 44, 4)]
    for at, width in fields:
        yield Place(f"luks {at}", offset + at, width)


def _snapshot_table(content: bytes) -> Iterator[Place]:
    offset = _number(content, 64, 8)
    for _ in range(_number(content, 60, 4)):
        fields = [(0, 8), (8, 4), (12, 2), (14, 2), (16, 4), (28, 8), (36, 4), (40, 8)]
        for at, width in fields:
            yield Place(f"snapshot {at}", offset + at, width)
        l1_offset, l1_size = (
            _number(content, offset, 8),
            _number(content, offset + 8, 4),
        )
        yield from _table(content, "snapshot L1", l1_offset, l1_size)
        id_size, name_size = struct.unpack_from(">HH", content, offset + 12)
        length = 40 + _number(content, offset + 36, 4) + id_size + name_size
        offset += -(-length // 8) * 8
