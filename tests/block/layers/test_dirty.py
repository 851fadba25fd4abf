"""A bitmap misses no change, and describes ranges as they are asked for."""

import random
from itertools import pairwise

import pytest

from nbdserve.block.dirty_bitmap import DEFAULT_GRANULARITY_BITS, DirtyBitmap
from nbdserve.block.layers.dirty import DirtyTracking
from tests.server.memory_disk import MemoryDisk

TIB = 1 << 40
GRANULE = 1 << DEFAULT_GRANULARITY_BITS


def test_runs_are_cut_to_the_range_and_to_their_number() -> None:
    bitmap = DirtyBitmap("b", TIB)
    assert bitmap.runs(0, TIB, max_runs=9) == [(TIB, False)]
    bitmap.mark(GRANULE + 5, 1)
    bitmap.mark(512 * GRANULE * 4096, 2 * GRANULE)
    bitmap.mark(77, 0)
    assert bitmap.runs(0, 4 * GRANULE, max_runs=9) == [
        (GRANULE, False),
        (GRANULE, True),
        (2 * GRANULE, False),
    ]
    assert bitmap.runs(GRANULE + 100, 200, max_runs=9) == [(200, True)]
    whole = bitmap.runs(0, TIB, max_runs=9)
    assert [dirty for _, dirty in whole] == [False, True, False, True, False]
    assert sum(length for length, _ in whole) == TIB
    assert bitmap.runs(0, TIB, max_runs=2) == whole[:2]


@pytest.mark.parametrize("seed", range(5))
def test_random_marks(seed: int) -> None:
    size = 10_000 * GRANULE + 123
    bitmap, chance = DirtyBitmap("b", size), random.Random(seed)
    model = bytearray(10_001)
    for _ in range(20):
        offset = chance.randrange(size)
        length = min(chance.choice([1, GRANULE, 700 * GRANULE]), size - offset)
        bitmap.mark(offset, length)
        first, last = offset // GRANULE, (offset + length - 1) // GRANULE
        model[first : last + 1] = b"\1" * (last + 1 - first)
    for _ in range(20):
        offset = chance.randrange(size)
        length = chance.randrange(1, size - offset + 1)
        runs = bitmap.runs(offset, length, max_runs=1 << 20)
        assert sum(run for run, _ in runs) == length
        assert all(a[1] != b[1] for a, b in pairwise(runs))
        for run, dirty in runs:
            first, last = offset // GRANULE, (offset + run - 1) // GRANULE
            assert model[first : last + 1] == bytes([dirty]) * (last + 1 - first)
            offset += run


async def test_every_change_is_marked_and_nothing_else() -> None:
    disk = MemoryDisk(64 * GRANULE)
    tracking = DirtyTracking(disk, ["one", "two"])
    await tracking.write(0, b"x", fua=True)
    await tracking.write_zeroes(2 * GRANULE, 10, may_unmap=False)
    await tracking.trim(4 * GRANULE, GRANULE)
    await tracking.read(6 * GRANULE, 10)
    await tracking.cache(8 * GRANULE, 10)
    await tracking.flush()
    await tracking.block_status(10 * GRANULE, 10)
    for bitmap in tracking.bitmaps:
        runs = bitmap.runs(0, tracking.size, max_runs=99)
        assert [run // GRANULE for run, _ in runs] == [1, 1, 1, 1, 1, 59]
    assert disk.calls[:2] == [
        ("write", 0, 1, True),
        ("write_zeroes", 2 * GRANULE, 10, False, False, False),
    ]
    await tracking.close()
    assert disk.closed


async def test_a_change_that_fails_is_marked_too() -> None:
    disk = MemoryDisk(4 * GRANULE)
    disk.failure = OSError("full")
    tracking = DirtyTracking(disk, ["b"])
    with pytest.raises(OSError, match="full"):
        await tracking.write(GRANULE, b"x")
    assert tracking.bitmaps[0].runs(GRANULE, 1, max_runs=1) == [(1, True)]
