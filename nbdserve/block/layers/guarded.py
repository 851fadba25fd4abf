"""A raw disk whose format was guessed: it must not become something else.

Whoever opens the file next would guess again, and find what a guest has written: a qcow2
header, say, that names any file of the host as its backing file. So the first sector takes
no header of an image format. Serves the command line of qemu-nbd, which does the same.
"""

import asyncio
from errno import EPERM
from typing import Final

from nbdserve.block.device import BlockDevice
from nbdserve.block.layers.window import Window
from nbdserve.block.loan import Piece
from nbdserve.errors import RequestError

_SECTOR: Final = 512
#: Format, and what qemu knows it by: where in the first sector, and the bytes.
_MAGICS: Final = (
    ("qcow2", 0, b"QFI\xfb"),
    ("qed", 0, b"QED\0"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vdi", 64, b"\x7f\x10\xda\xbe"),
    ("vpc", 0, b"conectix"),
    ("vhdx", 0, b"vhdxfile"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("luks", 0, b"LUKS\xba\xbe"),
    ("bochs", 0, b"Bochs Virtual HD Image"),
    ("cloop", 0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop"),
)


class Guarded(Window):
    """A raw disk that stays one."""

    def __init__(self, device: BlockDevice) -> None:
        """Guard a disk, which is closed with this one."""
        super().__init__(device)
        self._changing = asyncio.Lock()  # two halves of a magic are one after the other

    def place(self, offset: int, length: int) -> Piece | None:
        """Ask the disk below, but for what is judged before."""
        return super().place(offset, length) if offset >= _SECTOR else None

    async def write(
        self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False
    ) -> None:
        """Write, unless that makes a header."""
        if offset >= _SECTOR:
            await super().write(offset, data, fua=fua)
            return
        async with self._changing:
            await self._judge(offset, bytes(data[: _SECTOR - offset]))
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
        if offset >= _SECTOR:
            await change(offset, length, **keywords)
            return
        async with self._changing:
            await self._judge(offset, bytes(min(length, _SECTOR - offset)))
            await change(offset, length, **keywords)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Trim, unless the zeros that may come of it make a header."""
        if offset >= _SECTOR:
            await super().trim(offset, length, fua=fua)
            return
        async with self._changing:
            await self._judge(offset, bytes(min(length, _SECTOR - offset)))
            await super().trim(offset, length, fua=fua)

    async def _judge(self, offset: int, data: bytes) -> None:
        """Refuse what would make a header of the first sector.

        Raises:
            RequestError: EPERM.
        """
        start = bytearray(_SECTOR)
        await self.read_into(0, memoryview(start)[: min(_SECTOR, self.size)])
        start[offset : offset + len(data)] = data
        for name, where, magic in _MAGICS:
            if start[where : where + len(magic)] == magic:
                raise RequestError(
                    EPERM,
                    f"the format of this image was guessed to be raw, and this would"
                    f" make it look like {name}",
                )
