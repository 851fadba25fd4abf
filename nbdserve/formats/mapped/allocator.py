"""The allocation of clusters: four steps, each with its own way back.

    L2_ALLOC    take zeroed clusters for an L2 table          (only if the L1 entry is empty,
    L2_LINK     point the L1 entry at it                       or the table is shared)
    DATA_ALLOC  take a cluster, put the guest's bytes there (and, for a partial write over
                something, the old bytes around them)
    DATA_LINK   point the L2 entry at it; the write is done

When a step fails, what this allocation took goes through `Committer.free`: a
word or cluster that was ever passed to a write call may be in the file, so it is used
again only after a commit. The table words are still the old ones then, and nothing of the
neighbours is touched.

Requests that meet at the same cluster or table wait at a turnstile, and look again at
everything when they get through.
"""

from array import array
from dataclasses import dataclass, field
from enum import Enum, auto

from nbdserve.formats.mapped.entries import (
    BAD,
    COMPRESSED,
    NORMAL,
    OWNED,
    SHARED,
    UNALLOCATED,
    UNPUBLISHED,
    ZERO_ALLOCATED,
)
from nbdserve.formats.mapped.mapping import Mapping
from nbdserve.formats.mapped.parts import Parts, Space
from nbdserve.formats.mapped.pool import Grant
from nbdserve.formats.mapped.read import Reader
from nbdserve.formats.mapped.tables import Table, encode_words
from nbdserve.formats.mapped.waits import Turnstile


class Step(Enum):
    """Where an allocation is."""

    L2_ALLOC = auto()
    L2_LINK = auto()
    DATA_ALLOC = auto()
    DATA_LINK = auto()


@dataclass(slots=True)
class TableAllocation:
    """A new L2 table: empty, or a copy of one that a snapshot uses too.

    Attributes:
        number: Its L1 index.
        old: The shared table, if there is one.
        host_offset: Where the new one is, once taken.
    """

    number: int
    old: Table | None
    step: Step = Step.L2_ALLOC
    host_offset: int = 0


@dataclass(slots=True)
class DataAllocation:
    """Clusters for one write, contiguous for the guest and in the file.

    Attributes:
        table: The L2 table, which is this disk's own.
        index: The first entry.
        data: What to write, beginning `within` bytes into the first cluster.
        within: Bytes.
        grant: The clusters taken from the pool.
        hold: Whether the entries must wait for a barrier: something old shows
            through them until then, or the clusters are not durably ours yet.
        replaced: What the old entries named: host offset and length in bytes.
        survives: Whether the write would survive a killed server.
    """

    table: Table
    index: int
    data: memoryview
    within: int
    grant: Grant
    hold: bool
    step: Step = Step.DATA_ALLOC
    replaced: list[tuple[int, int]] = field(default_factory=list)
    survives: bool = True


class Allocator:
    """Allocates clusters of one image for the writes that need them."""

    def __init__(
        self, parts: Parts, mapping: Mapping, reader: Reader, space: Space
    ) -> None:
        """Join the parts."""
        self.busy: Turnstile[int] = Turnstile()
        self._storage = parts.storage
        self._data = parts.data
        self._geometry = parts.geometry
        self._codec = parts.codec
        self._tables = parts.tables
        self._gate = parts.gate
        self._pins = parts.pins
        self._backing_size = parts.backing_size
        self._mapping = mapping
        self._reader = reader
        self._pool = space.pool
        self._commit = space.commit
        self._prepare = space.prepare
        self._owned = space.owned
        self._tables_busy: Turnstile[int] = Turnstile()
        geometry = parts.geometry
        self._table_clusters = max(1, geometry.l2_bytes >> geometry.cluster_bits)

    # -- L2 tables

    async def table_for_change(self, number: int) -> Table:
        """Return L2 table `number` as one that may be changed in place.

        It is allocated if there is none, and copied if a snapshot uses it too.

        Raises:
            OSError: No space, or the file can't be written.
            ImageCorruptError: The table can't be where the L1 entry says.
        """
        while True:
            table = self._tables.cached.get(number)
            if table is not None and table.owned:
                return table
            if number in self._tables_busy:
                await self._tables_busy.wait(number)
                continue
            self._tables_busy.enter(number)
            try:
                await self._prepare()
                table = await self._own_table(number)
            finally:
                self._tables_busy.leave(number)
            if table is not None:
                return table

    async def _own_table(self, number: int) -> Table | None:
        """Load a table and see whose it is, or allocate one; None if it must be looked for again."""
        if self._commit.holds(self._tables.l1, number):
            # What is written to a table to which the file has no way would not survive.
            await self._commit.flush()
        table = await self._tables.load(number)
        if table is None:
            return await self._allocate_table(TableAllocation(number, None))
        # A table that left the cache meanwhile would be loaded a second time.
        table.users += 1
        try:
            if await self._owned(table.host_offset, True):
                table.owned = True
                return table
            return await self._allocate_table(TableAllocation(number, table))
        finally:
            table.users -= 1

    async def _allocate_table(self, allocation: TableAllocation) -> Table | None:
        try:
            await self._l2_alloc(allocation)
            allocation.step = Step.L2_LINK
            survives = await self._l2_link(allocation)
        except BaseException:
            self._roll_table_back(allocation)
            raise
        number, old = allocation.number, allocation.old
        table = Table.empty(number, allocation.host_offset, self._geometry.l2_entries)
        first = allocation.host_offset >> self._geometry.cluster_bits
        self._pool.tables.update(range(first, first + self._table_clusters))
        if old is not None:
            table.words[:] = old.words
            table.kinds[:] = bytes(len(old.words))
            del self._tables.cached[number]
            self._commit.free(old.host_offset, self._geometry.l2_bytes)
        if survives:
            self._tables.add(table)
            return table
        # An earlier write of this L1 word failed, so it waits for a commit. Nobody
        # may write to the table before: killing the server would lose that.
        await self._commit.flush()
        return None

    async def _l2_alloc(self, allocation: TableAllocation) -> None:
        """L2_ALLOC: take clusters that read as zeros; copy the shared table there."""
        while (grant := self._pool.take_whole(self._table_clusters)) is None:
            await self._pool.refill(self._table_clusters)
        allocation.host_offset = grant.host_offset
        if allocation.old is not None:
            # Nothing is held in a shared table: each change of it comes through here.
            await self._storage.write(
                grant.host_offset, encode_words(allocation.old.words)
            )
            # the copy has to be durable before the L1 entry that names it
            await self._commit.barrier()

    async def _l2_link(self, allocation: TableAllocation) -> bool:
        """L2_LINK: point the L1 entry at the table; return whether that survives a kill."""
        word = self._codec.link(allocation.host_offset)
        return await self._commit.change(
            self._tables.l1, allocation.number, array("Q", [word]), OWNED, hold=False
        )

    def _roll_table_back(self, allocation: TableAllocation) -> None:
        """Give the clusters back; in step L2_LINK the L1 entry may be in the file."""
        if allocation.host_offset:
            length = self._table_clusters << self._geometry.cluster_bits
            self._commit.free(allocation.host_offset, length)

    # -- data

    async def write(self, guest_offset: int, data: memoryview) -> int:
        """Write the beginning of `data` to clusters that can't be written in place.

        Returns:
            How many bytes were written; 0 if the mapping must be looked at again.
        """
        gate = self._gate
        if gate.closed:
            await gate.opened()
        gate.enter()
        try:
            return await self._write(guest_offset, data)
        finally:
            gate.leave()

    async def _write(self, guest_offset: int, data: memoryview) -> int:
        geometry = self._geometry
        table = await self.table_for_change(guest_offset >> geometry.table_bits)
        cluster = guest_offset >> geometry.cluster_bits
        index = cluster & (geometry.l2_entries - 1)
        if cluster in self.busy:
            await self.busy.wait(cluster)
            return 0
        kind = self._mapping.kind(table, index)
        if kind == OWNED:
            return 0
        if kind == BAD:
            raise self._mapping.corrupt(
                guest_offset, table.words[index], "is not valid"
            )
        if kind == UNPUBLISHED:
            return await self._write_unpublished(table, index, guest_offset, data)
        table.users += 1
        try:
            if kind == NORMAL:
                await self._look_at_owner(table, index)
                return 0
            return await self._allocate(table, index, cluster, guest_offset, data)
        finally:
            table.users -= 1

    async def _look_at_owner(self, table: Table, index: int) -> None:
        """Find out whether a plain cluster may be written in place."""
        word = table.words[index]
        owned = await self._owned(word & self._codec.l2_offset_mask, False)
        if table.words[index] == word and table.kinds[index] == NORMAL:
            if not owned:
                table.kinds[index] = SHARED
            elif self._commit.holds(table, index):
                table.kinds[index] = UNPUBLISHED
            else:
                table.kinds[index] = OWNED

    async def _write_unpublished(
        self, table: Table, index: int, guest_offset: int, data: memoryview
    ) -> int:
        """Write in place where the link is not in the file yet, and wait for it."""
        within = guest_offset & (self._geometry.cluster_size - 1)
        piece = data[: self._geometry.cluster_size - within]
        host_offset = (table.words[index] & self._codec.l2_offset_mask) + within
        await self._put(host_offset, piece)
        self._commit.dirty = True
        await self._commit.flush()
        return len(piece)

    async def _allocate(
        self,
        table: Table,
        index: int,
        cluster: int,
        guest_offset: int,
        data: memoryview,
    ) -> int:
        geometry = self._geometry
        within = guest_offset & (geometry.cluster_size - 1)
        old_shows = self._old_shows(table.kinds[index], cluster)
        count = self._count(
            table, index, cluster, within, len(data), old_shows=old_shows
        )
        grant = self._pool.take(count, soft=self._commit.redo is not None)
        if grant is None:
            await self._pool.refill()
            return 0
        room = (grant.clusters << geometry.cluster_bits) - within
        allocation = DataAllocation(
            table,
            index,
            data[:room],
            within,
            grant,
            hold=old_shows or not grant.durable,
        )
        clusters = range(cluster, cluster + grant.clusters)
        for each in clusters:
            self.busy.enter(each)
        try:
            await self._run(allocation, old_shows=old_shows)
        finally:
            for each in clusters:
                self.busy.leave(each)
        if not allocation.survives:
            await self._commit.flush()
        return min(room, len(data))

    def _old_shows(self, kind: int, cluster: int) -> bool:
        """Return whether bytes other than zeros may show where a cluster is not written."""
        if kind == UNALLOCATED:
            return cluster << self._geometry.cluster_bits < self._backing_size
        return kind in (COMPRESSED, SHARED)

    def _count(
        self,
        table: Table,
        index: int,
        cluster: int,
        within: int,
        length: int,
        *,
        old_shows: bool,
    ) -> int:
        """Return how many clusters from here on one allocation can serve.

        Where old bytes show, that is either one cluster, or clusters that are
        overwritten as a whole, so that nothing needs to be copied.
        """
        bits = self._geometry.cluster_bits
        if old_shows:
            whole = length >> bits if not within else 0
            most = max(whole, 1)
        else:
            most = (within + length - 1 >> bits) + 1
        most = min(most, len(table.words) - index)
        count = 1
        while count < most:
            kind = self._mapping.kind(table, index + count)
            if (kind >= NORMAL and kind != SHARED) or kind == BAD:
                break
            if self._old_shows(kind, cluster + count) != old_shows:
                break
            if cluster + count in self.busy:
                break
            count += 1
        return count

    async def _run(self, allocation: DataAllocation, *, old_shows: bool) -> None:
        try:
            await self._data_alloc(allocation, old_shows=old_shows)
            allocation.step = Step.DATA_LINK
            await self._data_link(allocation)
        except BaseException:
            self._roll_data_back(allocation)
            raise

    async def _data_alloc(self, allocation: DataAllocation, *, old_shows: bool) -> None:
        """DATA_ALLOC: put the guest's bytes into the new clusters."""
        data, within = allocation.data, allocation.within
        host_offset = allocation.grant.host_offset
        cluster_size = self._geometry.cluster_size
        if old_shows and (within or len(data) % cluster_size):
            whole = bytearray(cluster_size)
            zeros = await self._read_old(allocation, memoryview(whole))
            if not zeros:
                whole[within : within + len(data)] = data
                data, within = memoryview(whole), 0
            elif allocation.grant.durable:
                # Nothing but zeros was to be seen there: as good as a first write.
                allocation.hold = False
        await self._put(host_offset + within, data)

    async def _read_old(self, allocation: DataAllocation, whole: memoryview) -> bool:
        """Read the cluster as it was; return whether all of it is a hole."""
        geometry = self._geometry
        number = allocation.table.number
        start = (number << geometry.table_bits) + (
            allocation.index << geometry.cluster_bits
        )
        whole = whole[: geometry.size - start]
        holes = await self._reader.read_into(start, whole)
        return sum(length for _, length in holes) == len(whole)

    async def _put(self, host_offset: int, data: memoryview) -> None:
        """Write to a cluster that this operation holds."""
        if not self._data.try_write(host_offset, data):
            generation = self._pins.enter()
            try:
                await self._data.write(host_offset, data)
            finally:
                self._pins.leave(generation)

    async def _data_link(self, allocation: DataAllocation) -> None:
        """DATA_LINK: point the L2 entries at the clusters."""
        table, index, grant = allocation.table, allocation.index, allocation.grant
        size = self._geometry.cluster_size
        allocation.replaced = self.named(table, index, grant.clusters)
        first = self._codec.link(grant.host_offset)
        words = array("Q", range(first, first + grant.clusters * size, size))
        allocation.survives = await self._commit.change(
            table, index, words, OWNED, hold=allocation.hold
        )
        for host_offset, length in allocation.replaced:
            self._commit.free(host_offset, length)

    def _roll_data_back(self, allocation: DataAllocation) -> None:
        """Give the clusters back; they were written, and their link may be in the file."""
        grant = allocation.grant
        self._commit.free(
            grant.host_offset, grant.clusters << self._geometry.cluster_bits
        )

    async def relink(self, guest_cluster: int, word_in_file: int, word: int) -> bool:
        """Link a cluster again that a killed server had written and acknowledged.

        Returns:
            Whether the entry was still the old one and the cluster still ours.
        """
        bits = self._geometry.l2_bits
        table = await self.table_for_change(guest_cluster >> bits)
        index = guest_cluster & (1 << bits) - 1
        if table.words[index] != word_in_file:
            return False
        kind = self._codec.classify(word)
        if kind == NORMAL:
            # It may have been given to others since, or freed as a leak by a check.
            host_offset = word & self._codec.l2_offset_mask
            if (
                host_offset >= self._storage.size
                or await self._pool.references(host_offset) != 1
            ):
                return False
            kind = OWNED
        replaced = self.named(table, index, 1)
        await self._commit.change(table, index, array("Q", [word]), kind, hold=True)
        for host_offset, length in replaced:
            self._commit.free(host_offset, length)
        return True

    def named(self, table: Table, index: int, count: int) -> list[tuple[int, int]]:
        """Return what `count` entries name: host offsets and lengths in bytes.

        Raises:
            ImageCorruptError: They name a table, which must never be given back.
        """
        extents: list[tuple[int, int]] = []
        for position in range(index, index + count):
            kind = self._mapping.kind(table, position)
            word = table.words[position]
            if kind >= NORMAL or kind == ZERO_ALLOCATED:
                host_offset = word & self._codec.l2_offset_mask
                extents.append((host_offset, self._geometry.cluster_size))
            elif kind == COMPRESSED:
                extents.append(self._codec.compressed_extent(word))
        for extent in extents:
            self._pool.require_data(*extent)
        return extents
