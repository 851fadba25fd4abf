"""Show only what lies behind an offset of a disk, and perhaps keep its storage.

Serves `--offset` and `--discard=ignore` of qemu-nbd's command line; every other disk does
without it.
"""

from collections.abc import Coroutine, Sequence
from typing import Any

from nbdserve.block.device import BlockDevice, Hole
from nbdserve.block.extents import Extent
from nbdserve.block.loan import Piece
from nbdserve.errors import ConfigError


async def _nothing() -> None:
    """Do what a trim does that is ignored."""


class Window(BlockDevice):
    """A disk from some offset to its end."""

    def __init__(
        self, device: BlockDevice, offset: int = 0, *, discard: bool = True
    ) -> None:
        """Look at a disk, which is closed with this one.

        Args:
            device: The disk.
            offset: Bytes that are not shown.
            discard: Whether storage may be given back.

        Raises:
            ConfigError: The disk ends before `offset`.
        """
        if offset > device.size:
            raise ConfigError(
                f"the offset {offset} is past the end of the disk, which has"
                f" {device.size} bytes"
            )
        self._device = device
        self._offset = offset
        self._discard = discard
        self.size = device.size - offset
        self.read_only = device.read_only
        self.minimum_block = device.minimum_block
        self.preferred_block = device.preferred_block
        self.can_trim = device.can_trim and discard
        self.can_fast_zero = device.can_fast_zero and discard
        self.notes = device.notes

    @property
    def below(self) -> BlockDevice:
        """See `BlockDevice.below`."""
        return self._device

    @property
    def broken(self) -> str | None:
        """See `BlockDevice.broken`."""
        return self._device.broken

    async def resize(self, size: int, *, shrink: bool = False) -> None:
        """Resize the disk below, so that this much of it is shown."""
        await self._device.resize(self._offset + size, shrink=shrink)
        self.size = self._device.size - self._offset

    # Not coroutines of their own: those of the disk below are handed on as they are.

    def read_into(
        self, offset: int, buffer: memoryview
    ) -> Coroutine[Any, Any, Sequence[Hole]]:
        """Read from the disk below."""
        self.require_range(offset, len(buffer))
        return self._device.read_into(self._offset + offset, buffer)

    def lend(self, offset: int, length: int) -> Sequence[Piece] | None:
        """Lend from the disk below."""
        return self._device.lend(self._offset + offset, length)

    def place(self, offset: int, length: int) -> Piece | None:
        """Ask the disk below."""
        return self._device.place(self._offset + offset, length)

    def write(
        self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False
    ) -> Coroutine[Any, Any, None]:
        """Write to the disk below."""
        self.require_range(offset, len(data))
        return self._device.write(self._offset + offset, data, fua=fua)

    def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        may_unmap: bool = True,
        fast_only: bool = False,
        fua: bool = False,
    ) -> Coroutine[Any, Any, None]:
        """Make zeros in the disk below."""
        self.require_range(offset, length)
        return self._device.write_zeroes(
            self._offset + offset,
            length,
            may_unmap=may_unmap and self._discard,
            fast_only=fast_only,
            fua=fua,
        )

    def trim(
        self, offset: int, length: int, *, fua: bool = False
    ) -> Coroutine[Any, Any, None]:
        """Trim the disk below, unless its storage is to be kept."""
        self.require_range(offset, length)
        if self._discard:
            return self._device.trim(self._offset + offset, length, fua=fua)
        return self._device.flush() if fua else _nothing()

    def flush(self) -> Coroutine[Any, Any, None]:
        """Flush the disk below."""
        return self._device.flush()

    def cache(self, offset: int, length: int) -> Coroutine[Any, Any, None]:
        """Hand the hint on."""
        self.require_range(offset, length)
        return self._device.cache(self._offset + offset, length)

    def block_status(
        self, offset: int, length: int, *, max_extents: int = 1 << 20
    ) -> Coroutine[Any, Any, list[Extent]]:
        """Describe the disk below."""
        self.require_range(offset, length)
        return self._device.block_status(
            self._offset + offset, length, max_extents=max_extents
        )

    def close(self) -> Coroutine[Any, Any, None]:
        """Close the disk below."""
        return self._device.close()
