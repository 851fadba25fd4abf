"""What an open qcow2 image is made of besides guest data: its header, tables and their places.

Snapshots, resizing and amending change these, each in an order in which a power cut
leaves the old image or the new one, and leaks at most:

    new table in new clusters -> barrier -> one write within sector 0 -> barrier
    -> the old table's clusters are given back
"""

from array import array
from collections.abc import Awaitable, Callable
from dataclasses import replace

from nbdserve.errors import ImageError
from nbdserve.formats.mapped.entries import BITMAP_SHIFT, WORD_MASK
from nbdserve.formats.mapped.parts import Parts, Space
from nbdserve.formats.mapped.tables import Table, encode_entries, encode_words
from nbdserve.formats.qcow2.entries import COPIED, OFFSET_MASK
from nbdserve.formats.qcow2.header import (
    L1_GROUP_OFFSET,
    MAX_L1_BYTES,
    Header,
    encode_l1_group,
)
from nbdserve.formats.qcow2.refcounts import RefcountedPool
from nbdserve.formats.qcow2.tree import Tree, data_runs, difference, without_copied

#: From an L1 index to a table that no snapshot uses (`Allocator.table_for_change`).
TableForChange = Callable[[int], Awaitable[Table]]


def _both(
    one: tuple[int, int] | None, other: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Return the range from the first to the last of two, either of which may be None."""
    if one is None or other is None:
        return one or other
    return min(one[0], other[0]), max(one[1], other[1])


class Structure:
    """The header of one writable image as it is in the file, and ways to change tables.

    All of it wants the image alone (`MappedImage.exclusive`).

    Attributes:
        header: As it is in the file.
    """

    def __init__(self, parts: Parts, space: Space, header: Header) -> None:
        """Join the parts."""
        if not isinstance(space.pool, RefcountedPool):
            raise TypeError("this is not the space of a qcow2 image")
        self.parts = parts
        self.header = header
        self.pool: RefcountedPool = space.pool
        self.commit = space.commit
        self.tree = Tree(parts, space.pool)

    # -- clusters for tables

    async def take(self, length: int) -> int:
        """Take clusters for a table of `length` bytes: counted, durable, and zeros.

        Returns:
            Their host offset.
        """
        bits = self.parts.geometry.cluster_bits
        count = max(1, self.parts.geometry.align_up(length) >> bits)
        while (grant := self.pool.take_whole(count)) is None:
            await self.pool.refill(count)
        first = grant.host_offset >> bits
        self.pool.metadata.update(range(first, first + count))
        return grant.host_offset

    def give_back(self, host_offset: int, length: int) -> None:
        """Free the clusters of a table that nothing names any more."""
        if not length:
            return
        bits = self.parts.geometry.cluster_bits
        first, last = host_offset >> bits, host_offset + length - 1 >> bits
        self.pool.metadata.difference_update(range(first, last + 1))
        self.commit.free(host_offset, length)

    async def write_header(self, offset: int, data: bytes) -> None:
        """Change fields of sector 0, durably; what they name is durable already.

        Raises:
            OSError: Nobody knows which header the file has, so nothing more is written
                until the image is opened anew.
        """
        try:
            await self.parts.storage.write(offset, data)
        except OSError as error:
            self.commit.failed = error
            raise
        await self.commit.barrier()

    # -- COPIED flags

    async def clear_copied(self) -> None:
        """Clear COPIED in all active tables; durable after the next barrier."""
        l1 = self.parts.tables.l1
        for number in self.tree.numbers():
            table = await self._table(number)
            await self.rewrite(table, without_copied(table.words))
        await self.rewrite(l1, without_copied(l1.words))

    async def set_copied(self) -> None:
        """Set COPIED in the active tables wherever a refcount is 1, and clear it elsewhere."""
        l1 = self.parts.tables.l1
        bits = self.parts.geometry.cluster_bits
        size = self.parts.geometry.cluster_size
        entries = without_copied(l1.words)
        for number in self.tree.numbers():
            table = await self._table(number)
            words = without_copied(table.words)
            for index, host_offset, count in list(data_runs(words, size)):
                references = await self.pool.counts(host_offset >> bits, count)
                for position, value in enumerate(references, index):
                    if value == 1:
                        words[position] |= COPIED
            await self.rewrite(table, words)
            if await self.pool.references(table.host_offset) == 1:
                entries[number] |= COPIED
        await self.rewrite(l1, entries)

    async def _table(self, number: int) -> Table:
        table = await self.parts.tables.load(number)
        if table is None:
            raise ImageError(f"{self.parts.storage.name}: L1 entry {number} is gone")
        return table

    async def rewrite(
        self, table: Table, words: "array[int]", bitmaps: "array[int] | None" = None
    ) -> None:
        """Write those entries of a table that are others now, in the file and in memory.

        Args:
            table: What to change.
            words: Its words.
            bitmaps: Its bitmaps, if it has such and they change.
        """
        bitmaps = table.bitmaps if bitmaps is None else bitmaps
        changed = difference(table.words, words)
        if bitmaps is not None and table.bitmaps is not None:
            changed = _both(changed, difference(table.bitmaps, bitmaps))
        if changed is None:
            return
        first, end = changed[0], changed[1] + 1
        # what is read meanwhile must be this table, not another copy
        table.users += 1
        try:
            part = None if bitmaps is None else bitmaps[first:end]
            data = encode_entries(words[first:end], part)
            await self.parts.storage.put(table.place(first), data)
        finally:
            table.users -= 1
        table.words[:] = words
        if bitmaps is not None:
            table.bitmaps = bitmaps[:]
        table.kinds[first:end] = bytes(end - first)

    # -- what lies beyond the end of the disk

    async def drop_beyond(self, end: int, table_for_change: TableForChange) -> None:
        """Take all clusters from `end` on out of the mapping, and give them back.

        Args:
            end: Bytes; the cluster in which it lies is kept.
            table_for_change: Returns an L2 table that no snapshot uses.

        Raises:
            ImageCorruptError: What lies there can't be followed.
            OSError: Something could not be written.
        """
        geometry, l1 = self.parts.geometry, self.parts.tables.l1
        end = geometry.align_up(end)
        first = -(-end >> geometry.table_bits)
        words = l1.words[:first] + array("Q", bytes(8 * max(len(l1.words) - first, 0)))
        counts = await self.tree.count(l1.words[first:])
        number = end >> geometry.table_bits
        if number < first and l1.words[number]:
            table = await table_for_change(number)
            index = (end >> geometry.cluster_bits) & geometry.l2_entries - 1
            self.tree.count_entries(counts, table.words[index:])
            nothing = array("Q", bytes(8 * (geometry.l2_entries - index)))
            bitmaps = table.bitmaps
            if bitmaps is not None:
                bitmaps = bitmaps[:index] + nothing
            await self.rewrite(table, table.words[:index] + nothing, bitmaps)
            # copying the table has changed its entry
            words[number] = l1.words[number]
        await self.rewrite(l1, words)
        await self.commit.barrier()
        for gone in [each for each in self.parts.tables.cached if each >= first]:
            del self.parts.tables.cached[gone]
        await self.parts.pins.drained()
        await self.pool.unshare(counts)

    async def zero_entries(
        self, start: int, end: int, entry: int, table_for_change: TableForChange
    ) -> None:
        """Let empty whole clusters read as zeros where the backing file would show.

        Args:
            start: Bytes, a multiple of the cluster size; nothing is mapped from there on.
            end: Bytes.
            entry: That of a cluster of zeros, as a single number.
            table_for_change: Returns an L2 table that no snapshot uses.
        """
        geometry = self.parts.geometry
        cluster, last = start >> geometry.cluster_bits, geometry.align_up(end)
        last >>= geometry.cluster_bits
        while cluster < last:
            table = await table_for_change(cluster >> geometry.l2_bits)
            index = cluster & geometry.l2_entries - 1
            count = min(last - cluster, geometry.l2_entries - index)
            words = table.words[:]
            words[index : index + count] = array("Q", [entry & WORD_MASK]) * count
            bitmaps = None if table.bitmaps is None else table.bitmaps[:]
            if bitmaps is not None:
                bitmap = array("Q", [entry >> BITMAP_SHIFT])
                bitmaps[index : index + count] = bitmap * count
            await self.rewrite(table, words, bitmaps)
            cluster += count

    # -- the L1 table

    async def grow_l1(self, entries: int, place: int | None = None) -> None:
        """Move the L1 table to a larger place.

        Args:
            entries: At least as many as it has.
            place: Host offset of clusters taken for it; None takes some.

        Raises:
            ImageError: It would be larger than is allowed.
        """
        l1 = self.parts.tables.l1
        if 8 * entries > MAX_L1_BYTES:
            raise ImageError(
                f"{self.parts.storage.name}: would need {entries} L1 entries, at most"
                f" {MAX_L1_BYTES // 8} are allowed; larger clusters map more"
            )
        host_offset = await self.take(8 * entries) if place is None else place
        words = l1.words + array("Q", bytes(8 * (entries - len(l1.words))))
        try:
            await self.parts.storage.put(host_offset, encode_words(words))
            await self.commit.barrier()
        except BaseException:
            self.give_back(host_offset, 8 * entries)
            raise
        await self.write_header(L1_GROUP_OFFSET, encode_l1_group(entries, host_offset))
        old_offset, old_length = l1.host_offset, 8 * len(l1.words)
        self.adopt_l1(host_offset, words)
        self.give_back(old_offset, old_length)

    def adopt_l1(self, host_offset: int, words: "array[int]") -> None:
        """Let `words` at `host_offset` be the active L1 table in memory."""
        parts = self.parts
        l1 = parts.tables.l1
        l1.host_offset = host_offset
        l1.words = words
        l1.kinds = bytearray(len(words))
        self.header = replace(
            self.header, l1_size=len(words), l1_table_offset=host_offset
        )
        parts.geometry.l1_offset = host_offset
        parts.geometry.l1_entries = len(words)

    def set_size(self, size: int) -> None:
        """Let the header, which has it already, and the disk have another size."""
        self.header = replace(self.header, size=size)
        self.parts.geometry.size = self.header.disk_size

    def adopt_tree(self, host_offset: int, words: "array[int]") -> None:
        """Let another tree of tables be the active disk in memory."""
        bits = self.parts.geometry.cluster_bits
        self.parts.tables.cached.clear()
        self.adopt_l1(host_offset, words)
        self.pool.tables.clear()
        self.pool.tables.update((word & OFFSET_MASK) >> bits for word in words if word)
