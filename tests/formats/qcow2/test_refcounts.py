"""Refcounts of every width while an image grows: blocks, a larger table, old holes."""

import random
from pathlib import Path

import pytest

from nbdserve.formats.qcow2.refcount_block import Block
from tests.helpers.engine import HEADER_REFCOUNT_TABLE, make, open_bytes, u32, u64

MIB = 1 << 20
WIDTHS = [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("order", range(7))
def test_counts_of_every_width(order: int) -> None:
    """Set at random, they read back, and say which byte range has to be written."""
    bits = 1 << order
    entries = 512 * 8 // bits
    block = Block(0, bytearray(512), order)
    generator = random.Random(order)
    expected = [0] * entries
    assert block.clean
    for _ in range(300):
        index = generator.randrange(entries)
        expected[index] = generator.choice([0, 1, (1 << bits) - 1])
        block.set(index, expected[index])
        changed = block.changed()
        assert changed is not None
        assert changed[0] <= index * bits // 8 < changed[1]
        assert block.clean
    assert [block.get(index) for index in range(entries)] == expected
    assert list(block.used()) == [int(bool(value)) for value in expected]


def test_a_range_that_could_not_be_written_is_remembered() -> None:
    block = Block(0, bytearray(512), 4)
    block.set(3, 1)
    changed = block.changed()
    assert changed == (6, 8)
    block.set(9, 1)
    block.keep_changed(changed)
    assert block.changed() == (6, 20)


@pytest.mark.parametrize("bits", WIDTHS)
async def test_tables_grow_with_the_image(bits: int, tmp_path: Path) -> None:
    """With 512-byte clusters a refcount table of one cluster is soon too small."""
    options = f"cluster_size=512,refcount_bits={bits}"
    size = {8: 20, 16: 10}.get(bits, 6) * MIB
    content = make(tmp_path, size, options=options).read_bytes()
    disk = await open_bytes(tmp_path, content)
    generator = random.Random(bits)
    for offset in range(0, size, MIB):
        await disk.write(offset, generator.randbytes(MIB))
    await disk.image.trim(MIB, MIB)
    disk.model[MIB : 2 * MIB] = bytes(MIB)
    await disk.image.flush()
    await disk.write(MIB, generator.randbytes(MIB // 2))
    await disk.assert_content()
    after = await disk.close_and_check()
    if bits >= 8:
        assert u64(after, HEADER_REFCOUNT_TABLE) != u64(content, HEADER_REFCOUNT_TABLE)
        clusters = u32(after, HEADER_REFCOUNT_TABLE + 8)
        assert clusters > u32(content, HEADER_REFCOUNT_TABLE + 8)
