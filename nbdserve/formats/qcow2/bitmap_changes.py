"""Storing and changing the persistent bitmaps of an open image, in an order that cuts may end.

docs/interop/qcow2.rst of qemu, section "Bitmaps". Nothing that the file's directory
leads to is ever overwritten:

    changed data and tables to new clusters, a new directory -> barrier -> the
    header's bitmaps extension -> barrier -> what nothing names any more is given back

Where no table has changed, the flags alone are written, 4 bytes each. *Crash: the old
directory, in which what records is flagged as in use, or the new one; leaks.*
"""

from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from nbdserve.block.dirty_bitmap import DirtyBitmap
from nbdserve.errors import ConfigError, ImageError
from nbdserve.formats.mapped.tables import encode_words
from nbdserve.formats.qcow2.backing_name import SECTOR, plan_header_change
from nbdserve.formats.qcow2.bitmap_directory import (
    BITMAP_TABLE_OFFSET_MASK,
    FLAG_AUTO,
    MAX_DATA_BYTES,
    MAX_GRANULARITY_BITS,
    MAX_NAME,
    MIN_GRANULARITY_BITS,
    Bitmap,
    encode_bitmap_directory,
    entry_length,
    table_entries_for,
)
from nbdserve.formats.qcow2.bitmaps import Bitmaps, PersistentBitmap
from nbdserve.formats.qcow2.extensions import (
    EXTENSION_BITMAPS,
    MAX_BITMAP_DIRECTORY_BYTES,
    MAX_BITMAPS,
    BitmapsExtension,
    encode_bitmaps_extension,
    extension_offset,
    with_bitmaps,
)
from nbdserve.formats.qcow2.header import AUTOCLEAR_BITMAPS, parse_header
from nbdserve.formats.qcow2.structure import Structure

#: qemu takes the cluster size, within these limits.
_DEFAULT_GRANULARITY: Final = (4 << 10, 64 << 10)

#: Host offset and length in bytes.
Extent = tuple[int, int]


class BitmapChanges:
    """Changes the bitmaps of one image; it wants the image alone.

    Each change is durable on return, and so is what all other bitmaps have recorded.
    """

    def __init__(self, structure: Structure, bitmaps: Bitmaps) -> None:
        """Change `bitmaps`, which are those of the image."""
        self._structure = structure
        self._bitmaps = bitmaps
        self._storage = bitmaps.storage
        self._taken: list[Extent] = []
        self._released: list[Extent] = []

    # -- what people ask for

    async def add(self, name: str, granularity: int | None, *, enabled: bool) -> None:
        """Add a bitmap with nothing marked.

        Args:
            name: Unique in the image.
            granularity: Bytes for each bit, a power of two; None is qemu's choice.
            enabled: Whether it records changes from now on.

        Raises:
            ConfigError: The name or the granularity can't be used.
            ImageError: The image can't have it.
        """
        bitmaps = self._bitmaps
        bitmaps.require_directory()
        encoded = name.encode("utf-8", "surrogateescape")
        self._judge_name(name, encoded)
        entry = Bitmap(
            table_offset=0,
            table_entries=0,
            flags=FLAG_AUTO if enabled else 0,
            granularity_bits=self._granularity_bits(granularity),
            name=encoded,
        )
        new = PersistentBitmap(entry, bitmaps.new_bits(entry), loaded=True, based=False)
        await self.store([*bitmaps.found, new])

    def _judge_name(self, name: str, encoded: bytes) -> None:
        bitmaps = self._bitmaps
        if self._structure.header.version < 3:
            raise ImageError(
                f"{self._storage.name}: version 2 has no persistent bitmaps; amend it to"
                " version 3"
            )
        if not 0 < len(encoded) <= MAX_NAME or b"\0" in encoded:
            raise ConfigError(
                f"a bitmap's name has 1 to {MAX_NAME} bytes, and no NUL among them"
            )
        if any(each.entry.name == encoded for each in bitmaps.found):
            raise ConfigError(
                f"{self._storage.name}: there is a bitmap {name!r} already"
            )
        length = sum(each.entry.length for each in bitmaps.found)
        length += entry_length(encoded)
        if len(bitmaps.found) >= MAX_BITMAPS or length > MAX_BITMAP_DIRECTORY_BYTES:
            raise ConfigError(
                f"{self._storage.name}: has {len(bitmaps.found)} bitmaps, the most possible"
            )

    def _granularity_bits(self, granularity: int | None) -> int:
        least, most = _DEFAULT_GRANULARITY
        size = self._structure.header.cluster_size
        if granularity is None:
            granularity = min(max(size, least), most)
        bits = granularity.bit_length() - 1
        if granularity != 1 << max(bits, 0) or not (
            MIN_GRANULARITY_BITS <= bits <= MAX_GRANULARITY_BITS
        ):
            raise ConfigError(
                f"granularity {granularity}: must be a power of two, 512 to 2G bytes"
            )
        disk = self._bitmaps.size
        entries = table_entries_for(disk, bits, self._bitmaps.cluster_bits)
        if not entries:
            raise ConfigError(f"{self._storage.name}: a disk of 0 bytes has no bitmaps")
        if entries * size > MAX_DATA_BYTES:
            raise ConfigError(
                f"granularity {granularity}: a bitmap of {disk} bytes would need more than"
                f" {MAX_DATA_BYTES >> 20} MiB; take a larger one"
            )
        return bits

    async def remove(self, name: str) -> None:
        """Remove a bitmap, whatever state it is in; raises as `Bitmaps.find`."""
        gone = self._bitmaps.find(name)
        await self.store([each for each in self._bitmaps.found if each is not gone])

    async def clear(self, name: str) -> None:
        """Forget what a bitmap has recorded; raises as `Bitmaps.find`, or ImageError."""
        bitmap = self._bitmaps.find(name)
        bitmap.require_usable()
        before, loaded = bitmap.bits.copy(), bitmap.loaded
        bitmap.bits.clear()
        bitmap.based, bitmap.loaded = False, True
        try:
            await self.store(self._bitmaps.found)
        except BaseException:
            bitmap.based, bitmap.loaded = True, loaded
            bitmap.bits.merge(before)
            raise

    async def enable(self, name: str, *, enabled: bool) -> None:
        """Let a bitmap record changes from now on, or no longer."""
        bitmap = self._bitmaps.find(name)
        bitmap.require_usable()
        before, bitmap.enabled = bitmap.enabled, enabled
        try:
            await self.store(self._bitmaps.found)
        except BaseException:
            bitmap.enabled = before
            raise

    async def merge(self, name: str, sources: Sequence[DirtyBitmap]) -> None:
        """Mark in a bitmap what is marked in others.

        Raises:
            ConfigError: There is no such bitmap, or another's disk has another size.
            ImageError: It can't be used.
        """
        target = self._bitmaps.find(name)
        target.require_usable()
        for source in sources:
            if source.size != self._bitmaps.size:
                raise ConfigError(
                    f"bitmap {source.name!r} is of a disk of {source.size} bytes, and"
                    f" {name!r} of one of {self._bitmaps.size}: they can't be merged"
                )
        for source in sources:
            if source is not target.bits:
                target.bits.merge(source)
        await self.store(self._bitmaps.found)

    # -- storing

    async def store(self, wanted: Sequence[PersistentBitmap]) -> None:
        """Let the file have these bitmaps, with all that is marked.

        Raises:
            OSError: Something could not be written; the bitmaps in the file are those of
                before, or the image takes no more writes.
            ImageError: The header has no room for them.
        """
        bitmaps = self._bitmaps
        before = list(bitmaps.found)
        # Requests that wait outside go on marking: what they mark counts the next time.
        marks = {each: each.bits for each in wanted if not each.loaded}
        for each in marks:
            each.bits = bitmaps.new_bits(each.entry)
        bitmaps.record()
        try:
            entries = [
                await self._entry(each, marks.get(each, each.bits)) for each in wanted
            ]
            gone = [each for each in before if each not in wanted]
            for each in gone:
                await self._release_all(each)
            place = await self._switch(wanted, entries)
        except BaseException:
            for each, bits in marks.items():
                each.bits.merge(bits)
            for extent in self._taken:
                self._structure.give_back(*extent)
            raise
        for extent in self._released:
            self._structure.give_back(*extent)
        for bitmap, entry in zip(wanted, entries, strict=True):
            bitmap.entry, bitmap.based = entry, True
        bitmaps.adopt(wanted, place)

    async def _entry(self, bitmap: PersistentBitmap, marks: DirtyBitmap) -> Bitmap:
        """Write the table and the data of a bitmap as far as they have changed."""
        old = bitmap.entry
        if bitmap.problem is not None:
            return old
        bits, size = self._bitmaps.cluster_bits, self._bitmaps.size
        stored = await self._bitmaps.words(old)
        base = stored if bitmap.based else array("Q")
        needed = table_entries_for(size, old.granularity_bits, bits)
        words = base[:needed] + array("Q", bytes(8 * max(needed - len(base), 0)))
        pages = [number for number in marks.numbers() if number < needed]
        if len(base) != needed and base and needed - 1 not in pages:
            # the disk has shrunk: the last page may say something of what is gone
            pages.append(needed - 1)
        for number in pages:
            words[number] = await self._store_page(marks, number, words[number])
        flags = FLAG_AUTO if bitmap.enabled else 0
        if words == stored and old.table_offset:
            return replace(old, flags=flags)
        table = await self._take(8 * needed)
        await self._storage.put(table, encode_words(words))
        self._release(old.table_offset, 8 * old.table_entries)
        left = set(words)
        for word in stored:
            if word not in left:
                self._release(word & BITMAP_TABLE_OFFSET_MASK, 1 << bits)
        return replace(old, table_offset=table, table_entries=needed, flags=flags)

    async def _store_page(self, marks: DirtyBitmap, number: int, word: int) -> int:
        """Return the table entry of a page, written to a new cluster if it has changed."""
        before = await self._bitmaps.page(word)
        marks.merge_page(number, before)
        after = marks.page(number)
        if after == before:
            return word
        if not any(after):
            return 0
        host_offset = await self._take(len(after))
        await self._storage.put(host_offset, after)
        return host_offset

    async def _release_all(self, bitmap: PersistentBitmap) -> None:
        """Give back what a bitmap has, if nothing else can be meant by it."""
        if not bitmap.followed:
            return
        entry = bitmap.entry
        for word in await self._bitmaps.words(entry):
            host_offset = word & BITMAP_TABLE_OFFSET_MASK
            if host_offset:
                self._release(host_offset, 1 << self._bitmaps.cluster_bits)
        self._release(entry.table_offset, 8 * entry.table_entries)

    async def _take(self, length: int) -> int:
        host_offset = await self._structure.take(length)
        self._taken.append((host_offset, length))
        return host_offset

    def _release(self, host_offset: int, length: int) -> None:
        if host_offset:
            self._released.append((host_offset, length))

    # -- the directory, and the header that names it

    async def _switch(
        self, wanted: Sequence[PersistentBitmap], entries: Sequence[Bitmap]
    ) -> BitmapsExtension | None:
        """Make other entries count; return where the directory is then."""
        old = self._bitmaps.place
        now = [replace(each.entry, flags=0) for each in self._bitmaps.found]
        if old is not None and now == [replace(each, flags=0) for each in entries]:
            await self._write_flags(wanted, entries)
            return old
        new = None
        if entries:
            data = encode_bitmap_directory(entries)
            host_offset = await self._take(len(data))
            await self._storage.put(host_offset, data)
            new = BitmapsExtension(len(entries), len(data), host_offset)
        await self._structure.commit.barrier()
        await self._write_extension(new)
        if old is not None:
            self._release(old.directory_offset, old.directory_size)
        return new

    async def _write_flags(
        self, wanted: Sequence[PersistentBitmap], entries: Sequence[Bitmap]
    ) -> None:
        changed = [
            bitmap
            for bitmap, entry in zip(wanted, entries, strict=True)
            if bitmap.entry.flags != entry.flags
        ]
        if not changed:
            return
        flags = {id(bitmap): bitmap.entry for bitmap in changed}
        for bitmap, entry in zip(wanted, entries, strict=True):
            bitmap.entry = entry
        try:
            await self._bitmaps.write_flags(changed)
        except BaseException:
            for bitmap in changed:
                bitmap.entry = flags[id(bitmap)]
            raise
        await self._structure.commit.barrier()

    async def _write_extension(self, extension: BitmapsExtension | None) -> None:
        """Let the header name another directory, durably."""
        structure, storage = self._structure, self._storage
        async with structure.pool.unmoved():
            cluster = bytearray(min(structure.header.cluster_size, storage.size))
            await storage.read(0, memoryview(cluster))
            old = parse_header(bytes(cluster), storage.size)
            features = old.autoclear_features & ~AUTOCLEAR_BITMAPS
            new = replace(
                old,
                autoclear_features=features | (AUTOCLEAR_BITMAPS if extension else 0),
                extensions=with_bitmaps(old.extensions, extension),
            )
            at = extension_offset(old.extensions, EXTENSION_BITMAPS, old.header_length)
            if (
                extension is not None
                and at is not None
                and new.autoclear_features == old.autoclear_features
                and at // SECTOR == (at + 23) // SECTOR
            ):
                writes = [(at, encode_bitmaps_extension(extension))]
            else:
                writes = plan_header_change(bytes(cluster), old, new)
            for offset, data in writes:
                await structure.write_header(offset, data)
            await storage.read(0, memoryview(cluster))
            structure.header = parse_header(bytes(cluster), storage.size)
