"""Notice a peer that makes the server hold memory and moves nothing, or is idle for too long.

Who holds nothing may be silent for ever, unless the operator wants otherwise: a disk that
is mounted and idle.
"""

from typing import Final

from nbdserve.server.limits import Limits

#: While memory is short, a peer has to move this part of what it holds in each period of
#: patience: a trickle is not enough.
_PARTS_WHEN_SHORT: Final = 16


class PeerWatch:
    """What one peer has done since the last looks at it."""

    def __init__(self, limits: Limits, now_s: float) -> None:
        self._limits = limits
        self._moved = 0
        self._moved_at_s = now_s
        self._requests = 0
        self._asked_at_s = now_s

    def stall(
        self, now_s: float, *, held: int, moved: int, memory_is_short: bool
    ) -> str | None:
        """Look whether a peer moves; to be called every now and then.

        Args:
            now_s: By the clock of the loop.
            held: Bytes that are held until the peer moves.
            moved: Bytes that it has moved, ever.
            memory_is_short: Whether others wait for what is held.

        Returns:
            Why its connection has to end, if it has to.
        """
        enough = held // _PARTS_WHEN_SHORT if memory_is_short else 0
        if not held or moved - self._moved > enough:
            self._moved, self._moved_at_s = moved, now_s
        seconds = now_s - self._moved_at_s
        if seconds <= self._limits.stall_timeout_s:
            return None
        return f"no progress for {round(seconds)} s with {held} bytes to move"

    def idleness(self, now_s: float, *, requests: int, in_flight: int) -> str | None:
        """Look whether a peer asks for something; to be called every now and then.

        Args:
            now_s: By the clock of the loop.
            requests: How many there were, ever.
            in_flight: How many are being worked on.

        Returns:
            Why its connection has to end, if it has to.
        """
        if in_flight or requests != self._requests:
            self._requests, self._asked_at_s = requests, now_s
        seconds = now_s - self._asked_at_s
        if seconds <= self._limits.idle_timeout_s:
            return None
        return f"idle for {round(seconds)} s"
