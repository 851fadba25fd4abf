"""What clients are told about a disk."""

import pytest

from nbdserve.block.extents import Extent
from nbdserve.errors import ConfigError
from nbdserve.exports.contexts import MAX_EXTENTS, base_allocation
from nbdserve.exports.export import Export
from nbdserve.exports.registry import Registry
from nbdserve.wire.constants import State, TransmissionFlag
from tests.server.memory_disk import MemoryDisk

F = TransmissionFlag
ALWAYS = F.HAS_FLAGS | F.SEND_FLUSH | F.SEND_FUA | F.SEND_CACHE | F.CAN_MULTI_CONN


def test_flags_are_advertised_only_where_they_are_true() -> None:
    disk = MemoryDisk(1000)
    changing = F.SEND_TRIM | F.SEND_WRITE_ZEROES | F.SEND_FAST_ZERO
    assert Export("x", disk).transmission_flags() == ALWAYS | changing
    disk.can_trim = disk.can_fast_zero = False
    assert Export("x", disk).transmission_flags() == ALWAYS | F.SEND_WRITE_ZEROES
    disk.read_only = disk.can_trim = True
    assert Export("x", disk).transmission_flags() == ALWAYS | F.READ_ONLY


@pytest.mark.parametrize(
    ("preferred", "told"), [(1, 512), (65536, 65536), (64 << 20, 2 << 20)]
)
def test_sizes(preferred: int, told: int) -> None:
    disk = MemoryDisk(1000)
    disk.preferred_block = preferred
    info = Export("x", disk, "text").info()
    assert (info.size, info.description) == (1000, "text")
    assert (info.minimum_block, info.preferred_block) == (1, told)
    assert info.maximum_payload == 64 << 20


def test_names_match_exactly_and_the_only_export_is_the_default() -> None:
    registry = Registry()
    first = Export("/sda", MemoryDisk(512))
    registry.add(first)
    assert registry.find("/sda") is registry.find("") is first
    assert registry.find("sda") is None
    registry.add(Export("/sdb", MemoryDisk(512)))
    assert registry.find("") is None
    unnamed = Export("", MemoryDisk(512))
    registry.add(unnamed)
    assert registry.find("") is unnamed
    assert [export.name for export in registry] == ["/sda", "/sdb", ""]
    assert len(registry) == 3
    with pytest.raises(ConfigError, match="two exports named '/sda'"):
        registry.add(Export("/sda", MemoryDisk(512)))


async def test_base_allocation_merges_and_never_leaves_the_request() -> None:
    disk = MemoryDisk(1 << 20)
    disk.extents = [
        Extent(100, data=True, zero=False),
        Extent(200, data=True, zero=False, depth=1),
        Extent(300, data=False, zero=True),
        Extent(400, data=True, zero=True),
        Extent(500, data=False, zero=False),
    ]
    hole, zero = int(State.HOLE), int(State.ZERO)
    whole = [(300, 0), (300, hole | zero), (400, zero), (500, hole)]
    assert await base_allocation(disk, 0, 1500) == whole
    assert await base_allocation(disk, 0, 601) == [*whole[:2], (1, zero)]
    assert await base_allocation(disk, 0, 1500, only_one=True) == [(300, 0)]
    assert await base_allocation(disk, 0, 50, only_one=True) == [(50, 0)]


async def test_the_number_of_extents_is_bounded() -> None:
    disk = MemoryDisk(512)
    disk.extents = [
        Extent(512, data=bool(number % 2), zero=False)
        for number in range(MAX_EXTENTS + 10)
    ]
    assert len(await base_allocation(disk, 0, 1 << 30)) == MAX_EXTENTS
