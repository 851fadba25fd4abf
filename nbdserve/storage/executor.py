"""The threads that make the system calls which may wait for a device.

A thread makes single calls that release the GIL (pread, fdatasync, inflate); one
that loops in Python would hold up the event loop by whole scheduler ticks.

It is not `concurrent.futures` for two reasons. The interpreter joins the threads
of such a pool when it exits, so that one read from a dead network mount would keep
the server from ever ending. And a request that is cancelled must not free a buffer
into which a thread still reads: here the caller only continues, with its
CancelledError, when the call has ended.
"""

import asyncio
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar, TypeVarTuple

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

#: Calls that run side by side. They wait for devices, not for a core, and the
#: drives at hand reach their full rate with this many requests.
THREADS = 8


class Call(asyncio.Future[Result]):
    """The outcome of a call in a thread; cancelling waits until the call has ended.

    `Task.cancel` asks the future that the task waits for to cancel itself. This one
    says no, and asyncio then delivers the cancellation when the future is done.
    """

    def cancel(self, msg: object = None) -> bool:
        """Refuse: the thread goes on with the caller's buffers."""
        return False


_Job = tuple[Call[Any], asyncio.AbstractEventLoop, Callable[[], Any]]

_jobs: SimpleQueue[_Job] = SimpleQueue()
_threads: list[threading.Thread] = []


def run(
    function: Callable[[*Arguments], Result], *arguments: *Arguments
) -> Call[Result]:
    """Call `function(*arguments)` in a thread.

    Returns:
        A future of the running loop.
    """
    loop = asyncio.get_running_loop()
    call: Call[Result] = Call(loop=loop)
    _jobs.put((call, loop, lambda: function(*arguments)))
    if len(_threads) < THREADS:
        thread = threading.Thread(
            target=_work,
            args=(_jobs,),
            name=f"nbdserve-io-{len(_threads)}",
            daemon=True,
        )
        _threads.append(thread)
        thread.start()
    return call


def _work(jobs: SimpleQueue[_Job]) -> None:
    while True:
        call, loop, function = jobs.get()
        settle: Callable[[Any], None]
        outcome: Any
        try:
            outcome = function()
            settle = call.set_result
        except BaseException as error:  # noqa: BLE001 -- it is raised at the caller
            outcome = error
            settle = call.set_exception
        try:
            loop.call_soon_threadsafe(settle, outcome)
        except RuntimeError:
            # The loop is closed: nobody waits any more.
            if not loop.is_closed():
                raise
        # Keep no buffer alive until the next job arrives.
        del call, loop, function, settle, outcome


def _forget_threads() -> None:
    """Start anew in a forked child, which has none of the parent's threads."""
    global _jobs  # noqa: PLW0603 -- one pool per process
    _jobs = SimpleQueue()
    _threads.clear()


os.register_at_fork(after_in_child=_forget_threads)
