"""Two ways to wait that cost nothing while nobody has to.

The engine runs on one event loop, so what lies between two awaits needs no
lock. Where an operation on a cluster or a table does span an await, others that meet it
wait at a `Turnstile`. Input and output that names a host cluster and is still
under way keeps that cluster from being used again through `Pins`.
"""

import asyncio
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Turnstile(Generic[Key]):
    """Lets one operation a key pass at a time.

    Whoever had to wait looks again at everything it knew: the one before may have
    changed the mapping, or failed.
    """

    def __init__(self) -> None:
        self._inside: dict[Key, list[asyncio.Future[None]]] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._inside

    def __bool__(self) -> bool:
        return bool(self._inside)

    def enter(self, key: Key) -> None:
        """Begin; nobody may be inside."""
        self._inside[key] = []

    def leave(self, key: Key) -> None:
        """End, and wake everyone who waits."""
        for waiter in self._inside.pop(key):
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, key: Key) -> None:
        """Wait until the operation that is inside has left."""
        # A future for each waiter: cancelling a waiter of a shared one would cancel it for all.
        waiter = asyncio.get_running_loop().create_future()
        self._inside[key].append(waiter)
        await waiter


class Pins:
    """Tells when all input and output that began before some moment has ended.

    Like RCU: an operation that holds a host offset across an await notes the
    generation in which it began. Whoever took a host cluster out of the mapping
    opens a new generation and waits until the older ones are empty; from then on nobody
    knows that cluster any more.
    """

    def __init__(self) -> None:
        self._generation = 0
        self._active: dict[int, int] = {}
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []

    def enter(self) -> int:
        """Begin; pass what this returns to `leave`."""
        generation = self._generation
        self._active[generation] = self._active.get(generation, 0) + 1
        return generation

    def leave(self, generation: int) -> None:
        """End."""
        left = self._active[generation] - 1
        if left:
            self._active[generation] = left
            return
        del self._active[generation]
        oldest = min(self._active, default=self._generation)
        waiting = self._waiters
        self._waiters = [each for each in waiting if each[0] > oldest]
        for bound, waiter in waiting:
            if bound <= oldest and not waiter.done():
                waiter.set_result(None)

    async def drained(self) -> None:
        """Wait until everything that had begun before this call has ended."""
        self._generation += 1
        if self._active:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append((self._generation, waiter))
            await waiter
