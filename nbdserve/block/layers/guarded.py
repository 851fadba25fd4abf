"""A raw disk whose format was guessed: it must not become something else.

Whoever opens the file next would guess again, and find what a guest has written: a qcow2
header, say, that names any file of the host as its backing file. So the first sector takes
no header of an image format. Serves the command line of qemu-nbd, which does the same.
"""

import asyncio
from errno import EPERM

from nbdserve.block.device import BlockDevice
from nbdserve.block.layers.window import Window
from nbdserve.block.loan import Piece
from nbdserve.block.magics import SECTOR, looks_like
from nbdserve.errors import RequestError


class Guarded(Window):
    """A raw disk that stays one."""

    def __init__(self, device: BlockDevice) -> None:
        """Guard a disk, which is closed with this one."""
        super().__init__(device)
        self._changing = asyncio.Lock()  # two halves of a magic are one after the other

    def place(self, offset: int, length: int) -> Piece | None:
        """Ask the disk below, but for what is judged before."""
        return super().place(offset, length) if offset >= SECTOR else None

    async def write(
        self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False
    ) -> None:
        """Write, unless that makes a header."""
        if offset >= SECTOR:
            await super().write(offset, data, fua=fua)
            return
        async with self._changing:
            await self._judge(offset, bytes(data[: SECTOR - offset]))
            await super().write(offset, data, fua=fua)

    async def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        may_unmap: bool = True,
        fast_only: bool = False,
        fua: bool = False,
    ) -> None:
        """Make zeros, unless that makes a header: some have a zero at their end."""
        change = super().write_zeroes
        keywords = {"may_unmap": may_unmap, "fast_only": fast_only, "fua": fua}
        if offset >= SECTOR:
            await change(offset, length, **keywords)
            return
        async with self._changing:
            await self._judge(offset, bytes(min(length, SECTOR - offset)))
            await change(offset, length, **keywords)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Trim, unless the zeros that may come of it make a header."""
        if offset >= SECTOR:
            await super().trim(offset, length, fua=fua)
            return
        async with self._changing:
            await self._judge(offset, bytes(min(length, SECTOR - offset)))
            await super().trim(offset, length, fua=fua)

    async def _judge(self, offset: int, data: bytes) -> None:
        """Refuse what would make a header of the first sector.

        Raises:
            RequestError: EPERM.
        """
        start = bytearray(SECTOR)
        await self.read_into(0, memoryview(start)[: min(SECTOR, self.size)])
        start[offset : offset + len(data)] = data
        if name := looks_like(start):
            raise RequestError(
                EPERM,
                f"the format of this image was guessed to be raw, and this would"
                f" make it look like {name}",
            )
