"""What is different in an encrypted image: its bytes come in whole sectors.

Requests of any alignment work all the same. What covers a part of a sector is read,
changed and written again, and has the image alone meanwhile: another write to the
rest of that sector would be undone. Clients are told to keep to sectors, so that is rare.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from nbdserve.block.device import Hole
from nbdserve.formats.crypto.luks import SECTOR
from nbdserve.formats.mapped.discard import Discarder
from nbdserve.formats.mapped.gate import Gate
from nbdserve.formats.mapped.read import Reader
from nbdserve.formats.mapped.write import Writer
from nbdserve.storage.base import Buffer


class SectorReader:
    """Reads guest ranges of any alignment from an encrypted image."""

    def __init__(self, reader: Reader) -> None:
        """`reader` takes whole sectors."""
        self._reader = reader

    async def read_into(self, offset: int, buffer: memoryview) -> Sequence[Hole]:
        """Fill `buffer`; see `BlockDevice.read_into`."""
        if not (offset | len(buffer)) % SECTOR:
            return await self._reader.read_into(offset, buffer)
        start, end = _sectors(offset, len(buffer))
        whole = memoryview(bytearray(end - start))
        await self._reader.read_into(start, whole)
        buffer[:] = whole[offset - start : offset - start + len(buffer)]
        return ()


class SectorWriter:
    """Changes guest ranges of any alignment in an encrypted image."""

    def __init__(self, reader: Reader, writer: Writer, discarder: Discarder) -> None:
        """All of them take whole sectors."""
        self._gate = Gate()
        self._reader = reader
        self._writer = writer
        self._discarder = discarder

    async def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """Write `data`; see `BlockDevice.write`."""
        if (offset | len(data)) % SECTOR:
            async with self._gate.alone():
                await self._write_alone(offset, data, fua=fua)
            return
        async with self._among_others():
            await self._writer.write(offset, data, fua=fua)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fua: bool
    ) -> None:
        """Make a range read as zeros; see `BlockDevice.write_zeroes`."""
        end = offset + length
        if not (offset | length) % SECTOR:
            async with self._among_others():
                await self._discarder.write_zeroes(
                    offset, length, may_unmap=may_unmap, fua=fua
                )
            return
        first, last = -(-offset // SECTOR) * SECTOR, end // SECTOR * SECTOR
        async with self._gate.alone():
            if first >= last:
                await self._write_alone(offset, bytes(length), fua=fua)
                return
            await self._write_alone(offset, bytes(first - offset))
            await self._write_alone(last, bytes(end - last))
            await self._discarder.write_zeroes(
                first, last - first, may_unmap=may_unmap, fua=fua
            )

    async def trim(self, offset: int, length: int, *, fua: bool) -> None:
        """Give whole clusters back; see `BlockDevice.trim`."""
        async with self._among_others():
            await self._discarder.trim(offset, length, fua=fua)

    @asynccontextmanager
    async def _among_others(self) -> AsyncIterator[None]:
        if self._gate.closed:
            await self._gate.opened()
        self._gate.enter()
        try:
            yield
        finally:
            self._gate.leave()

    async def _write_alone(
        self, offset: int, data: Buffer, *, fua: bool = False
    ) -> None:
        """Write parts of sectors while nothing else changes."""
        if not data:
            return
        start, end = _sectors(offset, len(data))
        whole = bytearray(end - start)
        view = memoryview(whole)
        await self._reader.read_into(start, view[:SECTOR])
        await self._reader.read_into(end - SECTOR, view[-SECTOR:])
        whole[offset - start : offset - start + len(data)] = data
        await self._writer.write(start, whole, fua=fua)


def _sectors(offset: int, length: int) -> tuple[int, int]:
    """Return where the sectors that a range touches begin and end."""
    return offset // SECTOR * SECTOR, -(-(offset + length) // SECTOR) * SECTOR
