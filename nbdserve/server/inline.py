"""Go on with a coroutine that was started inline and had to wait, without a task.

Most requests never wait: their blocks are in the page cache and their mapping is
known. The session starts each, and what has to wait goes on here:

    done, outcome = start(coroutine)
    if not done:
        go_on(loop, coroutine, outcome, finished)

A task could do that too, for three more turns of the loop and about 10 us a request: it
starts in a turn of its own, is put into the set of all tasks, and reports its end by another
callback. What it has beyond this is cancelling and `current_task`, which nothing
below the session uses.

What a coroutine yields is a future with `_asyncio_future_blocking` set: the mark by
which a task knows that the future came through `await`. The mark lives in the future,
and a future may have several waiters, so it is cleared at once.

This module stays interpreted where others are compiled (deploy/compile.py): mypyc makes a
traceback for each StopIteration that it catches, for 0.3 us.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

#: Called with the result and None, or with None and what was raised.
Finished = Callable[[Any, BaseException | None], None]


def start(coroutine: Coroutine[Any, Any, Any]) -> tuple[bool, Any]:
    """Take the first step of a coroutine.

    Returns:
        Whether that was its end, and its result, or else what it waits for.
    """
    try:
        return False, coroutine.send(None)
    except StopIteration as outcome:
        return True, outcome.value


class _Suspended:
    """A coroutine between two of its steps."""

    __slots__ = ("_coroutine", "_finished", "_loop")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        coroutine: Coroutine[Any, Any, Any],
        finished: Finished,
    ) -> None:
        self._loop = loop
        self._coroutine = coroutine
        self._finished = finished

    def wait(self, waits_for: Any) -> None:
        """Go on when what was yielded is done: a future, or None for "soon"."""
        if waits_for is None:
            self._loop.call_soon(self.resume)
        elif getattr(waits_for, "_asyncio_future_blocking", None):
            waits_for._asyncio_future_blocking = False  # noqa: SLF001
            waits_for.add_done_callback(self.resume)
        else:
            error = RuntimeError(f"nobody can wait for {waits_for!r}")
            self._loop.call_soon(self._complain, error)

    def resume(self, _done: object = None) -> None:
        """Take the next step; a future that failed raises in it."""
        try:
            waits_for = self._coroutine.send(None)
        except StopIteration as outcome:
            self._finished(outcome.value, None)
        except BaseException as failure:  # noqa: BLE001 -- it is told to who asked
            self._finished(None, failure)
        else:
            self.wait(waits_for)

    def _complain(self, error: RuntimeError) -> None:
        """Raise `error` where the coroutine waits for something strange."""
        try:
            waits_for = self._coroutine.throw(error)
        except StopIteration as outcome:
            self._finished(outcome.value, None)
        except BaseException as failure:  # noqa: BLE001
            self._finished(None, failure)
        else:
            self.wait(waits_for)


def go_on(
    loop: asyncio.AbstractEventLoop,
    coroutine: Coroutine[Any, Any, Any],
    waits_for: object,
    finished: Finished,
) -> None:
    """Take a coroutine to its end whenever what it waits for is done.

    Call it at once after `start`, before anything else runs.

    Args:
        loop: The running loop.
        coroutine: One that `start` has driven to its first wait.
        waits_for: What it yielded.
        finished: Called in the end, from the loop, never before this returns.
    """
    _Suspended(loop, coroutine, finished).wait(waits_for)
