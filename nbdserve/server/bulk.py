"""Very large reads, in pieces between which everybody else has a turn.

64 MiB out of the page cache take 20 ms, in which nobody else would be answered. And a few
clients could ask for many of them at a time: so all of them together get to read one piece
in each turn of the loop.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Final

from nbdserve.block.device import BlockDevice, Hole

#: Longer reads are bulk. One of 2 MiB takes 0.5 ms, as long as a turn of a connection.
BULK: Final = 2 << 20
#: Bytes of one piece: 40 us, which is about what a small request takes with its system calls.
PIECE: Final = 64 << 10


class Turnstile:
    """Lets one waiter pass in each turn of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[asyncio.Future[None]] = deque()

    def turn(self) -> asyncio.Future[None]:
        """Return what is done when it is the caller's turn."""
        future: asyncio.Future[None] = self._loop.create_future()
        if not self._waiting:
            self._loop.call_soon(self._next)
        self._waiting.append(future)
        return future

    def _next(self) -> None:
        future = self._waiting.popleft()
        if not future.done():
            future.set_result(None)
        if self._waiting:
            self._loop.call_soon(self._next)


async def read_bulk(
    turnstile: Turnstile, device: BlockDevice, offset: int, buffer: memoryview
) -> Sequence[Hole]:
    """Fill `buffer` with the bytes at `offset`; see `BlockDevice.read_into`."""
    holes: list[Hole] = []
    for start in range(0, len(buffer), PIECE):
        await turnstile.turn()
        piece = buffer[start : start + PIECE]
        for position, length in await device.read_into(offset + start, piece):
            if holes and sum(holes[-1]) == start + position:
                holes[-1] = holes[-1][0], holes[-1][1] + length
            else:
                holes.append((start + position, length))
    return holes
