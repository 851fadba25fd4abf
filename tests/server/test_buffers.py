import pytest

from nbdserve.server.buffers import MIN_BUFFER, BufferPool

MIB = 1 << 20


@pytest.mark.parametrize("length", [1, MIN_BUFFER, MIB, MIB + 28, 64 * MIB + 28])
def test_a_buffer_is_large_enough_and_not_twice_as_large(length: int) -> None:
    buffer = BufferPool(0).take(length)

    assert length <= buffer.capacity == len(buffer.view)
    assert buffer.capacity < 2 * max(length, MIN_BUFFER)


def test_the_last_pin_returns_a_buffer_and_it_is_used_again() -> None:
    pool = BufferPool(4 * MIB)
    buffer = pool.take(MIB)
    buffer.position = 77
    buffer.pin()
    buffer.unpin()
    assert (pool.lent, pool.idle) == (1, 0)

    buffer.unpin()

    assert (pool.lent, pool.idle) == (0, buffer.capacity)
    again = pool.take(MIB)
    assert again is buffer
    assert (again.position, again.pins, pool.idle) == (0, 1, 0)


def test_memory_above_the_idle_limit_is_not_kept() -> None:
    pool = BufferPool(3 * MIB)
    buffers = [pool.take(MIB) for _ in range(4)]
    for buffer in buffers:
        buffer.unpin()

    assert pool.idle == 2 * buffers[0].capacity
    assert pool.lent == 0
