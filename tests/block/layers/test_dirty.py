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


def test_pages_of_ones_are_pages_like_others() -> None:
    size = 3 * 4096 * 8 * 512 + 1000
    bitmap = DirtyBitmap("b", size, granularity_bits=9)
    ones = b"\xff" * bitmap.page_bytes
    for number in range(4):
        bitmap.merge_page(number, ones)
    assert list(bitmap.dirty()) == [(0, size)]
    bitmap.mark(5, 5)
    copy = bitmap.copy()
    bitmap.resize(4096 * 8 * 512 + 512 * 9)
    assert list(bitmap.dirty()) == [(0, bitmap.size)]
    assert bitmap.page(1) == b"\xff\1" + bytes(bitmap.page_bytes - 2)
    assert bitmap.page(0) == ones
    assert list(copy.dirty()) == [(0, size)]
    bitmap.resize(size)
    assert list(bitmap.dirty()) == [(0, 4096 * 8 * 512 + 512 * 9)]


@pytest.mark.parametrize("seed", range(5))
def test_merging_and_resizing(seed: int) -> None:
    """Whatever the granularities: a set of bytes is the model."""
    chance = random.Random(seed)
    size, bits = 1 << 20, chance.choice([9, 12, 16])
    one = DirtyBitmap("one", size, granularity_bits=bits, page_bits=12)
    other = DirtyBitmap("other", size, granularity_bits=chance.choice([9, 12, 16]))
    model: set[int] = set()
    for _ in range(10):
        bitmap = chance.choice([one, other])
        offset, length = chance.randrange(size), chance.choice([1, 5000, 300_000])
        length = min(length, size - offset)
        bitmap.mark(offset, length)
        coarse = max(bits, bitmap.granularity_bits)
        first, last = offset >> coarse, (offset + length - 1) >> coarse
        steps = 1 << coarse - 9
        model.update(range(first * steps, (last + 1) * steps))
    one.merge(other)
    half = chance.randrange(1, 2048) * 512
    one.resize(half)
    one.resize(size)
    kept = -(-half >> bits) << bits - 9
    found = {
        sector
        for offset, length in one.dirty()
        for sector in range(offset // 512, (offset + length) // 512)
    }
    assert found == {sector for sector in model if sector < kept}


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
