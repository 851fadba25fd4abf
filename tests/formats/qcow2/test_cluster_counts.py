"""Counts in segments behave as a plain dict, and blocks as lists of numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.formats.qcow2.cluster_counts import (
    SEGMENT,
    ClusterCounts,
    decode_block,
    encode_block,
)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3 * SEGMENT),
            st.integers(1, SEGMENT + 5),
            st.sampled_from([1, 1, 2, 200, 70000]),
        ),
        max_size=4,
    )
)
def test_counting(adds: list[tuple[int, int, int]]) -> None:
    counts = ClusterCounts()
    model: dict[int, int] = {}
    for first, length, times in adds:
        counts.add(first, length, times)
        for cluster in range(first, first + length):
            model[cluster] = model.get(cluster, 0) + times
    for cluster in {0, 1, SEGMENT - 1, SEGMENT, 5 * SEGMENT, *model}:
        assert counts[cluster] == model.get(cluster, 0)
    assert counts.last() == max(model, default=-1)
    assert counts.highest_count() == max(model.values(), default=0)
    covered = {c for first, n in counts.used_ranges() for c in range(first, first + n)}
    assert model.keys() <= covered
    for first, length, _ in adds:
        exact = [model[cluster] for cluster in range(first, first + length)]
        assert counts.is_ones(first, length) == (set(exact) == {1})
        assert counts.slice(first, length) == bytes(min(n, 255) for n in exact)


@pytest.mark.parametrize("order", range(7))
@given(data=st.data())
def test_blocks(order: int, data: st.DataObject) -> None:
    largest = (1 << (1 << order)) - 1
    numbers = st.integers(0, min(largest, 3)) | st.integers(0, largest)
    per_byte = max(1, 8 >> order)
    exact = data.draw(st.lists(numbers, min_size=8, max_size=64))
    exact += [0] * (-len(exact) % per_byte)
    block = encode_block(exact, order)
    assert len(block) == (len(exact) << order) // 8
    if order >= 3:
        width = 1 << order - 3
        assert block[:width] == exact[0].to_bytes(width, "big")
    counts, many = decode_block(block, order)
    assert [many.get(i, n) for i, n in enumerate(counts)] == exact
    assert all((n == 255) == (exact[i] >= 255) for i, n in enumerate(counts))
    if max(exact) < 255:
        assert encode_block(bytes(exact), order) == block


def test_the_lowest_bits_come_first() -> None:
    assert encode_block([1, 0, 0, 0, 0, 0, 0, 1], 0) == b"\x81"
    assert encode_block([3, 0, 1, 0], 1) == b"\x13"
    assert encode_block([1, 15], 2) == b"\xf1"
