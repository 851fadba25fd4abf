"""Nobody waits long for somebody else: short turns while a modest client is there.

All clients of a process are served by one loop, so whoever is served keeps the others waiting.
Who asks for much at a time gains by long turns, in which many replies leave in one call, and
waits for the length of his own queue anyway. Who asks for a little at a time waits for
the turns of others and nothing else. So turns are long, until there is such a client.
"""

from time import perf_counter
from typing import Final

#: How long somebody counts as present after a request.
_PRESENT_S: Final = 0.1

#: Who has this many requests, or fewer, in a turn and in flight, and no more bytes than a
#: short turn has, is modest.
MODEST: Final = 4

#: How long others are served while a modest client is present: two or three small requests.
SHORT_TURN_S: Final = 0.000025

#: The same in bytes: copying them takes 15 to 30 us.
SHORT_TURN_BYTES: Final = 64 << 10


class Company:
    """Which modest client was there last.

    Attributes:
        modest: Whoever it was; only its identity counts.
        until_s: Till when (`time.perf_counter`) it counts as present.
    """

    __slots__ = ("modest", "until_s")

    def __init__(self) -> None:
        self.modest: object = None
        self.until_s = 0.0

    def met(self, who: object, now_s: float) -> None:
        """Note that a modest client asks."""
        self.modest = who
        self.until_s = now_s + _PRESENT_S

    def left(self, who: object) -> None:
        """Note that somebody is gone: whoever connects again is no company for himself."""
        if self.modest is who:
            self.until_s = 0.0

    def present(self) -> bool:
        """Return whether a modest client has asked lately."""
        return perf_counter() < self.until_s


#: There is one loop in a process that serves.
company: Final = Company()
