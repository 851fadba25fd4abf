"""The gate that every change of the mapping passes, and that can be closed for one of them all.

A snapshot, or another size, changes many words and counts that must not move meanwhile.
Operations pass the gate at next to no cost; whoever wants the image alone closes
it, waits until those inside have left, and opens it again. Writes in place don't pass it: they
go where a table says the cluster is the disk's own, and while the gate is closed no
table says that (`MappedImage.exclusive`).
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """Lets many pass, or one alone.

    Attributes:
        closed: Whether one is alone inside, or waits to be; then `opened` comes
            before `enter`.
        longest_s: The longest time it was closed.
        recent_s: The same, since somebody set it to 0.
    """

    def __init__(self) -> None:
        """Begin open."""
        self.closed = False
        self.longest_s = self.recent_s = 0.0
        self._inside = 0
        self._empty: asyncio.Future[None] | None = None
        self._waiters: list[asyncio.Future[None]] = []

    async def opened(self) -> None:
        """Wait until the gate is open."""
        while self.closed:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def enter(self) -> None:
        """Pass; without an await since `closed` was seen to be False."""
        self._inside += 1

    def leave(self) -> None:
        """Come out again, whatever happened."""
        self._inside -= 1
        if not self._inside and self._empty is not None and not self._empty.done():
            self._empty.set_result(None)

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Be alone inside: wait until all have left, and keep others out."""
        await self.opened()
        self.closed = True
        start_s = time.monotonic()
        try:
            if self._inside:
                self._empty = asyncio.get_running_loop().create_future()
                await self._empty
            yield
        finally:
            self.closed = False
            self._empty = None
            closed_s = time.monotonic() - start_s
            self.longest_s = max(self.longest_s, closed_s)
            self.recent_s = max(self.recent_s, closed_s)
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)
