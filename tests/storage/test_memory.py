"""Storage in memory behaves as a sparse file does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.storage.memory import PAGE, MemoryStorage

SPACE = 5 * PAGE

actions = st.lists(
    st.tuples(
        st.sampled_from(["write", "zero", "punch", "truncate"]),
        st.integers(0, SPACE),
        st.integers(0, 2 * PAGE),
    ),
    max_size=12,
)


def run(coroutine: object) -> object:
    """Drive a coroutine that must not suspend."""
    with pytest.raises(StopIteration) as stop:
        coroutine.send(None)  # type: ignore[attr-defined]
    return stop.value.value


@given(actions)
def test_same_as_a_bytearray(steps: list[tuple[str, int, int]]) -> None:
    storage = MemoryStorage()
    model = bytearray()
    for number, (what, offset, length) in enumerate(steps, 1):
        if what == "write":
            assert storage.try_write(offset, bytes([number]) * length)
            model.extend(bytes(max(0, offset + length - len(model))))
            model[offset : offset + length] = bytes([number]) * length
        elif what == "truncate":
            run(storage.truncate(offset))
            model = model[:offset] + bytes(max(0, offset - len(model)))
        else:
            start = min(offset, len(model))
            inside = min(length, len(model) - start)
            run(storage.zero(start, inside, unmap=what == "punch"))
            model[start : start + inside] = bytes(inside)
    assert storage.size == len(model)
    assert storage.content() == model
    extents = run(storage.extents(0, storage.size))
    assert isinstance(extents, list)
    position = 0
    for length, is_data in extents:
        assert length > 0
        if not is_data:
            assert not any(model[position : position + length])
            assert storage.hole_at(position, length) == length
        else:
            assert storage.hole_at(position, length) == 0
        position += length
    assert position == len(model)


async def test_sparse_and_read_past_the_end() -> None:
    storage = MemoryStorage(b"head", size=1 << 50)
    assert storage.size == 1 << 50
    assert await storage.extents(0, 1 << 50) == [
        (PAGE, True),
        ((1 << 50) - PAGE, False),
    ]
    assert await storage.extents(0, 1 << 50, max_extents=1) == [(PAGE, True)]
    assert storage.hole_at(PAGE, 1 << 20) == 1 << 20
    buffer = memoryview(bytearray(b"x" * 8))
    await storage.read((1 << 50) - 4, buffer)
    assert bytes(buffer) == bytes(8)


async def test_refusals() -> None:
    storage = MemoryStorage(b"abc", read_only=True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        storage.try_write(0, b"x")
    await storage.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        await storage.read(0, memoryview(bytearray(1)))
    assert storage.content() == b"abc"
