"""L1 and L2 tables in memory, and the cache of those that were used last.

A table in memory is the truth for whoever maps a guest offset. The file may be behind
it: `commit.py` decides when a changed word may be written, and writes just
that word, so what is on disk is always the words last written and never "the cache".
"""

import sys
from array import array
from typing import TYPE_CHECKING

from nbdserve.errors import ImageCorruptError
from nbdserve.formats.mapped.entries import (
    BITMAP_SHIFT,
    UNALLOCATED,
    WORD_MASK,
    EntryCodec,
)
from nbdserve.formats.mapped.geometry import Geometry
from nbdserve.formats.mapped.waits import Pins, Turnstile
from nbdserve.storage.base import Storage

if TYPE_CHECKING:
    from collections.abc import Callable


def decode_words(data: bytes | bytearray | memoryview) -> "array[int]":
    """Return big-endian 64-bit words as native integers."""
    words = array("Q", bytes(data))
    if sys.byteorder == "little":
        words.byteswap()
    return words


def encode_words(words: "array[int]") -> bytes:
    """Return native integers as big-endian 64-bit words."""
    if sys.byteorder == "little":
        words = words[:]
        words.byteswap()
    return words.tobytes()


def encode_entries(words: "array[int]", bitmaps: "array[int] | None") -> bytes:
    """Return L2 entries as they are in the file; `bitmaps` are those of extended ones."""
    if bitmaps is None:
        return encode_words(words)
    both = array("Q", bytes(16 * len(words)))
    both[0::2] = words
    both[1::2] = bitmaps
    return encode_words(both)


def decode_entries(
    data: bytes | bytearray | memoryview, *, extended: bool
) -> "tuple[array[int], array[int] | None]":
    """Return the words of L2 entries, and the bitmaps of extended ones."""
    words = decode_words(data)
    return (words[0::2], words[1::2]) if extended else (words, None)


class Table:
    """One L1 or L2 table.

    Attributes:
        number: The L1 index of an L2 table, -1 for the L1 table itself.
        host_offset: Where it is in the file.
        words: Its entries as the format spells them.
        bitmaps: The other half of each entry, if these are extended L2 entries.
        kinds: What each entry means (`entries.py`), 0 for "not looked at yet".
        owned: Whether it is known that this table is reached by one L1 entry of the
            active disk alone, so that it may be changed in place.
        users: Operations that change it and hold it across an await, and words
            that are not in the file yet: while there are any, it stays in the cache.
        recent: Used since the cache last looked for a victim.
        held: How many of its words are not in the file yet, or being written.
    """

    __slots__ = (
        "bitmaps",
        "held",
        "host_offset",
        "kinds",
        "number",
        "owned",
        "recent",
        "users",
        "words",
    )

    def __init__(
        self,
        number: int,
        host_offset: int,
        words: "array[int]",
        bitmaps: "array[int] | None" = None,
    ) -> None:
        """Begin with nothing known of the entries."""
        self.number = number
        self.host_offset = host_offset
        self.words = words
        self.bitmaps = bitmaps
        self.kinds = bytearray(len(words))
        self.owned = False
        self.users = 0
        self.recent = True
        self.held = 0

    @classmethod
    def empty(
        cls, number: int, host_offset: int, entries: int, *, extended: bool = False
    ) -> "Table":
        """Return a table of the caller's own that maps nothing."""
        words = array("Q", bytes(8 * entries))
        table = cls(number, host_offset, words, words[:] if extended else None)
        table.kinds = bytearray([UNALLOCATED]) * entries
        table.owned = True
        return table

    def entry(self, index: int) -> int:
        """Return an entry as a single number (see `entries.py`)."""
        if self.bitmaps is None:
            return self.words[index]
        return self.bitmaps[index] << BITMAP_SHIFT | self.words[index]

    def place(self, index: int) -> int:
        """Return where in the file an entry is."""
        return self.host_offset + index * (8 if self.bitmaps is None else 16)

    def encode(self, entries: "list[int]") -> bytes:
        """Return entries, each a single number, as they are in the file."""
        if self.bitmaps is None:
            return encode_words(array("Q", entries))
        words = array("Q", [entry & WORD_MASK for entry in entries])
        bitmaps = array("Q", [entry >> BITMAP_SHIFT for entry in entries])
        return encode_entries(words, bitmaps)


class Tables:
    """The L2 tables that are in memory, loaded when first asked for.

    Attributes:
        cached: L1 index to table, for the hot path to look up.
        l1: The L1 table, always in memory.
        on_damage: Called if an entry is found that can't be followed.
    """

    def __init__(
        self,
        storage: Storage,
        geometry: Geometry,
        codec: EntryCodec,
        l1: Table,
        pins: Pins,
        *,
        limit: int,
    ) -> None:
        """`limit` bounds the cache in bytes; one table is always allowed."""
        self.cached: dict[int, Table] = {}
        self.l1 = l1
        self.on_damage: Callable[[], None] | None = None
        self._storage = storage
        self._geometry = geometry
        self._codec = codec
        self._pins = pins
        self._loading: Turnstile[int] = Turnstile()
        # what the file has, and a byte for the kind of each entry
        self._capacity = max(1, limit // (geometry.l2_bytes + geometry.l2_entries))

    async def load(self, number: int) -> Table | None:
        """Return L2 table `number`, or None if the L1 entry is empty.

        Raises:
            ImageCorruptError: The L1 entry points where no table can be.
            OSError: The table can't be read.
        """
        while True:
            table = self.cached.get(number)
            if table is not None:
                table.recent = True
                return table
            if number not in self._loading:
                break
            await self._loading.wait(number)
        while True:
            word = self.l1.words[number]
            if not word:
                return None
            host_offset = self._checked_offset(number, word)
            self._loading.enter(number)
            try:
                table = Table(number, host_offset, *await self._read(host_offset))
                if self.l1.words[number] == word:
                    self.add(table)
                    return table
                # the disk has gone back to a snapshot, or got smaller meanwhile
            finally:
                self._loading.leave(number)

    def add(self, table: Table) -> None:
        """Put a table into the cache, and the least recently used ones out."""
        if len(self.cached) >= self._capacity:
            self._evict()
        self.cached[table.number] = table

    def forget_owners(self) -> None:
        """Look at every entry and table again before it is changed in place."""
        for table in self.cached.values():
            table.owned = False
            table.kinds[:] = bytes(len(table.kinds))

    def _evict(self) -> None:
        """Make room: second chance in the order of arrival."""
        for number in list(self.cached):
            table = self.cached[number]
            if table.users:
                continue
            del self.cached[number]
            if not table.recent:
                if len(self.cached) < self._capacity:
                    return
            else:
                table.recent = False
                self.cached[number] = table
        for number in list(self.cached):
            if len(self.cached) < self._capacity:
                return
            if not self.cached[number].users:
                del self.cached[number]

    def _checked_offset(self, number: int, word: int) -> int:
        host_offset = word & self._codec.l1_offset_mask
        if not self._codec.l1_is_valid(word) or not host_offset:
            problem = "is not a valid entry"
        elif host_offset >= self._storage.size:
            problem = "points past the end of the file"
        else:
            return host_offset
        if self.on_damage is not None:
            self.on_damage()
        raise ImageCorruptError(
            f"{self._storage.name}: L1 entry {number} ({word:#018x}) {problem}"
        )

    async def _read(self, host_offset: int) -> "tuple[array[int], array[int] | None]":
        data = bytearray(self._geometry.l2_bytes)
        view = memoryview(data)
        if not self._storage.try_read(host_offset, view):
            generation = self._pins.enter()
            try:
                await self._storage.read(host_offset, view)
            finally:
                self._pins.leave(generation)
        return decode_entries(data, extended=self._geometry.extended)
