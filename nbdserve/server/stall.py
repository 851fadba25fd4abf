"""Notice a peer that makes the server hold memory, and moves nothing.

Who holds nothing may be silent for ever: a disk that is mounted and idle.
"""

from typing import Final

#: While memory is short, a peer has to move this part of what it holds in each period of
#: patience: a trickle is not enough.
_PARTS_WHEN_SHORT: Final = 16


class StallWatch:
    """How long one peer has moved nothing of what is held for it."""

    def __init__(self, now_s: float) -> None:
        self._moved = 0
        self._since_s = now_s

    def stalled_s(
        self, now_s: float, *, held: int, moved: int, memory_is_short: bool
    ) -> float:
        """Look at a peer; to be called every now and then.

        Args:
            now_s: By the clock of the loop.
            held: Bytes that are held until the peer moves.
            moved: Bytes that it has moved, ever.
            memory_is_short: Whether others wait for what is held.

        Returns:
            For how long it has not moved enough.
        """
        enough = held // _PARTS_WHEN_SHORT if memory_is_short else 0
        if not held or moved - self._moved > enough:
            self._moved, self._since_s = moved, now_s
        return now_s - self._since_s
