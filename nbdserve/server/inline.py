"""Hand a coroutine that was started inline, and had to wait, to a task.

Most requests never wait: their blocks are in the page cache and their mapping is
known. A task for each would cost more than the request itself, so the session drives
a coroutine with `send(None)` and needs a task only for one that yields:

    try:
        waits_for = coroutine.send(None)
    except StopIteration as finished:
        ...  # done, without a task: finished.value
    else:
        task = adopt(loop, coroutine, waits_for)

What a coroutine yields is a future with `_asyncio_future_blocking` set: the mark by
which a task knows that the future came through `await`. The mark lives in
the future, and a future may have several waiters, so it has to be cleared at once, and set
again in the moment in which the task takes the future over.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


class _Started(Coroutine[Any, Any, _T]):
    """A coroutine whose first step has been taken, as a task wants to see it."""

    __slots__ = ("_coroutine", "_waits_for")

    def __init__(self, coroutine: Coroutine[Any, Any, _T], waits_for: object) -> None:
        self._coroutine = coroutine
        self._waits_for = waits_for

    def send(self, value: object) -> Any:
        """Yield first what the coroutine is waiting for, then go on with it."""
        waits_for = self._waits_for
        if waits_for is not None:
            self._waits_for = None
            if not asyncio.isfuture(waits_for):
                return waits_for  # the task complains about it in its own words
            if not waits_for.done():
                waits_for._asyncio_future_blocking = True  # noqa: SLF001
                return waits_for
        return self._coroutine.send(value)

    def throw(self, error: Any, *_: object) -> Any:
        """Raise in the coroutine, where it waits (a task passes an instance)."""
        self._waits_for = None
        return self._coroutine.throw(error)

    def close(self) -> None:
        """End the coroutine where it waits."""
        self._coroutine.close()

    def __await__(self) -> Any:
        """Never wanted: only a task drives this."""
        raise TypeError("only a task can drive a coroutine that was started inline")


def adopt(
    loop: asyncio.AbstractEventLoop,
    coroutine: Coroutine[Any, Any, _T],
    waits_for: object,
) -> asyncio.Task[_T]:
    """Go on with a coroutine as a task.

    Call it at once after the first `send(None)`, before anything else runs.

    Args:
        loop: The running loop.
        coroutine: One that `send(None)` has driven to its first wait.
        waits_for: What it yielded: a future, or None for a bare `yield`.
    """
    if asyncio.isfuture(waits_for):
        waits_for._asyncio_future_blocking = False  # noqa: SLF001
    return loop.create_task(_Started(coroutine, waits_for))
