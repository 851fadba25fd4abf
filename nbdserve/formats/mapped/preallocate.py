"""Giving clusters their places before anything is written to them.

A cluster of the pool reads as zeros, durably, so an entry may name it at once. A cluster
of an external data file has its place already; it is zeroed first.
"""

import asyncio
from array import array
from collections.abc import AsyncIterator

from nbdserve.formats.mapped import subclusters
from nbdserve.formats.mapped.allocator import Allocator
from nbdserve.formats.mapped.entries import (
    BAD,
    OWNED,
    UNALLOCATED,
    ZERO,
    ZERO_ALLOCATED,
)
from nbdserve.formats.mapped.mapping import Mapping
from nbdserve.formats.mapped.parts import Parts, Space
from nbdserve.formats.mapped.tables import Table

#: Clusters mapped by one step: a table's worth.
_MOST = 1 << 13


class Preallocator:
    """Maps ranges of one image that read as zeros."""

    def __init__(
        self, parts: Parts, mapping: Mapping, allocator: Allocator, space: Space
    ) -> None:
        """Join the parts."""
        self._parts = parts
        self._mapping = mapping
        self._allocator = allocator
        self._space = space

    async def map_range(self, offset: int, end: int) -> AsyncIterator[tuple[int, int]]:
        """Map each cluster of a range that has no place yet and no backing file behind it.

        Args:
            offset: Bytes; the cluster in which it lies is mapped too.
            end: Bytes.

        Yields:
            Offset and length in the file that holds guest data, in order.

        Raises:
            ImageCorruptError: An entry is not valid.
            OSError: There is no space, or a file can't be written.
        """
        geometry, gate = self._parts.geometry, self._parts.gate
        cluster = offset >> geometry.cluster_bits
        last = geometry.align_up(end) >> geometry.cluster_bits
        while cluster < last:
            if gate.closed:
                await gate.opened()
            gate.enter()
            try:
                count, host_offset = await self._map(
                    cluster, min(last - cluster, _MOST)
                )
            finally:
                gate.leave()
            if host_offset is not None:
                yield host_offset, count << geometry.cluster_bits
            cluster += count
            await asyncio.sleep(0)

    async def _map(self, cluster: int, most: int) -> tuple[int, int | None]:
        """Map up to `most` clusters; return how many were looked at, and where they are."""
        geometry, busy = self._parts.geometry, self._allocator.busy
        table = await self._allocator.table_for_change(cluster >> geometry.l2_bits)
        if cluster in busy:
            await busy.wait(cluster)
            return 0, None
        index = cluster & geometry.l2_entries - 1
        count = self._count(table, index, cluster, most)
        if not count:
            return 1, None
        place = self._place(cluster, count)
        if place is None:
            await self._space.pool.refill()
            return 0, None
        host_offset, count = place
        clusters = range(cluster, cluster + count)
        for each in clusters:
            busy.enter(each)
        table.users += 1
        try:
            await self._link(table, index, host_offset, count)
        finally:
            table.users -= 1
            for each in clusters:
                busy.leave(each)
        return count, host_offset

    def _place(self, cluster: int, count: int) -> tuple[int, int] | None:
        if self._parts.external:
            return cluster << self._parts.geometry.cluster_bits, count
        grant = self._space.pool.take(count)
        return None if grant is None else (grant.host_offset, grant.clusters)

    async def _link(
        self, table: Table, index: int, host_offset: int, count: int
    ) -> None:
        """Point entries at clusters that read as zeros."""
        geometry, commit = self._parts.geometry, self._space.commit
        length = count << geometry.cluster_bits
        try:
            if self._parts.external:
                await self._parts.data.punch(host_offset, length)
                await commit.barrier()
            replaced = self._allocator.named(table, index, count)
            first, size = self._parts.codec.link(host_offset), geometry.cluster_size
            words = array("Q", range(first, first + count * size, size))
            bitmaps = None
            if table.bitmaps is not None:
                bitmaps = array("Q", [subclusters.ALL]) * count
            survives = await commit.change(
                table, index, words, OWNED, hold=False, bitmaps=bitmaps
            )
        except BaseException:
            if not self._parts.external:
                commit.free(host_offset, length)
            raise
        for extent in replaced:
            commit.free(*extent)
        if not survives:
            await commit.flush()

    def _count(self, table: Table, index: int, cluster: int, most: int) -> int:
        """Return how many entries from `index` on read as zeros and have no place."""
        bits, backing_size = self._parts.geometry.cluster_bits, self._parts.backing_size
        count = 0
        for position in range(index, min(index + most, len(table.words))):
            offset = cluster + count << bits
            kind = self._mapping.kind(table, position)
            if kind == BAD:
                raise self._mapping.corrupt(
                    offset, table.words[position], "is not valid"
                )
            shows = kind == UNALLOCATED and offset < backing_size
            if kind not in (UNALLOCATED, ZERO, ZERO_ALLOCATED) or shows:
                break
            if cluster + count in self._allocator.busy:
                break
            count += 1
        return count
