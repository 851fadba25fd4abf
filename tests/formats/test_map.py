"""The map of a disk: entries joined, fields as in qemu-img, a table for people."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from nbdserve.block.device import BlockDevice, Hole
from nbdserve.block.extents import Extent
from nbdserve.formats import map as module
from nbdserve.formats.map import MapEntry, as_text, map_entries
from nbdserve.formats.open import open_image
from tests.helpers.tools import run

DATA = Extent(4096, data=True, zero=False, offset=65536)
HOLE = Extent(4096, data=False, zero=True, present=False)


class Listed(BlockDevice):
    """A disk that consists of given extents and answers only `block_status`."""

    read_only = True
    preferred_block = 4096
    can_trim = can_fast_zero = False

    def __init__(self, extents: list[Extent]) -> None:
        self.extents = extents
        self.size = sum(extent.length for extent in extents)

    async def block_status(
        self, offset: int, length: int, *, max_extents: int = 1 << 20
    ) -> list[Extent]:
        found: list[Extent] = []
        position = 0
        for extent in self.extents:
            start = max(position, offset)
            end = min(position + extent.length, offset + length)
            if start < end and len(found) < max_extents:
                host = extent.offset
                if host is not None:
                    host += start - position
                found.append(extent._replace(length=end - start, offset=host))
            position += extent.length
        return found

    async def read_into(self, offset: int, buffer: memoryview) -> Sequence[Hole]:
        raise AssertionError("a map reads no data")

    async def write(self, *_: object, **__: object) -> None:
        raise AssertionError("a map writes nothing")

    async def write_zeroes(self, *_: object, **__: object) -> None:
        raise AssertionError("a map writes nothing")

    async def trim(self, *_: object, **__: object) -> None:
        raise AssertionError("a map writes nothing")

    async def flush(self) -> None:
        raise AssertionError("a map writes nothing")

    async def close(self) -> None:
        raise AssertionError("the caller closes")


async def mapped(extents: list[Extent]) -> list[MapEntry]:
    return [entry async for entry in map_entries(Listed(extents))]


@pytest.mark.parametrize("window", [1 << 40, 4096, 1000])
@pytest.mark.parametrize("max_extents", [1 << 14, 1])
async def test_neighbours_are_joined(
    monkeypatch: pytest.MonkeyPatch, window: int, max_extents: int
) -> None:
    monkeypatch.setattr(module, "_WINDOW", window)
    monkeypatch.setattr(module, "_MAX_EXTENTS", max_extents)
    compressed = Extent(8192, data=True, zero=False, compressed=True)
    entries = await mapped(
        [
            DATA,
            DATA._replace(offset=69632),
            DATA._replace(offset=0),
            HOLE,
            HOLE,
            HOLE._replace(depth=1),
            compressed,
        ]
    )
    assert [(e.start, e.extent.length, e.extent.offset) for e in entries] == [
        (0, 8192, 65536),
        (8192, 4096, 0),
        (12288, 8192, None),
        (20480, 4096, None),
        (24576, 8192, None),
    ]
    assert [e.extent.depth for e in entries] == [0, 0, 0, 1, 0]


async def test_empty_disk() -> None:
    assert await mapped([]) == []


def test_json_has_the_fields_of_qemu() -> None:
    assert MapEntry(512, DATA).as_json() == {
        "start": 512,
        "length": 4096,
        "depth": 0,
        "present": True,
        "zero": False,
        "data": True,
        "compressed": False,
        "offset": 65536,
    }
    assert "offset" not in MapEntry(0, HOLE).as_json()


def test_table_lists_data_with_its_file() -> None:
    entries = [
        MapEntry(0, DATA),
        MapEntry(4096, HOLE),
        MapEntry(8192, DATA._replace(depth=1, offset=0)),
        MapEntry(12288, Extent(4096, data=True, zero=False, compressed=True)),
    ]
    lines = as_text(entries, ["disk.qcow2", "base.raw"]).splitlines()
    assert [line.split() for line in lines] == [
        ["Offset", "Length", "Mapped", "to", "File"],
        ["0x0", "0x1000", "0x10000", "disk.qcow2"],
        ["0x2000", "0x1000", "0x0", "base.raw"],
        ["0x3000", "0x1000", "compressed", "disk.qcow2"],
    ]


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("raw", ""),
        ("qcow", ""),
        ("qcow2", "cluster_size=512"),
        ("qcow2", "cluster_size=64k,compat=0.10"),
        ("qcow2", "cluster_size=64k,preallocation=falloc"),
        ("qcow2", "cluster_size=2M,refcount_bits=1"),
        ("qcow2", "backing"),
    ],
)
async def test_same_as_qemu(tmp_path: Path, image_format: str, options: str) -> None:
    path = tmp_path / "disk"
    chosen = ["-o", options] if options else []
    if options == "backing":
        base = tmp_path / "base"
        run("qemu-img", "create", "-q", "-f", "qcow2", base, "32M")
        run("qemu-io", "-f", "qcow2", "-c", "write 10M 12M", base)
        chosen = ["-b", "base", "-F", "qcow2"]
    run("qemu-img", "create", "-q", "-f", image_format, *chosen, path, "32M")
    commands = ["write -P 1 2M 2M", "write -P 2 8M 6M"]
    if image_format == "qcow2":
        commands += ["write -c 20M 64k" if "2M" not in options else "write 20M 2M"]
        if "0.10" not in options and "prealloc" not in options:
            commands += ["write -z 24M 2M"]
    if "prealloc" in options:
        commands.pop()
    words = [word for command in commands for word in ("-c", command)]
    run("qemu-io", "-f", image_format, *words, path)
    shown = json.loads(
        run("qemu-img", "map", "--output=json", "-f", image_format, path)
    )
    async with open_image(path, format=image_format, read_only=True) as image:
        entries = [entry.as_json() async for entry in map_entries(image)]
    for entry in entries:
        entry.pop("compressed")  # not in qemu-img 7.2
    assert entries == shown
