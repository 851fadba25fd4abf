"""From a guest offset to what is known about it: the lookup behind every operation."""

from typing import NamedTuple

from nbdserve.errors import ImageCorruptError
from nbdserve.formats.mapped import subclusters
from nbdserve.formats.mapped.entries import (
    BAD,
    COMPRESSED,
    NORMAL,
    SPLIT,
    SPLIT_UNPLACED,
    UNALLOCATED,
    UNKNOWN,
    WHOLE,
    ZERO,
    ZERO_ALLOCATED,
)
from nbdserve.formats.mapped.parts import Parts
from nbdserve.formats.mapped.tables import Table


class Run(NamedTuple):
    """A guest range in which everything is alike.

    Attributes:
        kind: As in `entries.py`. Never a split cluster: that is several runs, of kinds
            `UNALLOCATED`, `ZERO`, `ZERO_ALLOCATED`, and from `NORMAL` on.
        length: Bytes.
        host_offset: Where the range begins in the file, for kinds from `NORMAL` on
            and for `ZERO_ALLOCATED`; otherwise 0.
        word: The entry itself, of the first cluster.
    """

    kind: int
    length: int
    host_offset: int
    word: int


class Mapping:
    """Maps guest ranges through the tables."""

    def __init__(self, parts: Parts) -> None:
        """Look up in the tables of `parts`."""
        geometry = parts.geometry
        self._name = parts.storage.name
        self._geometry = geometry
        self._codec = parts.codec
        self._tables = parts.tables
        self._external = parts.external
        self._l2_bits = geometry.l2_bits
        self._table_bits = geometry.table_bits
        self._cluster_bits = geometry.cluster_bits
        self._cluster_size = geometry.cluster_size
        self._index_mask = geometry.l2_entries - 1

    def kind(self, table: Table, index: int) -> int:
        """Return the kind of an entry, which is looked at if it was not yet."""
        kind = table.kinds[index]
        if kind == UNKNOWN:
            bitmap = table.bitmaps[index] if table.bitmaps is not None else 0
            word = table.words[index]
            kind = self._codec.classify(word, bitmap)
            if self._external and (kind >= SPLIT or kind == ZERO_ALLOCATED):
                cluster = (table.number << self._l2_bits) + index
                if word & self._codec.l2_offset_mask != cluster << self._cluster_bits:
                    # docs/interop/qcow2.rst, bit 2 of the incompatible features
                    kind = BAD
            table.kinds[index] = kind
        return kind

    async def run(self, guest_offset: int, end: int) -> Run:
        """Describe the longest piece from `guest_offset` on that is all alike.

        Args:
            guest_offset: Bytes, below `end`.
            end: Bytes, at most the virtual size.

        Returns:
            A run that stays below `end` and within one L2 table, unless nothing
            is mapped there at all.
        """
        number = guest_offset >> self._table_bits
        table = self._tables.cached.get(number) or await self._tables.load(number)
        return self._run(table, guest_offset, end)

    def known_run(self, guest_offset: int, end: int) -> Run | None:
        """Return the same as `run`, or None if a table would have to be read for it."""
        number = guest_offset >> self._table_bits
        table = self._tables.cached.get(number)
        if table is None and self._tables.l1.words[number]:
            return None
        return self._run(table, guest_offset, end)

    def _run(self, table: Table | None, guest_offset: int, end: int) -> Run:
        if table is None:
            number = guest_offset >> self._table_bits
            return Run(UNALLOCATED, self._unmapped(guest_offset, number, end), 0, 0)
        index = (guest_offset >> self._cluster_bits) & self._index_mask
        kind = self.kind(table, index)
        word = table.words[index]
        within = guest_offset & (self._cluster_size - 1)
        if SPLIT_UNPLACED <= kind < NORMAL:
            return self._split_run(table, index, within, end - guest_offset)
        # clusters from here to the end of the range or of the table
        most = min(
            ((end - 1) >> self._cluster_bits) - (guest_offset >> self._cluster_bits),
            self._index_mask - index,
        )
        count = self.alike(table, index, kind, most + 1)
        length = min((count << self._cluster_bits) - within, end - guest_offset)
        host_offset = 0
        if kind >= NORMAL or kind == ZERO_ALLOCATED:
            host_offset = (word & self._codec.l2_offset_mask) + within
        return Run(kind, length, host_offset, word)

    def _split_run(self, table: Table, index: int, within: int, most: int) -> Run:
        """Describe subclusters that are alike, within one cluster."""
        word, kind = table.words[index], table.kinds[index]
        bits = self._cluster_bits - subclusters.SUBCLUSTER_BITS
        first = within >> bits
        bitmap = table.bitmaps[index] if table.bitmaps is not None else 0
        here, zeros, count = subclusters.alike(bitmap, first)
        length = min((first + count << bits) - within, most)
        host_offset = (word & self._codec.l2_offset_mask) + within
        if here:
            return Run(kind + WHOLE, length, host_offset, word)
        if not zeros:
            return Run(UNALLOCATED, length, 0, word)
        if kind == SPLIT_UNPLACED:
            return Run(ZERO, length, 0, word)
        return Run(ZERO_ALLOCATED, length, host_offset, word)

    def alike(self, table: Table, index: int, kind: int, most: int) -> int:
        """Return how many entries from `index` on are of `kind` and, if mapped, contiguous."""
        if kind in (COMPRESSED, BAD):
            return 1
        words, kinds = table.words, table.kinds
        position, limit = index + 1, index + most
        if kind >= NORMAL or kind == ZERO_ALLOCATED:
            # flags are the same in all of them, so the words themselves count up
            word = words[index] + self._cluster_size
            while position < limit and words[position] == word:
                if kinds[position] != kind and self.kind(table, position) != kind:
                    break
                word += self._cluster_size
                position += 1
            return position - index
        while position < limit:
            if kinds[position] != kind and self.kind(table, position) != kind:
                break
            position += 1
        return position - index

    def _unmapped(self, guest_offset: int, number: int, end: int) -> int:
        """Return the bytes up to the first L1 entry that is not empty."""
        words = self._tables.l1.words
        last = (end - 1) >> self._table_bits
        number += 1
        while number <= last and not words[number]:
            number += 1
        return min(number << self._table_bits, end) - guest_offset

    def corrupt(self, guest_offset: int, word: int, problem: str) -> ImageCorruptError:
        """Report an L2 entry that can't be obeyed, and return the error for it.

        Compressed data that can't be there are lost, and harm nothing else.
        """
        compressed = word & self._codec.compressed_flag
        if self._tables.on_damage is not None and not compressed:
            self._tables.on_damage()
        return ImageCorruptError(
            f"{self._name}: the L2 entry {word:#018x} of guest offset "
            f"{guest_offset:#x} {problem}; run 'nbdserve image check' on it"
        )
