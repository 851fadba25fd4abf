"""The allocation of clusters: four steps, each with its own way back.

    L2_ALLOC    take zeroed clusters for an L2 table          (only if the L1 entry is empty,
    L2_LINK     point the L1 entry at it                       or the table is shared)
    DATA_ALLOC  take a cluster, put the guest's bytes there (and, for a partial write over
                something, the old bytes around them: of the subclusters it meets, if
                there are such, else of the whole cluster)
    DATA_LINK   point the L2 entry at it; the write is done

When a step fails, what this allocation took goes through `Committer.free`: a
word or cluster that was ever passed to a write call may be in the file, so it is used
again only after a commit. The table words are still the old ones then, and nothing of the
neighbours is touched.

A cluster of our own of which some subclusters are missing gets them in place: DATA_ALLOC
without taking anything, then DATA_LINK, which is held, since nobody knows what the place of a
missing subcluster holds until the new bytes there are durable.

Requests that meet at the same cluster or table wait at a turnstile, and look again at
everything when they get through.
"""

from array import array
from dataclasses import dataclass
from enum import Enum, auto

from nbdserve.formats.mapped import subclusters
from nbdserve.formats.mapped.entries import (
    BAD,
    BITMAP_SHIFT,
    COMPRESSED,
    NORMAL,
    OWNED,
    SHARED,
    SPLIT,
    SPLIT_OWNED,
    SPLIT_SHARED,
    SPLIT_UNPLACED,
    SPLIT_UNPUBLISHED,
    UNALLOCATED,
    UNKNOWN,
    UNPUBLISHED,
    WHOLE,
    WORD_MASK,
    ZERO_ALLOCATED,
)
from nbdserve.formats.mapped.mapping import Mapping
from nbdserve.formats.mapped.parts import Parts, Space
from nbdserve.formats.mapped.pieces import Pieces
from nbdserve.formats.mapped.pool import Grant
from nbdserve.formats.mapped.read import Reader
from nbdserve.formats.mapped.tables import Table, encode_entries
from nbdserve.formats.mapped.waits import Turnstile
from nbdserve.storage.base import Buffer


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


class DataAllocation:
    """Clusters for one write, contiguous for the guest and in the file.

    It is not a dataclass: their `__init__` stays interpreted where this is compiled.

    Attributes:
        table: The L2 table, which is this disk's own.
        index: The first entry.
        data: What to write, beginning `within` bytes into the first cluster.
        within: Bytes.
        grant: The clusters taken from the pool.
        hold: Whether the entries must wait for a barrier: something old shows
            through them until then, or the clusters are not durably ours yet.
        bitmap: Of all the entries, in a table of extended ones.
        replaced: What the old entries named: host offset and length in bytes.
        survives: Whether the write would survive a killed server.
    """

    __slots__ = (
        "bitmap",
        "data",
        "grant",
        "hold",
        "index",
        "replaced",
        "step",
        "survives",
        "table",
        "within",
    )

    def __init__(
        self,
        table: Table,
        index: int,
        data: Buffer,
        within: int,
        grant: Grant,
        hold: bool,
    ) -> None:
        """Begin with what is to be written, and where."""
        self.table = table
        self.index = index
        self.data = data
        self.within = within
        self.grant = grant
        self.hold = hold
        self.step = Step.DATA_ALLOC
        self.bitmap: int = subclusters.ALL
        self.replaced: list[tuple[int, int]] = []
        self.survives = True


class Allocator:
    """Allocates clusters of one image for the writes that need them."""

    def __init__(
        self, parts: Parts, mapping: Mapping, reader: Reader, space: Space
    ) -> None:
        """Join the parts."""
        self.busy: Turnstile[int] = Turnstile()
        self._storage = parts.storage
        self._data = parts.data
        self._external = parts.external
        self._parts = parts
        self._cipher = parts.cipher
        self._geometry = parts.geometry
        self._codec = parts.codec
        self._tables = parts.tables
        self._gate = parts.gate
        self._pins = parts.pins
        self._backing_size = parts.backing_size
        self._mapping = mapping
        self._pieces = Pieces(parts.geometry, reader)
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
        geometry = self._geometry
        table = Table.empty(
            number,
            allocation.host_offset,
            geometry.l2_entries,
            extended=geometry.extended,
        )
        first = allocation.host_offset >> self._geometry.cluster_bits
        self._pool.tables.update(range(first, first + self._table_clusters))
        if old is not None:
            table.words[:] = old.words
            table.bitmaps = None if old.bitmaps is None else old.bitmaps[:]
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
                grant.host_offset,
                encode_entries(allocation.old.words, allocation.old.bitmaps),
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
        table.users += 1
        try:
            if kind in (NORMAL, SPLIT):
                await self._look_at_owner(table, index)
                within = guest_offset & (geometry.cluster_size - 1)
                more = within + len(data) - 1 >> geometry.cluster_bits
                self._claim_known(table, index + 1, more)
                return 0
            if kind in (UNPUBLISHED, SPLIT_UNPUBLISHED, SPLIT_OWNED):
                return await self._write_in_place(
                    table, index, cluster, guest_offset, data
                )
            return await self._allocate(table, index, cluster, guest_offset, data)
        finally:
            table.users -= 1

    async def _look_at_owner(self, table: Table, index: int) -> None:
        """Find out whether a plain cluster may be written in place."""
        if self._external:
            self._claim(table)
            return
        word, known = table.words[index], table.kinds[index]
        owned = await self._owned(word & self._codec.l2_offset_mask, False)
        if table.words[index] == word and table.kinds[index] == known:
            if not owned:
                kind = SHARED
            elif self._commit.holds(table, index):
                kind = UNPUBLISHED
            else:
                kind = OWNED
            table.kinds[index] = kind if known == NORMAL else kind - WHOLE

    def claim_known(self, guest_offset: int, length: int) -> None:
        """Let plain clusters of a range count as our own of which memory tells that they are.

        What it does not tell is looked up cluster by cluster when they are written.
        """
        geometry = self._geometry
        table = self._tables.cached.get(guest_offset >> geometry.table_bits)
        if table is not None:
            first = guest_offset >> geometry.cluster_bits
            last = guest_offset + length - 1 >> geometry.cluster_bits
            index = first & (geometry.l2_entries - 1)
            self._claim_known(table, index, last + 1 - first)

    def _claim_known(self, table: Table, index: int, most: int) -> None:
        """Look at neighbours in one go: 1 us for each, and one write for all of them."""
        most = min(most, len(table.words) - index)
        if most <= 0 or not table.owned or self._gate.closed or self._external:
            return
        if self._mapping.kind(table, index) != NORMAL:
            return
        count = self._mapping.alike(table, index, NORMAL, most)
        host_offset = table.words[index] & self._codec.l2_offset_mask
        cluster = (table.number << self._geometry.l2_bits) + index
        for each in range(self._pool.surely_alone(host_offset, count)):
            if cluster + each in self.busy:
                return
            held = self._commit.holds(table, index + each)
            table.kinds[index + each] = UNPUBLISHED if held else OWNED

    def _claim(self, table: Table) -> None:
        """Let all clusters of a table count as its own, as those of a data file are."""
        kinds = table.kinds
        for known in (NORMAL, SPLIT):
            index = kinds.find(known)
            while index >= 0:
                kind = UNPUBLISHED if self._commit.holds(table, index) else OWNED
                kinds[index] = kind if known == NORMAL else kind - WHOLE
                index = kinds.find(known, index + 1)

    async def claim(self, guest_offset: int) -> None:
        """Look at whose the mapped clusters around `guest_offset` are (data file only)."""
        gate = self._gate
        if gate.closed:
            await gate.opened()
        gate.enter()
        try:
            number = guest_offset >> self._geometry.table_bits
            self._claim(await self.table_for_change(number))
        finally:
            gate.leave()

    async def _write_in_place(
        self,
        table: Table,
        index: int,
        cluster: int,
        guest_offset: int,
        data: memoryview,
    ) -> int:
        """Write to a cluster of our own that has no link yet, or lacks some subclusters."""
        within = guest_offset & (self._geometry.cluster_size - 1)
        data = data[: self._geometry.cluster_size - within]
        host_offset = table.words[index] & self._codec.l2_offset_mask
        missing = 0
        if table.bitmaps is not None:
            bits = self._geometry.cluster_bits
            missing = subclusters.touched(within, len(data), bits)
            missing &= ~subclusters.allocated(table.bitmaps[index])
        if missing:
            self.busy.enter(cluster)
            try:
                survives = await self._add_subclusters(
                    table, index, missing, within, data
                )
            finally:
                self.busy.leave(cluster)
        else:
            await self._put(guest_offset, host_offset + within, data)
            kind = table.kinds[index]
            survives = kind not in (UNPUBLISHED, SPLIT_UNPUBLISHED)
        if not survives:
            self._commit.dirty = True
            await self._commit.flush()
        return len(data)

    async def _add_subclusters(
        self, table: Table, index: int, missing: int, within: int, data: memoryview
    ) -> bool:
        """Write, and with it the subclusters that are `missing` in the cluster.

        Returns:
            Whether the write would survive a killed server.
        """
        host_offset = table.words[index] & self._codec.l2_offset_mask
        # In those that are there others may be writing too: nothing is copied in them.
        pieces, _ = await self._pieces.around(table, index, missing, within, data)
        bits = self._geometry.cluster_bits
        there = subclusters.touched(within, len(data), bits) & ~missing
        pieces += self._pieces.parts_of(there, within, data)
        guest_offset = self._guest_offset(table, index)
        for start, piece in pieces:
            await self._put(guest_offset + start, host_offset + start, piece)
        bitmap = subclusters.with_allocated(table.entry(index) >> BITMAP_SHIFT, missing)
        kind = OWNED if bitmap == subclusters.ALL else SPLIT_OWNED
        word = array("Q", [table.words[index]])
        return await self._commit.change(
            table, index, word, kind, hold=True, bitmaps=array("Q", [bitmap])
        )

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
        grant = self._place(cluster, count)
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

    def _place(self, cluster: int, count: int) -> Grant | None:
        """Return where new guest clusters go; None if the pool has to be refilled."""
        if self._external:
            # Nobody knows what lies there, so never before the next barrier.
            bits = self._geometry.cluster_bits
            return Grant(cluster << bits, count, durable=False)
        return self._pool.take(count, soft=self._commit.redo is not None)

    def _old_shows(self, kind: int, cluster: int) -> bool:
        """Return whether bytes other than zeros may show where a cluster is not written."""
        if self._external or self._cipher is not None:
            # what was never written would be decrypted, to noise
            return True
        if kind in (UNALLOCATED, SPLIT_UNPLACED):
            return cluster << self._geometry.cluster_bits < self._backing_size
        return kind in (COMPRESSED, SHARED, SPLIT_SHARED)

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
            if (kind >= SPLIT and kind not in (SHARED, SPLIT_SHARED)) or kind == BAD:
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
        data, within = memoryview(allocation.data), allocation.within
        host_offset = allocation.grant.host_offset
        table, index = allocation.table, allocation.index
        guest_offset = self._guest_offset(table, index)
        if not old_shows or not (within or len(data) % self._geometry.cluster_size):
            await self._put(guest_offset + within, host_offset + within, data)
            return
        wanted, allocation.bitmap = self._pieces.wanted(table, index, within, len(data))
        pieces, zeros = await self._pieces.around(table, index, wanted, within, data)
        if zeros and not self._external and self._cipher is None:
            # Nothing but zeros was to be seen there: as good as a first write.
            pieces = [(within, data)]
            if allocation.grant.durable:
                allocation.hold = False
        for start, piece in pieces:
            await self._put(guest_offset + start, host_offset + start, piece)

    def _guest_offset(self, table: Table, index: int) -> int:
        """Return where a cluster begins for the guest."""
        geometry = self._geometry
        return (table.number << geometry.table_bits) + (index << geometry.cluster_bits)

    async def _put(self, guest_offset: int, host_offset: int, data: memoryview) -> None:
        """Write to a cluster that this operation holds."""
        if self._external:
            # its data file is as long as the disk
            data = data[: max(self._geometry.size - host_offset, 0)]
        if self._cipher is not None:
            await self._parts.put_encrypted(
                self._cipher, guest_offset, host_offset, data
            )
        elif not self._data.try_write(host_offset, data):
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
        bitmap, bitmaps = allocation.bitmap, None
        if table.bitmaps is not None:
            bitmaps = array("Q", [bitmap]) * grant.clusters
        allocation.survives = await self._commit.change(
            table,
            index,
            words,
            OWNED if bitmap == subclusters.ALL else SPLIT_OWNED,
            hold=allocation.hold,
            bitmaps=bitmaps,
        )
        for host_offset, length in allocation.replaced:
            self._commit.free(host_offset, length)

    def _roll_data_back(self, allocation: DataAllocation) -> None:
        """Give the clusters back; they were written, and their link may be in the file."""
        if self._external:
            return
        grant = allocation.grant
        self._commit.free(
            grant.host_offset, grant.clusters << self._geometry.cluster_bits
        )

    async def relink(self, guest_cluster: int, entry_in_file: int, entry: int) -> bool:
        """Link a cluster again that a killed server had written and acknowledged.

        Returns:
            Whether the entry was still the old one and the cluster still ours.
        """
        bits = self._geometry.l2_bits
        table = await self.table_for_change(guest_cluster >> bits)
        index = guest_cluster & (1 << bits) - 1
        if table.entry(index) != entry_in_file:
            return False
        word, bitmap = entry & WORD_MASK, entry >> BITMAP_SHIFT
        mask = self._codec.l2_offset_mask
        kind = self._codec.classify(word, bitmap)
        replaced = self.named(table, index, 1)
        if kind >= SPLIT and (word & mask, self._geometry.cluster_size) in replaced:
            # only the subclusters are others
            kind, replaced = UNKNOWN, []
        elif kind in (NORMAL, SPLIT) and self._external:
            kind += OWNED - NORMAL
        elif kind in (NORMAL, SPLIT):
            # It may have been given to others since, or freed as a leak by a check.
            host_offset = word & mask
            if (
                host_offset >= self._storage.size
                or await self._pool.references(host_offset) != 1
            ):
                return False
            kind += OWNED - NORMAL
        await self._commit.change(
            table,
            index,
            array("Q", [word]),
            kind,
            hold=True,
            bitmaps=array("Q", [bitmap]),
        )
        for host_offset, length in replaced:
            self._commit.free(host_offset, length)
        return True

    def named(self, table: Table, index: int, count: int) -> list[tuple[int, int]]:
        """Return what `count` entries name: host offsets and lengths in bytes.

        That is nothing in an image whose data lie in a file of their own.

        Raises:
            ImageCorruptError: They name a table, which must never be given back.
        """
        extents: list[tuple[int, int]] = []
        if self._external:
            return extents
        for position in range(index, index + count):
            kind = self._mapping.kind(table, position)
            word = table.words[position]
            if kind >= SPLIT or kind == ZERO_ALLOCATED:
                host_offset = word & self._codec.l2_offset_mask
                extents.append((host_offset, self._geometry.cluster_size))
            elif kind == COMPRESSED:
                extents.append(self._codec.compressed_extent(word))
        for extent in extents:
            self._pool.require_data(*extent)
        return extents
