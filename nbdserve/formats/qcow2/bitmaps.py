"""The persistent bitmaps of an open image: what the file says of them, and what is new.

docs/interop/qcow2.rst of qemu, sections "Bitmaps extension" and "Bitmaps". A bitmap
that records is flagged as in use, durably, before the first change that the file's copy
of it would miss; the flag goes when all of it is stored (`bitmap_changes.py`). Whoever
finds the flag knows that the bitmap misses something: it can only be removed.

In memory are the marks since the bitmap was stored; what the file has is read when
somebody asks for it, and put together with the marks when they are stored.
"""

import struct
from array import array
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from nbdserve.block.dirty_bitmap import DirtyBitmap
from nbdserve.errors import ConfigError, ImageCorruptError, ImageError
from nbdserve.formats.mapped.opening import Located
from nbdserve.formats.mapped.pool import Pool
from nbdserve.formats.qcow2.bitmap_directory import (
    BITMAP_TABLE_ALL_ONES,
    BITMAP_TABLE_OFFSET_MASK,
    BITMAP_TABLE_RESERVED_MASK,
    FLAG_AUTO,
    FLAG_IN_USE,
    MAX_DATA_BYTES,
    Bitmap,
    flags_offsets,
    parse_bitmap_directory,
    table_entries_for,
)
from nbdserve.formats.qcow2.extensions import (
    EXTENSION_BITMAPS,
    BitmapsExtension,
    parse_bitmaps_extension,
)
from nbdserve.formats.qcow2.header import AUTOCLEAR_BITMAPS, Header
from nbdserve.formats.qcow2.tree import read_words
from nbdserve.storage.base import Storage

#: Table entries of all bitmaps of an image that are looked at (64 bytes of memory for
#: each that names a cluster); 64 KiB clusters map 32 GiB of disk by each one at the
#: usual granularity.
_MAX_TABLE_ENTRIES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class BitmapInfo:
    """A persistent bitmap, as it is told to others.

    Attributes:
        name: Unique in the image.
        granularity: Bytes of the disk that one bit stands for.
        enabled: Whether it records changes.
        problem: Why it can't be used, only removed; None if it can.
    """

    name: str
    granularity: int
    enabled: bool
    problem: str | None = None


@dataclass(slots=True, eq=False)
class PersistentBitmap:
    """One bitmap.

    Attributes:
        entry: Its entry in the directory of the file; a new one has no table yet.
        bits: Marks that are not in the file yet.
        problem: Why it can't be used; None if it can.
        loaded: Whether `bits` hold what is in the file, too.
        based: Whether what is in the file still counts.
        enabled: Whether it records changes.
        followed: Whether its table names clusters that are its own.
    """

    entry: Bitmap
    bits: DirtyBitmap
    problem: str | None = None
    loaded: bool = False
    based: bool = True
    enabled: bool = field(init=False)
    followed: bool = True

    def __post_init__(self) -> None:
        """Begin as the file says."""
        self.enabled = bool(self.entry.flags & FLAG_AUTO)

    @property
    def name(self) -> str:
        """The name as text."""
        return self.entry.name.decode("utf-8", "surrogateescape")

    @property
    def in_use(self) -> bool:
        """Whether the file says that it may miss something."""
        return bool(self.entry.flags & FLAG_IN_USE)

    @property
    def info(self) -> BitmapInfo:
        """What there is to tell of it."""
        granularity = 1 << self.entry.granularity_bits
        return BitmapInfo(self.name, granularity, self.enabled, self.problem)

    def require_usable(self) -> None:
        """Refuse to read or change what is not known.

        Raises:
            ImageError: It can't be used.
        """
        if self.problem is not None:
            raise ImageError(
                f"bitmap {self.name!r} {self.problem}, so that it can't be used; remove"
                " it: nbdserve image bitmap remove"
            )


class Bitmaps:
    """All persistent bitmaps of one image.

    Attributes:
        found: In the order of the directory.
        place: Where the directory lies; None without one.
        broken: Why the directory can't be used; None if it can, or if there is none.
        recorded: Those that note changes.
        silent: Whether a bitmap records without being flagged as in use.
        notes: What the operator should know.
    """

    def __init__(self, storage: Storage, header: Header) -> None:
        """Begin without any; `load` reads those of an image."""
        self.storage = storage
        self.cluster_bits = header.cluster_bits
        self.size = header.disk_size
        self.found: list[PersistentBitmap] = []
        self.place: BitmapsExtension | None = None
        self.broken: str | None = None
        self.recorded: tuple[DirtyBitmap, ...] = ()
        self.silent = False
        self.notes: list[str] = []

    # -- reading

    @classmethod
    async def load(
        cls, storage: Storage, header: Header, pool: Pool | None
    ) -> "Bitmaps":
        """Read the directory and the tables, and judge them.

        Args:
            storage: The image.
            header: Its header.
            pool: Told which clusters are not free for anything else; None if the image is
                open read-only.
        """
        bitmaps = cls(storage, header)
        data = header.extension(EXTENSION_BITMAPS)
        if data is None:
            return bitmaps
        if not header.autoclear_features & AUTOCLEAR_BITMAPS:
            bitmaps.notes.append(
                f"{storage.name}: a program that does not know its persistent bitmaps has"
                " written to it, so they are ignored"
            )
            return bitmaps
        try:
            await bitmaps._read(data, header, pool)
        except (ImageCorruptError, OSError) as error:
            bitmaps.found, bitmaps.broken = [], str(error)
            bitmaps.notes.append(
                f"{storage.name}: its persistent bitmaps can't be used, and the next write"
                f" drops them: {error}"
            )
        bitmaps.adopt(bitmaps.found, bitmaps.place)
        return bitmaps

    async def _read(self, data: bytes, header: Header, pool: Pool | None) -> None:
        extension = parse_bitmaps_extension(data, self.cluster_bits)
        offset, length = extension.directory_offset, extension.directory_size
        if offset + length > self.storage.size:
            raise ImageCorruptError(
                f"the bitmap directory at {offset:#x} with {length} bytes runs past the"
                " end of the file"
            )
        content = bytearray(length)
        await self.storage.read(offset, memoryview(content))
        entries = parse_bitmap_directory(bytes(content), extension.nb_bitmaps)
        claims = _Claims(header, self.storage.size, pool)
        await claims.directory(offset, length)
        for entry in entries:
            bitmap = PersistentBitmap(entry, self.new_bits(entry))
            self.found.append(bitmap)
            bitmap.followed = await self._follow(bitmap, claims)
            if bitmap.in_use:
                bitmap.problem = "was not stored when the image was last written"
            if bitmap.problem is not None:
                self.notes.append(
                    f"{self.storage.name}: bitmap {bitmap.name!r} {bitmap.problem}, so"
                    " that it can only be removed"
                )
        self.place = extension

    async def _follow(self, bitmap: PersistentBitmap, claims: "_Claims") -> bool:
        """Judge a bitmap's table; return whether its clusters are its own."""
        entry = bitmap.entry
        needed = table_entries_for(self.size, entry.granularity_bits, self.cluster_bits)
        if not bitmap.in_use and entry.table_entries != needed:
            bitmap.problem = f"has {entry.table_entries} table entries, not {needed}"
        elif entry.table_entries << self.cluster_bits > MAX_DATA_BYTES:
            bitmap.problem = "is larger than 512 MiB"
        if bitmap.problem is None:
            bitmap.problem = claims.table(entry)
        if bitmap.problem is None:
            try:
                bitmap.problem = claims.data(await self.words(entry))
            except OSError as error:
                bitmap.problem = f"can't be read ({error})"
        return bitmap.problem is None

    async def words(self, entry: Bitmap) -> "array[int]":
        """Return the table of a bitmap; a new one has none."""
        if not entry.table_offset:
            return array("Q")
        return await read_words(self.storage, entry.table_offset, entry.table_entries)

    async def page(self, word: int) -> bytes:
        """Return the bits that a table entry stands for."""
        host_offset = word & BITMAP_TABLE_OFFSET_MASK
        if not host_offset:
            return (b"\xff" if word & BITMAP_TABLE_ALL_ONES else b"\0") * (
                1 << self.cluster_bits
            )
        data = bytearray(1 << self.cluster_bits)
        view = memoryview(data)
        if not self.storage.try_read(host_offset, view):
            await self.storage.read(host_offset, view)
        return bytes(data)

    async def fill(self, bitmap: PersistentBitmap) -> DirtyBitmap:
        """Put what is in the file together with the marks since then.

        Raises:
            ImageError: The bitmap can't be used.
            OSError: It can't be read.
        """
        bitmap.require_usable()
        if not bitmap.loaded and bitmap.based:
            for number, word in enumerate(await self.words(bitmap.entry)):
                if word:
                    bitmap.bits.merge_page(number, await self.page(word))
        bitmap.loaded = True
        return bitmap.bits

    # -- asking

    def find(self, name: str) -> PersistentBitmap:
        """Return the bitmap of a name.

        Raises:
            ConfigError: There is none.
            ImageCorruptError: The directory is broken.
        """
        self.require_directory()
        for bitmap in self.found:
            if bitmap.name == name:
                return bitmap
        raise ConfigError(f"{self.storage.name}: there is no bitmap {name!r}")

    def require_directory(self) -> None:
        """Refuse to go on where nobody knows which bitmaps there are.

        Raises:
            ImageCorruptError: The directory is broken.
        """
        if self.broken is not None:
            raise ImageCorruptError(
                f"{self.storage.name}: its persistent bitmaps can't be used:"
                f" {self.broken}"
            )

    def new_bits(self, entry: Bitmap) -> DirtyBitmap:
        """Return a bitmap of this disk with nothing marked, a page for each table entry."""
        return DirtyBitmap(
            entry.name.decode("utf-8", "surrogateescape"),
            self.size,
            granularity_bits=entry.granularity_bits,
            page_bits=self.cluster_bits + 3,
        )

    @property
    def kept(self) -> bool:
        """Whether the image has bitmaps that are kept up to date."""
        return self.place is not None

    @property
    def unstored(self) -> bool:
        """Whether the file says of a usable bitmap that it may miss something."""
        return any(each.in_use and each.problem is None for each in self.found)

    # -- changing

    def adopt(
        self, found: Sequence[PersistentBitmap], place: BitmapsExtension | None
    ) -> None:
        """Let these be the bitmaps, as they are in the file now."""
        self.found = list(found)
        self.place = place
        self.record()
        self.silent = any(each.enabled and not each.in_use for each in found)

    def record(self) -> None:
        """Let those that are enabled note changes from now on."""
        self.recorded = tuple(
            each.bits for each in self.found if each.enabled and each.problem is None
        )

    def resize(self, size: int) -> None:
        """Let the disk have another size; tables of that size have yet to be stored."""
        self.size = size
        for each in self.found:
            each.bits.resize(size)

    def require_resizable(self, size: int) -> None:
        """Refuse a size that a bitmap can't follow, as qemu does.

        Raises:
            ImageError: One can't be used, or would be too large, or empty.
        """
        self.require_directory()
        for each in self.found:
            each.require_usable()
            bits = each.entry.granularity_bits
            entries = table_entries_for(size, bits, self.cluster_bits)
            if not 0 < entries << self.cluster_bits <= MAX_DATA_BYTES:
                raise ImageError(
                    f"{self.storage.name}: bitmap {each.name!r} can't be that of a disk of"
                    f" {size} bytes; remove it first"
                )

    async def announce(self, barrier: Callable[[], Awaitable[None]]) -> None:
        """Flag the bitmaps that record as in use, durably."""
        await self.flag([each for each in self.found if each.enabled])
        await barrier()
        self.silent = False

    async def flag(self, wanted: Sequence[PersistentBitmap]) -> None:
        """Flag bitmaps as in use, in place: 4 bytes each, which no power cut tears."""
        for bitmap in wanted:
            flags = bitmap.entry.flags | FLAG_IN_USE
            # whatever comes of the write, the flag may be in the file
            bitmap.entry = replace(bitmap.entry, flags=flags)
        await self.write_flags(wanted)

    async def write_flags(self, wanted: Sequence[PersistentBitmap]) -> None:
        """Write the flags of bitmaps into the directory."""
        if self.place is None:
            return
        offsets = flags_offsets([each.entry for each in self.found])
        for bitmap, offset in zip(self.found, offsets, strict=True):
            if bitmap in wanted:
                await self.storage.put(
                    self.place.directory_offset + offset,
                    struct.pack(">I", bitmap.entry.flags),
                )


class _Claims:
    """Sees to it that no cluster of a bitmap is used by anything else that is known."""

    def __init__(self, header: Header, file_size: int, pool: Pool | None) -> None:
        self._bits = header.cluster_bits
        self._file_size = file_size
        self._pool = pool
        self._left = _MAX_TABLE_ENTRIES
        self._tables: set[int] = set()
        if pool is not None:
            self._taken, self._tables = pool.metadata, pool.tables
            return
        located = Located()
        located.add(0, 1, self._bits)
        located.add(header.l1_table_offset, 8 * header.l1_size, self._bits)
        table_bytes = header.refcount_table_clusters << self._bits
        located.add(header.refcount_table_offset, table_bytes, self._bits)
        self._taken = located.metadata

    async def directory(self, offset: int, length: int) -> None:
        """Claim the clusters of the directory, which is written in place."""
        first, last = offset >> self._bits, offset + max(length, 1) - 1 >> self._bits
        problem = self._claim(range(first, last + 1))
        if problem is not None:
            raise ImageCorruptError(f"the bitmap directory {problem}")
        if self._pool is None:
            return
        for cluster in range(first, last + 1):
            count = await self._pool.references(cluster << self._bits)
            if count != 1:
                raise ImageCorruptError(
                    f"the bitmap directory's cluster {cluster << self._bits:#x} has"
                    f" refcount {count}, not 1"
                )

    def table(self, entry: Bitmap) -> str | None:
        """Claim the clusters of a table; return what is wrong with it."""
        offset, length = entry.table_offset, 8 * entry.table_entries
        if offset & (1 << self._bits) - 1:
            return f"has its table at {offset:#x}, which is not aligned to a cluster"
        if offset + length > self._file_size:
            return f"has its table at {offset:#x}, past the end of the file"
        self._left -= entry.table_entries
        if self._left < 0:
            return "is one too many: the bitmaps are too large together"
        last = offset + length - 1 >> self._bits
        return self._claim(range(offset >> self._bits, last + 1))

    def data(self, words: "array[int]") -> str | None:
        """Claim the clusters that a table names; return what is wrong with it."""
        for index, word in enumerate(words):
            host_offset = word & BITMAP_TABLE_OFFSET_MASK
            if (
                word & BITMAP_TABLE_RESERVED_MASK
                or (host_offset and word & BITMAP_TABLE_ALL_ONES)
                or host_offset & (1 << self._bits) - 1
                or host_offset >= self._file_size
            ):
                return f"has the table entry {index} {word:#018x}, which is not valid"
            problem = None
            if host_offset:
                cluster = host_offset >> self._bits
                problem = self._claim(range(cluster, cluster + 1))
            if problem is not None:
                return problem
        return None

    def _claim(self, clusters: range) -> str | None:
        for cluster in clusters:
            if cluster in self._taken or cluster in self._tables or not cluster:
                return f"uses the cluster at {cluster << self._bits:#x}, as others do"
            self._taken.add(cluster)
        return None
