"""Work that several wait for, and that none of them can stop midway."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class Once:
    """A piece of work that is done once at a time, for all who ask for it meanwhile.

    It goes on when they give up: an image whose opening stops midway keeps its file and lock.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Begin nothing yet."""
        self._work = work
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> asyncio.Task[None]:
        """Return what is under way, or begin it."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
            self._task.add_done_callback(forget)
        return self._task

    async def done(self) -> None:
        """Have it done; whatever it raises is raised for each who waits."""
        await asyncio.shield(self.begin())

    async def ended(self) -> None:
        """Wait until nothing is under way, whatever comes of it."""
        if self._task is not None:
            await asyncio.wait([self._task])


def forget(task: asyncio.Task[None]) -> None:
    """Let the error of a task be nobody's: who wanted to know may have given up."""
    if not task.cancelled():
        task.exception()
