"""Zeroes and discards: whole clusters leave the mapping, what is left is written."""

import asyncio
from array import array
from typing import Final

from nbdserve.formats.mapped.allocator import Allocator
from nbdserve.formats.mapped.commit import Committer
from nbdserve.formats.mapped.entries import (
    BAD,
    UNALLOCATED,
    ZERO,
)
from nbdserve.formats.mapped.mapping import Mapping
from nbdserve.formats.mapped.parts import Parts
from nbdserve.formats.mapped.tables import Table
from nbdserve.formats.mapped.write import Writer

_ZEROS: Final = memoryview(bytes(1 << 20))
#: Clusters changed between two looks at the event loop (about a millisecond).
_TURN: Final = 2048


class Discarder:
    """Zeroes and trims guest ranges of one image."""

    def __init__(
        self,
        parts: Parts,
        mapping: Mapping,
        allocator: Allocator,
        writer: Writer,
        commit: Committer,
    ) -> None:
        """Join the parts."""
        self._geometry = parts.geometry
        self._gate = parts.gate
        self._zero_word = parts.codec.zero_word
        self._mapping = mapping
        self._allocator = allocator
        self._writer = writer
        self._commit = commit
        self._backing_size = parts.backing_size

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fua: bool
    ) -> None:
        """Make a range read as zeros; see `BlockDevice.write_zeroes`."""
        self._commit.check_writable()
        end = offset + length
        first, last = self._whole_clusters(offset, end)
        if may_unmap and first < last:
            await self._zero_data(offset, first)
            await self._unmap(first, last, trim=False)
            await self._zero_data(last, end)
        elif may_unmap:
            await self._zero_data(offset, end)
        else:
            await self._write_zeros(offset, end)
        await self._settle(fua=fua)

    async def trim(self, offset: int, length: int, *, fua: bool) -> None:
        """Give whole clusters back; the rest of the range stays as it is."""
        self._commit.check_writable()
        first, last = self._whole_clusters(offset, offset + length)
        if first < last:
            await self._unmap(first, last, trim=True)
        await self._settle(fua=fua)

    async def zero_piece(self, offset: int, end: int) -> None:
        """Zero a piece of one cluster, behind the end of the disk too."""
        await self._zero_data(offset, end)

    async def _settle(self, *, fua: bool) -> None:
        self._commit.dirty = True
        self._commit.check()
        if fua or self._commit.writethrough or self._commit.exposed:
            await self._commit.flush()

    def _whole_clusters(self, offset: int, end: int) -> tuple[int, int]:
        """Return the part of a range that is made of whole clusters, in bytes.

        The last cluster of the disk counts as whole where the disk ends in it.
        """
        first = self._geometry.align_up(offset)
        last = end & -self._geometry.cluster_size
        if end == self._geometry.size:
            last = self._geometry.align_up(end)
        return first, max(first, last)

    async def _zero_data(self, offset: int, end: int) -> None:
        """Zero a piece smaller than a cluster, unless it reads as zeros already."""
        while offset < end:
            run = await self._mapping.run(offset, end)
            hole = run.kind == ZERO or (
                run.kind == UNALLOCATED and offset >= self._backing_size
            )
            if not hole:
                await self._write_zeros(offset, offset + run.length)
            offset += run.length

    async def _write_zeros(self, offset: int, end: int) -> None:
        """Write zeros as data, so that the range stays or becomes allocated."""
        while offset < end:
            piece = _ZEROS[: end - offset]
            await self._writer.write(offset, piece)
            offset += len(piece)
            # each piece may have been a megabyte written inline
            await asyncio.sleep(0)

    async def _unmap(self, offset: int, end: int, *, trim: bool) -> None:
        """Take whole clusters out of the mapping, or zero them where that can't be said."""
        end = min(end, self._geometry.size)
        while offset < end:
            run = await self._mapping.run(offset, end)
            if self._stays(run.kind, offset, trim=trim):
                offset += run.length
                continue
            shows_backing = offset < self._backing_size
            if self._zero_word is None and shows_backing:
                # no entry says "zeros" here, and an empty one would show the backing file
                if not trim:
                    await self._write_zeros(offset, offset + run.length)
                offset += run.length
                continue
            offset += await self._unmap_run(offset, end, trim=trim)

    def _stays(self, kind: int, offset: int, *, trim: bool) -> bool:
        """Return whether a run is as good as unmapped."""
        past_backing = offset >= self._backing_size
        if kind == UNALLOCATED:
            return trim or past_backing
        # a zero cluster behind which there is nothing can go as well
        return kind == ZERO and not (trim and past_backing)

    async def _unmap_run(self, offset: int, end: int, *, trim: bool) -> int:
        """Take some clusters of one table out of the mapping; return their bytes."""
        gate = self._gate
        if gate.closed:
            await gate.opened()
        gate.enter()
        try:
            return await self._unmap_gated(offset, end, trim=trim)
        finally:
            gate.leave()

    async def _unmap_gated(self, offset: int, end: int, *, trim: bool) -> int:
        geometry = self._geometry
        table = await self._allocator.table_for_change(offset >> geometry.table_bits)
        cluster = offset >> geometry.cluster_bits
        index = cluster & (geometry.l2_entries - 1)
        if cluster in self._allocator.busy:
            await self._allocator.busy.wait(cluster)
            return 0
        most = (geometry.align_up(end) >> geometry.cluster_bits) - cluster
        count = self._count(table, index, cluster, min(most, _TURN), trim=trim)
        if not count:
            return geometry.cluster_size
        # Bytes past the backing file's end are zeros without an entry that says so.
        empty = self._zero_word is None or (trim and offset >= self._backing_size)
        word = 0 if empty or self._zero_word is None else self._zero_word
        clusters = range(cluster, cluster + count)
        for each in clusters:
            self._allocator.busy.enter(each)
        table.users += 1
        try:
            freed = self._allocator.named(table, index, count)
            survives = await self._commit.change(
                table,
                index,
                array("Q", [word]) * count,
                ZERO if word else UNALLOCATED,
                hold=False,
            )
            for host_offset, length in freed:
                self._commit.free(host_offset, length)
        finally:
            table.users -= 1
            for each in clusters:
                self._allocator.busy.leave(each)
        if not survives:
            await self._commit.flush()
        elif count == _TURN:
            await asyncio.sleep(0)
        return count << geometry.cluster_bits

    def _count(
        self, table: Table, index: int, cluster: int, most: int, *, trim: bool
    ) -> int:
        """Return how many entries from `index` on change in the same way."""
        bits = self._geometry.cluster_bits
        first_shows = cluster << bits < self._backing_size
        count = 0
        for position in range(index, min(index + most, len(table.words))):
            offset = cluster + count << bits
            kind = self._mapping.kind(table, position)
            if kind == BAD:
                raise self._mapping.corrupt(
                    offset, table.words[position], "is not valid"
                )
            if (
                self._stays(kind, offset, trim=trim)
                or (offset < self._backing_size) != first_shows
                or cluster + count in self._allocator.busy
            ):
                break
            count += 1
        return count
