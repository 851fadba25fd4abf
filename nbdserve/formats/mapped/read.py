"""Reading: from the mapping, the backing file, or the compressed clusters."""

from collections.abc import Sequence

from nbdserve.block.device import BlockDevice, Hole
from nbdserve.block.zeros import clear
from nbdserve.formats.mapped.entries import (
    BAD,
    COMPRESSED,
    NORMAL,
    UNALLOCATED,
    UNKNOWN,
)
from nbdserve.formats.mapped.inflate import Inflater
from nbdserve.formats.mapped.mapping import Mapping, Run
from nbdserve.formats.mapped.parts import Parts


class Reader:
    """Reads guest ranges of one image."""

    def __init__(self, parts: Parts, mapping: Mapping, inflater: Inflater) -> None:
        """Join the parts."""
        geometry = parts.geometry
        self._data = parts.data
        self._cipher = parts.cipher
        self._cached = parts.tables.cached
        self._l1 = parts.tables.l1
        self._mapping = mapping
        self._inflater = inflater
        self._pins = parts.pins
        self._backing = parts.backing
        self._table_bits = geometry.table_bits
        self._cluster_bits = geometry.cluster_bits
        self._cluster_size = geometry.cluster_size
        self._index_mask = geometry.l2_entries - 1
        self._offset_mask = parts.codec.l2_offset_mask

    async def read_into(self, offset: int, buffer: memoryview) -> Sequence[Hole]:
        """Fill `buffer`; see `BlockDevice.read_into`."""
        within = offset & (self._cluster_size - 1)
        if within + len(buffer) > self._cluster_size:
            return await self._read_runs(offset, buffer)
        number = offset >> self._table_bits
        table = self._cached.get(number)
        if table is not None:
            index = (offset >> self._cluster_bits) & self._index_mask
            kind = table.kinds[index] or self._mapping.kind(table, index)
            if kind >= NORMAL:
                table.recent = True
                host_offset = (table.words[index] & self._offset_mask) + within
                if not self._data.try_read(host_offset, buffer):
                    await self._read_slowly(host_offset, buffer)
                if self._cipher is not None:
                    await self._cipher.decrypt(buffer, offset, host_offset)
                return ()
            if kind == COMPRESSED:
                table.recent = True
                word = table.words[index]
                if not self._inflater.try_read(word, within, buffer):
                    await self._inflater.read(word, within, buffer)
                return ()
        else:
            kind = UNKNOWN if self._l1.words[number] else UNALLOCATED
        backing = self._backing
        if kind == UNALLOCATED and backing and offset + len(buffer) <= backing.size:
            return await backing.read_into(offset, buffer)
        return await self._read_runs(offset, buffer)

    async def _read_runs(self, offset: int, buffer: memoryview) -> Sequence[Hole]:
        """Read piece by piece, each of one kind."""
        holes: list[Hole] = []
        position, length = 0, len(buffer)
        end = offset + length
        while position < length:
            run = await self._mapping.run(offset + position, end)
            piece = buffer[position : position + run.length]
            if run.kind >= NORMAL:
                if not self._data.try_read(run.host_offset, piece):
                    await self._read_slowly(run.host_offset, piece)
                if self._cipher is not None:
                    guest_offset = offset + position
                    await self._cipher.decrypt(piece, guest_offset, run.host_offset)
            else:
                for start, size in await self._read_other(
                    run, offset + position, piece
                ):
                    if holes and sum(holes[-1]) == position + start:
                        holes[-1] = (holes[-1][0], holes[-1][1] + size)
                    else:
                        holes.append((position + start, size))
            position += run.length
        return holes

    async def _read_slowly(self, host_offset: int, view: memoryview) -> None:
        generation = self._pins.enter()
        try:
            await self._data.read(host_offset, view)
        finally:
            self._pins.leave(generation)

    async def _read_other(
        self, run: Run, guest_offset: int, view: memoryview
    ) -> Sequence[Hole]:
        """Read a run that is not plain host clusters."""
        if run.kind == UNALLOCATED and self._backing is not None:
            return await self.read_backing(self._backing, guest_offset, view)
        if run.kind == COMPRESSED:
            within = guest_offset & (self._cluster_size - 1)
            if not self._inflater.try_read(run.word, within, view):
                await self._inflater.read(run.word, within, view)
            return ()
        if run.kind == BAD:
            raise self._mapping.corrupt(guest_offset, run.word, "is not valid")
        clear(view)
        return ((0, len(view)),)

    @staticmethod
    async def read_backing(
        backing: BlockDevice, offset: int, view: memoryview
    ) -> Sequence[Hole]:
        """Read from a backing file, which may be shorter: what it lacks is zeros."""
        length = len(view)
        if offset + length <= backing.size:
            return await backing.read_into(offset, view)
        there = max(backing.size - offset, 0)
        holes = list(await backing.read_into(offset, view[:there])) if there else []
        clear(view[there:])
        if holes and sum(holes[-1]) == there:
            there = holes.pop()[0]
        holes.append((there, length - there))
        return holes
