"""Memory that is used again: fresh pages cost more than the copy into them.

A `Buffer` is handed out by the `BufferPool`, has parts of itself in use (`pins`), and
goes back when the last part is let go. Requests that are waiting for a disk, and
replies that a peer has not read yet, hold a pin; everything else is done with a
buffer in the same moment in which it was filled.
"""

import mmap
from typing import Final

#: Bytes of the smallest buffer: below it a pool saves nothing.
MIN_BUFFER: Final = 64 << 10
#: Bytes beyond the power of two, so that 1 MiB of data and its reply header
#: do not need a buffer of 2 MiB.
_HEADROOM: Final = 4096


class Buffer:
    """Memory out of a pool, filled from the front.

    Attributes:
        view: The whole memory.
        capacity: Bytes of it.
        position: Where the unused part starts; whoever fills it moves this on.
        pins: How many have parts of it in use.
    """

    __slots__ = ("_pool", "capacity", "pins", "position", "view")

    def __init__(self, pool: "BufferPool", capacity: int) -> None:
        self._pool = pool
        self.view = memoryview(mmap.mmap(-1, capacity))
        self.capacity = capacity
        self.position = 0
        self.pins = 1

    def pin(self) -> None:
        """Keep the memory until `unpin`."""
        self.pins += 1

    def unpin(self) -> None:
        """Give up one pin; the last one returns the buffer to its pool."""
        self.pins -= 1
        if not self.pins:
            self._pool.put_back(self)


class BufferPool:
    """Buffers by size class; the one used last is handed out first, its cache is warm.

    Attributes:
        idle_limit: Bytes that may lie unused; above it memory goes back to the system.
        idle: Bytes that lie unused.
        lent: Buffers that are handed out.
    """

    def __init__(self, idle_limit: int) -> None:
        self.idle_limit = idle_limit
        self.idle = 0
        self.lent = 0
        self._free: dict[int, list[Buffer]] = {}

    def take(self, length: int) -> Buffer:
        """Return a buffer of at least `length` bytes, empty and with one pin.

        Its memory holds whatever was there before: never send what was not filled.
        """
        self.lent += 1
        capacity = _size_class(length)
        free = self._free.get(capacity)
        if not free:
            return Buffer(self, capacity)
        buffer = free.pop()
        self.idle -= capacity
        buffer.position = 0
        buffer.pins = 1
        return buffer

    def put_back(self, buffer: Buffer) -> None:
        """Take a buffer that nobody uses any longer."""
        self.lent -= 1
        if self.idle + buffer.capacity <= self.idle_limit:
            self.idle += buffer.capacity
            self._free.setdefault(buffer.capacity, []).append(buffer)


def _size_class(length: int) -> int:
    """Return the capacity of the buffers that serve `length` bytes."""
    needed = max(length - _HEADROOM, MIN_BUFFER)
    return (1 << (needed - 1).bit_length()) + _HEADROOM
