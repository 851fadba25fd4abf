"""Taking zero clusters out of an image: version 2 has no entry that says "zeros".

Where nothing shows behind it a zero cluster becomes an empty entry; where the backing
file would, a cluster of zeros, as data. Both read the same, so this may be interrupted
anywhere:

    references of new clusters -> barrier -> entries -> barrier -> what they named is given back
"""

from collections import Counter
from typing import TYPE_CHECKING

from nbdserve.errors import ImageCorruptError, ImageError
from nbdserve.formats.mapped.tables import encode_words
from nbdserve.formats.qcow2.cluster_counts import ClusterCounts
from nbdserve.formats.qcow2.entries import (
    COMPRESSED_FLAG,
    COPIED,
    OFFSET_MASK,
    ZERO_FLAG,
)
from nbdserve.formats.qcow2.snapshots import judged, read_snapshots
from nbdserve.formats.qcow2.structure import Structure
from nbdserve.formats.qcow2.tree import difference, read_words

if TYPE_CHECKING:
    from array import array


def is_zero_cluster(word: int) -> bool:
    """Return whether an L2 entry of version 3 says that a cluster reads as zeros."""
    return bool(word & ZERO_FLAG) and not word & COMPRESSED_FLAG


class ZeroClusters:
    """Expands the zero clusters of one image, which nobody else changes meanwhile."""

    def __init__(self, structure: Structure) -> None:
        """Change the tables of this image."""
        self._structure = structure
        self._parts = structure.parts
        self._backing_size = structure.parts.backing_size
        self._freed = ClusterCounts()

    async def expand(self) -> None:
        """Expand all, in the active disk and in snapshots.

        Raises:
            ImageError: A table can't be followed, or a refcount has no room.
            OSError: Something could not be written; what was done so far may stay.
        """
        structure = self._structure
        if self._parts.geometry.extended:
            raise ImageError(
                f"{self._parts.storage.name}: version 2 does not have its extended L2"
                " entries"
            )
        paths, places = await self._tables()
        for table, number in places.items():
            await self._expand_table(table, number, paths[table])
        await structure.commit.barrier()
        await self._parts.pins.drained()
        await structure.pool.unshare(self._freed)

    async def _tables(self) -> tuple[Counter[int], dict[int, int]]:
        """Return how many pointers lead to each L2 table, and its lowest L1 index."""
        storage, header = self._parts.storage, self._structure.header
        trees = [self._parts.tables.l1.words]
        snapshots, _ = await read_snapshots(storage, header)
        for snapshot in snapshots:
            judged(snapshot, header, storage.size)
            trees.append(
                await read_words(storage, snapshot.l1_table_offset, snapshot.l1_size)
            )
        paths: Counter[int] = Counter()
        places: dict[int, int] = {}
        for words in trees:
            await self._structure.tree.count(words)
            for number, word in enumerate(words):
                table = word & OFFSET_MASK
                if table:
                    paths[table] += 1
                    places[table] = min(number, places.get(table, number))
        return paths, places

    async def _expand_table(self, table: int, number: int, paths: int) -> None:
        geometry = self._parts.geometry
        old = await read_words(self._parts.storage, table, geometry.l2_entries)
        new = old[:]
        more = ClusterCounts()
        written = False
        for index, word in enumerate(old):
            if not is_zero_cluster(word):
                continue
            guest_offset = (number << geometry.table_bits) + (
                index << geometry.cluster_bits
            )
            new[index] = 0
            if guest_offset < self._backing_size:
                new[index] = await self._zeros(guest_offset, paths, more)
                written |= self._parts.cipher is not None
            if word & OFFSET_MASK:
                cluster = (word & OFFSET_MASK) >> geometry.cluster_bits
                self._freed.add(cluster, 1, paths)
        changed = difference(old, new)
        if changed is None:
            return
        if more.last() >= 0:
            await self._structure.pool.require_room(more)
            await self._structure.pool.share(more)
            written = True
        if written:
            await self._structure.commit.barrier()
        await self._write(table, number, new, changed)

    async def _zeros(self, guest_offset: int, paths: int, more: ClusterCounts) -> int:
        """Return an entry for a new cluster of zeros that so many pointers lead to."""
        pool, bits = self._structure.pool, self._parts.geometry.cluster_bits
        while (grant := pool.take_whole(1)) is None:
            await pool.refill()
        cipher = self._parts.cipher
        if cipher is not None:
            zeros = bytes(self._parts.geometry.cluster_size)
            await self._parts.put_encrypted(
                cipher, guest_offset, grant.host_offset, zeros
            )
        if paths == 1:
            return grant.host_offset | COPIED
        more.add(grant.host_offset >> bits, 1, paths - 1)
        return grant.host_offset

    async def _write(
        self, table: int, number: int, words: "array[int]", changed: tuple[int, int]
    ) -> None:
        l1 = self._parts.tables.l1.words
        if number < len(l1) and l1[number] & OFFSET_MASK == table:
            cached = await self._parts.tables.load(number)
            if cached is None:
                raise ImageCorruptError(f"L1 entry {number} is gone")
            await self._structure.rewrite(cached, words)
            return
        first, last = changed
        data = encode_words(words[first : last + 1])
        await self._parts.storage.put(table + 8 * first, data)
