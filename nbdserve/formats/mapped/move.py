"""Moving clusters to another place in the file, while clients go on reading and writing.

A move is a copying write in which the guest changes nothing. Its cluster is entered at
the allocator's turnstile, so that allocations and discards of it wait, and counts as shared
meanwhile, so that nobody writes in place; who did so before is waited for. Readers use
the old place until the link is in memory:

    copy -> barrier -> word (held, commit.py) -> barrier -> the old cluster loses its reference

*Crash before the word is durable: the old place, with all its bytes, and a leak; after it:
the new place, and a leak at most.*

An L2 table moves with the gate closed and no word held, so that nothing of it changes:

    copy -> barrier -> its word in the L1 table -> (next commit) barrier -> the old one is free
"""

from array import array
from typing import Final

from nbdserve.formats.mapped.allocator import Allocator
from nbdserve.formats.mapped.entries import (
    BITMAP_SHIFT,
    NORMAL,
    OWNED,
    SHARED,
    SPLIT,
    SPLIT_OWNED,
    UNKNOWN,
    WHOLE,
    WORD_MASK,
    ZERO,
    ZERO_ALLOCATED,
)
from nbdserve.formats.mapped.mapping import Mapping
from nbdserve.formats.mapped.parts import Parts, Space
from nbdserve.formats.mapped.pool import Grant
from nbdserve.formats.mapped.tables import Table, encode_entries

#: Plain clusters that are ours alone, as far as is known.
_MOVABLE: Final = (NORMAL, OWNED, SPLIT, SPLIT_OWNED)


class Mover:
    """Moves clusters and L2 tables of one image."""

    def __init__(
        self, parts: Parts, space: Space, mapping: Mapping, allocator: Allocator
    ) -> None:
        """Join the parts."""
        self._parts = parts
        self._data = parts.data
        self._geometry = parts.geometry
        self._mask = parts.codec.l2_offset_mask
        self._space = space
        self._commit = space.commit
        self._mapping = mapping
        self._allocator = allocator

    def give_back(self, grant: Grant) -> None:
        """Free clusters that were taken; something may have been written to them."""
        bits = self._geometry.cluster_bits
        self._commit.free(grant.host_offset, grant.clusters << bits)

    async def move(self, guest_cluster: int, host_offset: int, grant: Grant) -> bool:
        """Move plain clusters that lie side by side, for the guest and in the file.

        Args:
            guest_cluster: The first one; all of them are in one L2 table.
            host_offset: Where it is expected to lie.
            grant: As many clusters, durably reserved, where they are to lie. They are
                still the caller's if nothing is moved.

        Returns:
            Whether they were moved: not if they lie elsewhere by now, are used by others
            as well, or somebody is changing them.

        Raises:
            OSError: They can't be read or written; they stay where they are.
        """
        gate = self._parts.gate
        if gate.closed:
            await gate.opened()
        gate.enter()
        try:
            try:
                table = await self._prepared(guest_cluster, host_offset, grant.clusters)
            except BaseException:
                self.give_back(grant)
                raise
            if table is not None:
                await self._move(table, guest_cluster, host_offset, grant)
        finally:
            gate.leave()
        return table is not None

    async def _prepared(
        self, guest_cluster: int, host_offset: int, count: int
    ) -> Table | None:
        """Return the table of clusters if they can be moved now."""
        self._commit.check_writable()
        l2_bits = self._geometry.l2_bits
        table = await self._allocator.table_for_change(guest_cluster >> l2_bits)
        index = guest_cluster & (1 << l2_bits) - 1
        size = self._geometry.cluster_size
        table.users += 1
        try:
            for each in range(count):
                # another cluster may lie there by now, or none
                if await self._space.pool.references(host_offset + each * size) != 1:
                    return None
        finally:
            table.users -= 1
        # from here to the turnstile nothing else runs
        for each in range(count):
            expected = host_offset + each * size
            if (
                guest_cluster + each in self._allocator.busy
                or self._mapping.kind(table, index + each) not in _MOVABLE
                or table.words[index + each] & self._mask != expected
                or self._commit.holds(table, index + each)
            ):
                return None
        return table

    async def _move(
        self, table: Table, guest_cluster: int, host_offset: int, grant: Grant
    ) -> None:
        index = guest_cluster & (1 << self._geometry.l2_bits) - 1
        count, size = grant.clusters, self._geometry.cluster_size
        busy = self._allocator.busy
        clusters = range(guest_cluster, guest_cluster + count)
        for each in clusters:
            busy.enter(each)
        table.users += 1
        for position in range(index, index + count):
            split = table.kinds[position] < NORMAL
            table.kinds[position] = SHARED - WHOLE if split else SHARED
        try:
            # who writes in place goes on until here, and nobody begins
            await self._parts.pins.drained()
            await self._copy(guest_cluster, host_offset, grant)
            replaced = self._allocator.named(table, index, count)
            first = self._parts.codec.link(grant.host_offset)
            words = array("Q", range(first, first + count * size, size))
            bitmaps, kind = None, OWNED
            if table.bitmaps is not None:
                bitmaps = table.bitmaps[index : index + count]
                # which of them are split is looked at again
                kind = UNKNOWN
            await self._commit.change(
                table, index, words, kind, hold=True, bitmaps=bitmaps
            )
            for old_offset, length in replaced:
                self._commit.free(old_offset, length)
        except BaseException:
            # whose they are is looked up again
            table.kinds[index : index + count] = bytes(count)
            self.give_back(grant)
            raise
        finally:
            table.users -= 1
            for each in clusters:
                busy.leave(each)

    async def _copy(self, guest_cluster: int, host_offset: int, grant: Grant) -> None:
        """Copy clusters, but for those that are zeros, as the new ones are."""
        size = self._geometry.cluster_size
        data = memoryview(bytearray(grant.clusters * size))
        if not self._data.try_read(host_offset, data):
            await self._data.read(host_offset, data)
        cipher = self._parts.cipher
        if cipher is not None:
            # the same bytes are encrypted in another way at another place
            guest_offset = guest_cluster << self._geometry.cluster_bits
            await cipher.decrypt(data, guest_offset, host_offset)
            await self._parts.put_encrypted(
                cipher, guest_offset, grant.host_offset, data
            )
            return
        zeros = bytes(size)
        first = 0
        for each in range(0, len(data) + size, size):
            if each < len(data) and data[each : each + size] != zeros:
                continue
            if first < each:
                await self._data.put(grant.host_offset + first, data[first:each])
            first = each + size

    async def drop_place(self, guest_cluster: int, host_offset: int) -> bool:
        """Let a cluster of zeros do without the place that it keeps in the file.

        Args:
            guest_cluster: Its number.
            host_offset: Where it is expected to lie.

        Returns:
            Whether it was such a cluster.

        Raises:
            OSError: Its entry can't be written.
        """
        gate = self._parts.gate
        if gate.closed:
            await gate.opened()
        gate.enter()
        try:
            return await self._drop_place(guest_cluster, host_offset)
        finally:
            gate.leave()

    async def _drop_place(self, guest_cluster: int, host_offset: int) -> bool:
        l2_bits = self._geometry.l2_bits
        table = await self._allocator.table_for_change(guest_cluster >> l2_bits)
        index = guest_cluster & (1 << l2_bits) - 1
        entry = self._parts.codec.zero_entry
        if (
            entry is None
            or guest_cluster in self._allocator.busy
            or self._mapping.kind(table, index) != ZERO_ALLOCATED
            or table.words[index] & self._mask != host_offset
        ):
            return False
        self._allocator.busy.enter(guest_cluster)
        table.users += 1
        try:
            await self._commit.change(
                table,
                index,
                array("Q", [entry & WORD_MASK]),
                ZERO,
                hold=False,
                bitmaps=array("Q", [entry >> BITMAP_SHIFT]),
            )
            self._commit.free(host_offset, self._geometry.cluster_size)
        finally:
            table.users -= 1
            self._allocator.busy.leave(guest_cluster)
        return True

    async def move_table(self, number: int, host_offset: int, grant: Grant) -> bool:
        """Move an L2 table; changes of the mapping wait meanwhile.

        Args:
            number: Its L1 index.
            host_offset: Where it is expected to lie.
            grant: The clusters for it, durably reserved; still the caller's if nothing is
                moved.

        Returns:
            Whether it was moved: not if it lies elsewhere by now, or a snapshot uses it.

        Raises:
            OSError: It can't be written; it stays where it is.
        """
        await self._space.prepare()
        async with self._parts.gate.alone():
            # a held word would be written to the old place
            await self._commit.flush()
            table = await self._parts.tables.load(number)
            if (
                table is None
                or table.host_offset != host_offset
                or await self._space.pool.references(host_offset) != 1
            ):
                return False
            if not await self._relocate(table, grant):
                # Nobody may write to the table before: killing the server would lose that.
                await self._commit.flush()
        return True

    async def _relocate(self, table: Table, grant: Grant) -> bool:
        """Write a table to its new place and link it; return whether that survives a kill."""
        old_offset = table.host_offset
        table.users += 1
        try:
            await self._parts.storage.write(
                grant.host_offset, encode_entries(table.words, table.bitmaps)
            )
            await self._commit.barrier()
            word = array("Q", [self._parts.codec.link(grant.host_offset)])
            survives = await self._commit.change(
                self._parts.tables.l1, table.number, word, OWNED, hold=False
            )
        except BaseException:
            self.give_back(grant)
            raise
        finally:
            table.users -= 1
        bits = self._geometry.cluster_bits
        first = grant.host_offset >> bits
        self._space.pool.tables.update(range(first, first + grant.clusters))
        table.host_offset = grant.host_offset
        self._commit.free(old_offset, grant.clusters << bits)
        return survives
