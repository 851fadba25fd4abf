"""The map of a disk: entries joined, fields as in qemu-img, a table for people."""

from collections.abc import Sequence

import pytest

from nbdserve.block.device import BlockDevice, Hole
from nbdserve.block.extents import Extent
from nbdserve.formats import map as module
from nbdserve.formats.map import MapEntry, as_text, map_entries

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
