"""Zeroes and discards: whole clusters leave the mapping, what is left is written.

With extended entries whole subclusters do; their cluster goes with the last of them.
"""

import asyncio
from array import array
from typing import Final

from nbdserve.block.zeros import zeros
from nbdserve.formats.mapped import subclusters
from nbdserve.formats.mapped.allocator import Allocator
from nbdserve.formats.mapped.commit import Committer
from nbdserve.formats.mapped.entries import (
    BAD,
    BITMAP_SHIFT,
    COMPRESSED,
    NORMAL,
    OWNED,
    SPLIT_OWNED,
    SPLIT_UNPLACED,
    SPLIT_UNPUBLISHED,
    UNALLOCATED,
    UNPUBLISHED,
    WHOLE,
    WORD_MASK,
    ZERO,
    ZERO_ALLOCATED,
)
from nbdserve.formats.mapped.external import ExternalZeros
from nbdserve.formats.mapped.mapping import Mapping
from nbdserve.formats.mapped.parts import Parts
from nbdserve.formats.mapped.tables import Table
from nbdserve.formats.mapped.write import Writer

_OWNED: Final = {UNPUBLISHED: OWNED, SPLIT_UNPUBLISHED: SPLIT_OWNED}
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
        self._zero_entry = parts.codec.zero_entry
        self._mapping = mapping
        self._allocator = allocator
        self._writer = writer
        self._commit = commit
        self._backing_size = parts.backing_size
        self._external = ExternalZeros(parts, mapping, allocator, writer, commit)
        self._is_external, self._is_raw = parts.external, parts.raw

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fua: bool
    ) -> None:
        """Make a range read as zeros; see `BlockDevice.write_zeroes`."""
        self._commit.check_writable()
        end = offset + length
        if self._is_raw:
            await self._external.zero_in_place(offset, end, unmap=may_unmap)
            await self._settle(fua=fua)
            return
        first, last = self._whole_grains(offset, end)
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
        """Give whole (sub)clusters back; the rest of the range stays as it is."""
        self._commit.check_writable()
        first, last = self._whole_grains(offset, offset + length)
        if first < last and self._is_raw:
            end = min(last, self._geometry.size)
            await self._external.zero_in_place(first, end, unmap=True)
        elif first < last:
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

    def _whole_grains(self, offset: int, end: int) -> tuple[int, int]:
        """Return the part of a range that is made of whole subclusters, in bytes.

        Where there are no subclusters, clusters take their place. What lies behind the
        end of the disk counts as part of the range that ends there.
        """
        grain = self._geometry.grain
        first = -(-offset // grain) * grain
        last = end & -grain
        if end == self._geometry.size:
            last = self._geometry.align_up(end)
        return first, max(first, last)

    async def _zero_data(self, offset: int, end: int) -> None:
        """Zero a piece smaller than a grain, unless it reads as zeros already."""
        while offset < end:
            run = await self._mapping.run(offset, end)
            hole = run.kind in (ZERO, ZERO_ALLOCATED) or (
                run.kind == UNALLOCATED and offset >= self._backing_size
            )
            if not hole:
                await self._write_zeros(offset, offset + run.length)
            offset += run.length

    async def _write_zeros(self, offset: int, end: int) -> None:
        """Write zeros as data, so that the range stays or becomes allocated."""
        while offset < end:
            piece = zeros(offset, end)
            await self._writer.write(offset, piece)
            offset += len(piece)
            # each piece may have been a megabyte written inline
            await asyncio.sleep(0)

    async def _unmap(self, offset: int, end: int, *, trim: bool) -> None:
        """Take whole grains out of the mapping, or zero them where that can't be said."""
        cluster_size = self._geometry.cluster_size
        # what lies behind the end of the disk goes with its last cluster
        stop = end if end < self._geometry.size else self._geometry.align_up(end)
        end = min(end, self._geometry.size)
        while offset < end:
            run = await self._mapping.run(offset, end)
            if self._stays(run.kind, offset, trim=trim):
                offset += run.length
                continue
            part = offset % cluster_size or stop - offset < cluster_size
            shows_backing = offset < self._backing_size
            # No entry says "zeros" for a part of a compressed cluster; in version 2 none
            # does for any cluster, and an empty one would show the backing file.
            unsayable = part and run.kind == COMPRESSED
            if unsayable or (self._zero_entry is None and shows_backing):
                if not trim:
                    await self._write_zeros(offset, offset + run.length)
                offset += run.length
                continue
            offset += await self._unmap_run(offset, stop, trim=trim)

    def _stays(self, kind: int, offset: int, *, trim: bool) -> bool:
        """Return whether a run is as good as unmapped."""
        past_backing = offset >= self._backing_size
        if kind == UNALLOCATED:
            return trim or past_backing
        # a zero cluster behind which there is nothing can go as well
        return kind == ZERO and not (trim and past_backing)

    async def _unmap_run(self, offset: int, end: int, *, trim: bool) -> int:
        """Take clusters of one table, or part of one, out of the mapping; return the bytes."""
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
        within = offset & (geometry.cluster_size - 1)
        if within or end - offset < geometry.cluster_size:
            length = min(geometry.cluster_size - within, end - offset)
            mask = subclusters.touched(within, length, geometry.cluster_bits)
            done = await self._unmap_part(table, index, cluster, mask, trim=trim)
            return length if done else 0
        most = (end >> geometry.cluster_bits) - cluster
        count = self._count(table, index, cluster, min(most, _TURN), trim=trim)
        if not count:
            return geometry.cluster_size
        # Bytes past the backing file's end are zeros without an entry that says so.
        empty = self._zero_entry is None or (trim and offset >= self._backing_size)
        entry = 0 if empty or self._zero_entry is None else self._zero_entry
        clusters = range(cluster, cluster + count)
        for each in clusters:
            self._allocator.busy.enter(each)
        table.users += 1
        try:
            freed = self._allocator.named(table, index, count)
            survives = await self._commit.change(
                table,
                index,
                array("Q", [entry & WORD_MASK]) * count,
                ZERO if entry else UNALLOCATED,
                hold=False,
                bitmaps=array("Q", [entry >> BITMAP_SHIFT]) * count,
            )
            self._give_back(freed, cluster, count)
        finally:
            table.users -= 1
            for each in clusters:
                self._allocator.busy.leave(each)
        if not survives:
            await self._commit.flush()
        elif count == _TURN:
            await asyncio.sleep(0)
        return count << geometry.cluster_bits

    async def _unmap_part(
        self, table: Table, index: int, cluster: int, mask: int, *, trim: bool
    ) -> bool:
        """Take subclusters out of the mapping; return False if they must be looked at again.

        They leave the place that they have in the host cluster behind, whatever it
        holds. Nobody else gets it, so nothing has to wait for that.
        """
        kind = self._mapping.kind(table, index)
        if kind == BAD:
            start = cluster << self._geometry.cluster_bits
            raise self._mapping.corrupt(start, table.words[index], "is not valid")
        if kind == COMPRESSED:
            return False
        entry = table.entry(index)
        bitmap = entry >> BITMAP_SHIFT
        there, zeros = subclusters.allocated(bitmap), subclusters.zero(bitmap)
        if trim:
            mask &= there
        there &= ~mask
        if trim and cluster << self._geometry.cluster_bits >= self._backing_size:
            zeros &= ~mask
        else:
            zeros |= mask
        wanted = zeros << subclusters.COUNT | there
        if wanted == bitmap:
            return True
        word = entry & WORD_MASK if there else 0
        if there:
            # whether its link is in the file is for the commit to say
            kind = _OWNED.get(kind, kind)
            kind = kind if kind < NORMAL else kind - WHOLE
        elif zeros:
            kind = ZERO if zeros == subclusters.ALL else SPLIT_UNPLACED
        else:
            kind = UNALLOCATED
        self._allocator.busy.enter(cluster)
        table.users += 1
        try:
            freed = [] if there else self._allocator.named(table, index, 1)
            survives = await self._commit.change(
                table,
                index,
                array("Q", [word]),
                kind,
                hold=False,
                bitmaps=array("Q", [wanted]),
            )
            self._give_back(freed, cluster, 0 if there else 1)
        finally:
            table.users -= 1
            self._allocator.busy.leave(cluster)
        if not survives:
            await self._commit.flush()
        return True

    def _give_back(
        self, freed: list[tuple[int, int]], cluster: int, count: int
    ) -> None:
        """Free what `count` clusters from `cluster` on had named."""
        for host_offset, length in freed:
            self._commit.free(host_offset, length)
        if self._is_external and count:
            bits = self._geometry.cluster_bits
            self._commit.vacate(cluster << bits, count << bits)

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
