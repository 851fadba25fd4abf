"""Remember which ranges of a disk were changed, as long as it is served.

`DirtyTracking` goes around a disk of which somebody wants to know that; every other disk
does without it. A range is marked before the change starts, so that a bitmap never
misses one: it may name a range whose change has failed.
"""

from collections.abc import Coroutine, Iterable, Sequence
from typing import Any

from nbdserve.block.device import BlockDevice, Hole
from nbdserve.block.dirty_bitmap import DirtyBitmap
from nbdserve.block.extents import Extent
from nbdserve.block.loan import Piece


class DirtyTracking(BlockDevice):
    """A disk whose changes are noted in bitmaps.

    Attributes:
        bitmaps: They all begin empty.
    """

    def __init__(self, device: BlockDevice, names: Iterable[str]) -> None:
        self._device = device
        self.size = device.size
        self.read_only = device.read_only
        self.minimum_block = device.minimum_block
        self.preferred_block = device.preferred_block
        self.can_trim = device.can_trim
        self.can_fast_zero = device.can_fast_zero
        self.notes = device.notes
        self.bitmaps = tuple(DirtyBitmap(name, device.size) for name in names)

    @property
    def below(self) -> BlockDevice:
        """See `BlockDevice.below`."""
        return self._device

    @property
    def broken(self) -> str | None:
        """See `BlockDevice.broken`."""
        return self._device.broken

    def around(self, device: BlockDevice) -> "DirtyTracking":
        """Return the same around another disk, of which the bitmaps are true as well.

        What goes on with this one stays on its disk, and marks the same bitmaps.
        """
        other = DirtyTracking(device, ())
        other.bitmaps = self.bitmaps
        return other

    async def resize(self, size: int, *, shrink: bool = False) -> None:
        """Resize the disk below; what is added has not been changed."""
        await self._device.resize(size, shrink=shrink)
        self.size = self._device.size
        for bitmap in self.bitmaps:
            bitmap.resize(self.size)

    def _mark(self, offset: int, length: int) -> None:
        for bitmap in self.bitmaps:
            bitmap.mark(offset, length)

    # Not coroutines of their own: those of the disk below are handed on as they are.

    def read_into(
        self, offset: int, buffer: memoryview
    ) -> Coroutine[Any, Any, Sequence[Hole]]:
        """Read from the disk below."""
        return self._device.read_into(offset, buffer)

    def lend(self, offset: int, length: int) -> Sequence[Piece] | None:
        """Lend from the disk below."""
        return self._device.lend(offset, length)

    def place(self, offset: int, length: int) -> Piece | None:
        """Ask the disk below, and mark what may be put there."""
        place = self._device.place(offset, length)
        if place is not None:
            self._mark(offset, place[2])
        return place

    def write(
        self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False
    ) -> Coroutine[Any, Any, None]:
        """Mark, then write."""
        self._mark(offset, len(data))
        return self._device.write(offset, data, fua=fua)

    def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        may_unmap: bool = True,
        fast_only: bool = False,
        fua: bool = False,
    ) -> Coroutine[Any, Any, None]:
        """Mark, then make zeros."""
        self._mark(offset, length)
        return self._device.write_zeroes(
            offset, length, may_unmap=may_unmap, fast_only=fast_only, fua=fua
        )

    def trim(
        self, offset: int, length: int, *, fua: bool = False
    ) -> Coroutine[Any, Any, None]:
        """Mark, then trim: the range may read as something else from now on."""
        self._mark(offset, length)
        return self._device.trim(offset, length, fua=fua)

    def flush(self) -> Coroutine[Any, Any, None]:
        """Flush the disk below; bitmaps live as long as the process."""
        return self._device.flush()

    def cache(self, offset: int, length: int) -> Coroutine[Any, Any, None]:
        """Hand the hint on."""
        return self._device.cache(offset, length)

    def block_status(
        self, offset: int, length: int, *, max_extents: int = 1 << 20
    ) -> Coroutine[Any, Any, list[Extent]]:
        """Describe the disk below."""
        return self._device.block_status(offset, length, max_extents=max_extents)

    def close(self) -> Coroutine[Any, Any, None]:
        """Close the disk below."""
        return self._device.close()
