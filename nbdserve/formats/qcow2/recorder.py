"""Noting a guest's changes in persistent bitmaps, on their way into the image.

It takes the place of the parts that carry out changes only where there is a bitmap to keep:
all other images do without it. A range is marked before its change begins, so that no
bitmap is ever stored without a change that can be seen.
"""

from collections.abc import Coroutine
from typing import Any

from nbdserve.formats.mapped.image import Discards, Writes
from nbdserve.formats.qcow2.bitmaps import Bitmaps
from nbdserve.storage.base import Buffer


class Recorder:
    """Marks, then changes."""

    def __init__(self, bitmaps: Bitmaps, writer: Writes, discarder: Discards) -> None:
        """Mark in those of `bitmaps` that record."""
        self._bitmaps = bitmaps
        self._writer = writer
        self._discarder = discarder

    def write(
        self, offset: int, data: Buffer, *, fua: bool = False
    ) -> Coroutine[Any, Any, None]:
        """See `Writer.write`."""
        for bitmap in self._bitmaps.recorded:
            bitmap.mark(offset, len(data))
        return self._writer.write(offset, data, fua=fua)

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fua: bool
    ) -> Coroutine[Any, Any, None]:
        """See `Discarder.write_zeroes`."""
        for bitmap in self._bitmaps.recorded:
            bitmap.mark(offset, length)
        return self._discarder.write_zeroes(
            offset, length, may_unmap=may_unmap, fua=fua
        )

    def trim(self, offset: int, length: int, *, fua: bool) -> Coroutine[Any, Any, None]:
        """See `Discarder.trim`; what is left of a range may read as something else."""
        for bitmap in self._bitmaps.recorded:
            bitmap.mark(offset, length)
        return self._discarder.trim(offset, length, fua=fua)
