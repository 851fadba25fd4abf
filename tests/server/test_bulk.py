"""Very large reads: the same bytes and holes as in one piece, and nobody waits for them."""

import asyncio
import random

import pytest

from nbdserve.server.bulk import BULK, PIECE, Turnstile, read_bulk
from nbdserve.server.limits import Limits
from tests.server.conftest import MIB, Running, until
from tests.server.memory_disk import MemoryDisk

SIZE = 16 * MIB


def sparse(size: int) -> MemoryDisk:
    """Data and holes of odd sizes."""
    disk = MemoryDisk(size)
    disk.data[:] = random.Random(1).randbytes(size)
    dice, position = random.Random(2), 0
    while position < size:
        length = min(dice.randrange(1, 3 * PIECE), size - position)
        disk.holes.append((position, length))
        disk.data[position : position + length] = bytes(length)
        position += length + dice.randrange(1, 3 * PIECE)
    return disk


async def test_pieces_make_the_whole() -> None:
    disk = sparse(4 * MIB)
    turnstile = Turnstile(asyncio.get_running_loop())
    offset, length = 12345, 3 * MIB + 17
    whole, pieces = bytearray(length), bytearray(length)
    expected = await disk.read_into(offset, memoryview(whole))
    holes = await read_bulk(turnstile, disk, offset, memoryview(pieces))
    assert pieces == whole
    assert list(holes) == list(expected)


async def test_one_piece_in_each_turn_of_the_loop() -> None:
    disk = MemoryDisk(MIB)
    loop = asyncio.get_running_loop()
    turnstile = Turnstile(loop)
    turns = 0

    def count() -> None:
        nonlocal turns
        turns += 1
        loop.call_soon(count)

    loop.call_soon(count)
    reads = [read_bulk(turnstile, disk, 0, memoryview(bytearray(MIB))) for _ in "123"]
    await asyncio.gather(*reads)
    assert turns >= 3 * MIB // PIECE - 1


async def test_a_waiter_that_is_gone_holds_up_nobody() -> None:
    turnstile = Turnstile(asyncio.get_running_loop())
    first, second = turnstile.turn(), turnstile.turn()
    first.cancel()
    async with asyncio.timeout(5):
        await second


@pytest.fixture
def disk() -> MemoryDisk:
    return sparse(SIZE)


@pytest.fixture
def limits() -> Limits:
    return Limits(linger_s=0.2)


async def test_small_requests_overtake_large_ones(running: Running) -> None:
    greedy, modest = await running.client(), await running.client()
    asked = [asyncio.create_task(greedy.read(0, SIZE)) for _ in range(2)]
    await until(lambda: running.server._shared.budget.used > 0)
    for number in range(10):
        offset = number * MIB
        assert await modest.read(offset, 4096) == running.disk.data[offset:][:4096]
        assert not any(task.done() for task in asked)
    for data in await asyncio.gather(*asked):
        assert data == running.disk.data
    assert BULK < SIZE
