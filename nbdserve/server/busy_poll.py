"""Stay awake for clients that ask again at once.

A client with one request in flight sends the next one some 20 us after its reply. A loop that
sleeps meanwhile has to be woken up, and that takes longer than the request:
5 to 10 us on a processor that was idle, 30 to 50 in a virtual machine. So after an answer the
loop goes on looking for events, of all its connections, for a moment. Virtual machine
monitors do the same (halt_poll_ns of KVM, poll-max-ns of qemu's I/O threads). On a 2-core
virtual machine with idle processors it made 4 KiB reads one at a time 1.6 times as many.
"""

import asyncio
import os
from time import perf_counter
from typing import Final

#: While nobody comes in time, it is tried once in so many turns: 100 us each 64th turn.
_MOST_SKIPPED: Final = 64


class BusyPoll:
    """Keeps a loop from sleeping while that pays."""

    __slots__ = ("_awake", "_loop", "_missed", "_skip", "_until_s", "_window_s")

    def __init__(self, loop: asyncio.AbstractEventLoop, window_s: float) -> None:
        """`window_s` is how long to wait for the next request; 0 does nothing at all."""
        self._loop = loop
        # On a single processor the client can't run while we stay awake.
        alone = len(os.sched_getaffinity(0)) == 1
        self._window_s = 0.0 if alone else window_s
        self._until_s = 0.0
        self._awake = False
        self._missed = 1  # doubles each time that nobody came
        self._skip = 0

    def expect(self) -> None:
        """All requests of a client are answered: perhaps it has another one."""
        if self._skip:
            self._skip -= 1
        elif self._window_s:
            self._until_s = perf_counter() + self._window_s
            if self._awake:
                self._missed = 1
            else:
                self._awake = True
                self._loop.call_soon(self._look_again)

    def _look_again(self) -> None:
        """Have the loop look for events without sleeping, until the time is over."""
        if perf_counter() < self._until_s:
            self._loop.call_soon(self._look_again)
            return
        self._awake = False
        self._missed = min(2 * self._missed, _MOST_SKIPPED)
        self._skip = self._missed - 1
