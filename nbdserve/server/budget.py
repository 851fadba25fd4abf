"""How many bytes all requests in flight hold together."""

from collections.abc import Callable


class Budget:
    """Bytes in flight of a whole server.

    Taking never fails: whoever starts work asks `exhausted` before, and registers
    with `wake_later` if it has to wait.

    Attributes:
        limit: Bytes.
        used: Bytes held right now.
    """

    __slots__ = ("_waiting", "limit", "used")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._waiting: set[Callable[[], None]] = set()

    @property
    def exhausted(self) -> bool:
        """Whether new work has to wait."""
        return self.used >= self.limit

    def take(self, length: int) -> None:
        """Hold `length` bytes more."""
        self.used += length

    def give_back(self, length: int) -> None:
        """Hold `length` bytes less, and wake who waits for that."""
        self.used -= length
        if self._waiting and self.used < self.limit:
            waiting, self._waiting = self._waiting, set()
            for wake in waiting:
                wake()

    def wake_later(self, wake: Callable[[], None]) -> None:
        """Call `wake` once as soon as the budget is not exhausted any longer."""
        self._waiting.add(wake)

    def forget(self, wake: Callable[[], None]) -> None:
        """Don't call `wake` any longer."""
        self._waiting.discard(wake)
