"""One refcount block in memory: counts of 1 to 64 bits, read and changed in place.

docs/interop/qcow2.rst of qemu, section "Host cluster management".
"""

import sys
from array import array
from collections.abc import Sequence
from functools import cache
from typing import Final


@cache
def _narrow_counts(order: int) -> list[bytes]:
    """Return for each byte of counts narrower than it which of them are not 0."""
    mask = (1 << (1 << order)) - 1
    shifts = range(0, 8, 1 << order)
    return [
        bytes(bool(byte >> shift & mask) for shift in shifts) for byte in range(256)
    ]


_IS_USED: Final = b"\0" + b"\1" * 255


class Block:
    """One refcount block: the counts of as many neighbouring clusters.

    Attributes:
        host_offset: Where it is in the file.
        data: Its bytes.
        writing: Whether a write of it is under way: until then the file is behind.
    """

    __slots__ = ("_changed", "_order", "data", "host_offset", "writing")

    def __init__(self, host_offset: int, data: bytearray, order: int) -> None:
        """`order` is log2 of the width in bits, 0 to 6."""
        self.host_offset = host_offset
        self.data = data
        self.writing = False
        self._order = order
        self._changed: tuple[int, int] | None = None

    def get(self, index: int) -> int:
        """Return one count."""
        order = self._order
        if order >= 3:
            width = 1 << order - 3
            return int.from_bytes(self.data[index * width : (index + 1) * width], "big")
        # Counts narrower than a byte start at its least significant bit.
        bits = 1 << order
        shift = (index << order) & 7
        return self.data[index << order >> 3] >> shift & (1 << bits) - 1

    def set(self, index: int, value: int) -> None:
        """Change one count."""
        order = self._order
        if order >= 3:
            width = 1 << order - 3
            start = index * width
            self.data[start : start + width] = value.to_bytes(width, "big")
            self._touch(start, start + width)
            return
        bits = 1 << order
        position, shift = index << order >> 3, (index << order) & 7
        mask = (1 << bits) - 1 << shift
        self.data[position] = self.data[position] & ~mask | value << shift
        self._touch(position, position + 1)

    def counts(self, index: int, count: int) -> "array[int]":
        """Return neighbouring counts."""
        if self._order < 3:
            return array("Q", [self.get(index + each) for each in range(count)])
        width = 1 << self._order - 3
        counts = array(
            "BHIQ"[self._order - 3], self.data[index * width : (index + count) * width]
        )
        if sys.byteorder == "little":
            counts.byteswap()
        return counts

    def put_counts(self, index: int, counts: Sequence[int]) -> None:
        """Change neighbouring counts."""
        if self._order < 3:
            for position, value in enumerate(counts, index):
                self.set(position, value)
            return
        width = 1 << self._order - 3
        words = array("BHIQ"[self._order - 3], counts)
        if sys.byteorder == "little":
            words.byteswap()
        start, end = index * width, (index + len(counts)) * width
        self.data[start:end] = words.tobytes()
        self._touch(start, end)

    def used(self) -> bytes:
        """Return a byte for each count: 0 if the cluster is free."""
        order = self._order
        if order >= 3:
            # all bytes of each count at once: a block may have a million of them
            width = 1 << order - 3
            used = 0
            for at in range(width):
                used |= int.from_bytes(self.data[at::width], "little")
            return used.to_bytes(len(self.data) // width, "little").translate(_IS_USED)
        return b"".join(map(_narrow_counts(order).__getitem__, self.data))

    def changed(self) -> tuple[int, int] | None:
        """Return the byte range that is not in the file yet, and forget it."""
        changed, self._changed = self._changed, None
        return changed

    def keep_changed(self, changed: tuple[int, int]) -> None:
        """Remember a range again: it could not be written."""
        self._touch(*changed)

    @property
    def clean(self) -> bool:
        """Whether the file has all of it."""
        return self._changed is None and not self.writing

    def _touch(self, start: int, end: int) -> None:
        if self._changed is None:
            self._changed = (start, end)
        else:
            low, high = self._changed
            self._changed = (min(low, start), max(high, end))
