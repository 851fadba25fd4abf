"""A disk that is not there for a moment: requests wait until there is one again.

It stands between an old disk and a new one of the same export, so that clients need not
be sent away while an image is opened anew.
"""

import asyncio
from collections.abc import Sequence
from errno import EIO

from nbdserve.block.device import BlockDevice, Hole
from nbdserve.block.extents import Extent


class Absent(BlockDevice):
    """Hands each request on once there is a disk, or refuses it once there will be none."""

    def __init__(self, old: BlockDevice) -> None:
        """Look like the disk that was there."""
        self.size = old.size
        self.read_only = old.read_only
        self.preferred_block = old.preferred_block
        self.can_trim = old.can_trim
        self.can_fast_zero = old.can_fast_zero
        self._disk: BlockDevice | None = None
        self._reason: str | None = None
        self._settled = asyncio.Event()

    def end(self, disk: BlockDevice) -> None:
        """Hand everything on to `disk`, which somebody else closes."""
        self._disk = disk
        self._settled.set()

    def fail(self, error: BaseException) -> None:
        """Refuse everything."""
        self._reason = f"could not be opened anew: {error}"
        self._settled.set()

    @property
    def broken(self) -> str | None:
        """See `BlockDevice.broken`."""
        return self._reason

    async def _found(self) -> BlockDevice:
        await self._settled.wait()
        if self._disk is None:
            raise OSError(EIO, f"the disk {self._reason}")
        return self._disk

    async def read_into(self, offset: int, buffer: memoryview) -> Sequence[Hole]:
        """See `BlockDevice.read_into`."""
        return await (await self._found()).read_into(offset, buffer)

    async def write(
        self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False
    ) -> None:
        """See `BlockDevice.write`."""
        await (await self._found()).write(offset, data, fua=fua)

    async def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        may_unmap: bool = True,
        fast_only: bool = False,
        fua: bool = False,
    ) -> None:
        """See `BlockDevice.write_zeroes`."""
        await (await self._found()).write_zeroes(
            offset, length, may_unmap=may_unmap, fast_only=fast_only, fua=fua
        )

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """See `BlockDevice.trim`."""
        await (await self._found()).trim(offset, length, fua=fua)

    async def flush(self) -> None:
        """See `BlockDevice.flush`."""
        await (await self._found()).flush()

    async def cache(self, offset: int, length: int) -> None:
        """See `BlockDevice.cache`."""
        await (await self._found()).cache(offset, length)

    async def block_status(
        self, offset: int, length: int, *, max_extents: int = 1 << 20
    ) -> list[Extent]:
        """See `BlockDevice.block_status`."""
        return await (await self._found()).block_status(
            offset, length, max_extents=max_extents
        )

    async def close(self) -> None:
        """Do nothing: the disk is somebody else's."""
