"""An open qcow2 image, with what this format has beyond reading and writing."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace

from nbdserve.block.dirty_bitmap import DirtyBitmap
from nbdserve.errors import ConfigError, ImageError
from nbdserve.formats.crypto.key_slots import KeySlots, SlotChange
from nbdserve.formats.mapped.image import MappedImage
from nbdserve.formats.mapped.inflate import Decompress
from nbdserve.formats.mapped.move import Mover
from nbdserve.formats.mapped.opening import load_l1
from nbdserve.formats.mapped.parts import Parts, Space
from nbdserve.formats.mapped.preallocate import Preallocator
from nbdserve.formats.mapped.redo import Link
from nbdserve.formats.mapped.tables import Tables
from nbdserve.formats.preallocation import write_zeros
from nbdserve.formats.qcow2.bitmap_changes import BitmapChanges
from nbdserve.formats.qcow2.bitmaps import BitmapInfo, Bitmaps
from nbdserve.formats.qcow2.compaction import Compacted, Compaction, Progress
from nbdserve.formats.qcow2.compressed_move import CompressedMover
from nbdserve.formats.qcow2.header import SIZE_OFFSET, Header, encode_u64
from nbdserve.formats.qcow2.recorder import Recorder
from nbdserve.formats.qcow2.resize import judge_size
from nbdserve.formats.qcow2.snapshot_table import Snapshot
from nbdserve.formats.qcow2.snapshots import (
    Snapshots,
    find_snapshot,
    judged,
    read_snapshots,
)
from nbdserve.formats.qcow2.structure import Structure
from nbdserve.formats.qcow2.zero_clusters import ZeroClusters


class Qcow2Image(MappedImage):
    """An open qcow2 image; what changes its structure keeps writers waiting meanwhile."""

    def __init__(
        self,
        parts: Parts,
        decompress: Decompress,
        space: Space | None,
        header: Header,
        *,
        table_cache: int,
        bitmaps: Bitmaps | None = None,
    ) -> None:
        """See `MappedImage`; `table_cache` is the bytes that its tables may take."""
        super().__init__(parts, decompress, space)
        self._opened_header = header
        self._resizing = asyncio.Lock()
        self._structure = Structure(parts, space, header) if space is not None else None
        self._table_cache = table_cache
        self._decompress = decompress
        # the disk of a snapshot has none: they are about the active one
        self._bitmaps = bitmaps or Bitmaps(parts.storage, header)
        self.notes += self._bitmaps.notes
        self._record()
        self._compaction: asyncio.Task[Compacted] | None = None
        self._stop_compaction: Callable[[], None] = lambda: None

    @property
    def header(self) -> Header:
        """The header as it is in the file, where tables and sizes are concerned."""
        structure = self._structure
        return self._opened_header if structure is None else structure.header

    async def snapshots(self) -> list[Snapshot]:
        """Return the internal snapshots, in the order of the file.

        Raises:
            ImageCorruptError: Their table is broken.
        """
        found, _ = await read_snapshots(self._parts.storage, self.header)
        return found

    # -- persistent bitmaps

    async def bitmaps(self) -> list[BitmapInfo]:
        """Return the persistent bitmaps, in the order of the file.

        Raises:
            ImageCorruptError: Their directory is broken.
        """
        self._bitmaps.require_directory()
        return [each.info for each in self._bitmaps.found]

    async def dirty_bitmap(self, name: str) -> DirtyBitmap:
        """Return what a persistent bitmap has recorded, kept up to date while it is open.

        Raises:
            ConfigError: There is no such bitmap.
            ImageError: It can't be used: it misses what was written before a crash.
        """
        return await self._bitmaps.fill(self._bitmaps.find(name))

    async def add_bitmap(
        self, name: str, *, granularity: int | None = None, enabled: bool = True
    ) -> None:
        """Add a persistent bitmap, which records what changes from now on.

        What is being written meanwhile may be missed: let it end before. The same holds
        for `clear_bitmap` and `enable_bitmap`.

        Args:
            name: Unique in the image.
            granularity: Bytes that one bit stands for, a power of two; None is the
                cluster size, within 4 KiB and 64 KiB.
            enabled: Whether it records.

        Raises:
            ConfigError: The name or the granularity can't be used.
            ImageError: The image can't have it.
            OSError: It can't be written.
        """
        async with self._changing_bitmaps() as changes:
            await changes.add(name, granularity, enabled=enabled)

    async def remove_bitmap(self, name: str) -> None:
        """Remove a persistent bitmap, one that can't be used as well."""
        async with self._changing_bitmaps() as changes:
            await changes.remove(name)

    async def clear_bitmap(self, name: str) -> None:
        """Let a persistent bitmap record anew, from nothing."""
        async with self._changing_bitmaps() as changes:
            await changes.clear(name)

    async def enable_bitmap(self, name: str, *, enabled: bool = True) -> None:
        """Let a persistent bitmap record changes from now on, or keep it as it is."""
        async with self._changing_bitmaps() as changes:
            await changes.enable(name, enabled=enabled)

    async def merge_bitmap(self, name: str, *sources: DirtyBitmap) -> None:
        """Add to a persistent bitmap what others have recorded of a disk of this size.

        `dirty_bitmap` of this image, or of another one, returns such sources.
        """
        async with self._changing_bitmaps() as changes:
            await changes.merge(name, sources)

    @asynccontextmanager
    async def _changing_bitmaps(self) -> AsyncIterator[BitmapChanges]:
        async with self.structure() as structure:
            yield BitmapChanges(structure, self._bitmaps)
            self._record()

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Let bitmaps not note what is changed, because the disk reads as before."""
        self._writes, self._discards = self._carriers
        try:
            yield
        finally:
            self._record()

    def _record(self) -> None:
        """Put a recorder in front of what changes the disk, if there is a bitmap to keep."""
        if self._space is not None and self._bitmaps.found:
            recorder = Recorder(self._bitmaps, *self._carriers)
            self._writes, self._discards = recorder, recorder

    async def replay(self, links: list[Link], unnamed: set[int] | None = None) -> int:
        """See `MappedImage.replay`; bitmaps note it as they would have then."""
        bits = self._parts.geometry.cluster_bits
        for link in links:
            for bitmap in self._bitmaps.recorded:
                bitmap.mark(link.guest_cluster << bits, 1 << bits)
        return await super().replay(links, unnamed)

    async def _close_space(self, space: Space) -> None:
        """See `MappedImage`; first what bitmaps have recorded goes to the file."""
        commit = space.commit
        try:
            if (
                self._bitmaps.unstored
                and commit.failed is None
                and commit.refusal is None
            ):
                async with self._changing_bitmaps() as changes:
                    await changes.store(self._bitmaps.found)
        except BaseException:
            # what else fails now only follows from it
            with suppress(OSError, ImageError):
                await super()._close_space(space)
            raise
        await super()._close_space(space)

    # -- snapshots

    async def create_snapshot(self, name: str) -> None:
        """Keep the disk as it is now under a name; see `Snapshots.create`."""
        if self._parts.external:
            raise ImageError(
                f"{self._parts.storage.name}: has its data in another file, which an"
                " internal snapshot can't keep"
            )
        async with self.structure() as structure:
            await Snapshots(structure).create(name)

    async def delete_snapshot(self, name: str) -> None:
        """Delete the snapshot with that name or id; see `Snapshots.delete`."""
        async with self.structure() as structure:
            await Snapshots(structure).delete(name)

    async def apply_snapshot(self, name: str) -> None:
        """Go back to the snapshot with that name or id; see `Snapshots.apply`.

        Raises:
            ImageError: Persistent bitmaps would know nothing of it.
        """
        if self._bitmaps.found:
            raise ImageError(
                f"{self._parts.storage.name}: has persistent bitmaps, which could not say"
                " what a snapshot changes: remove them first"
            )
        async with self.structure() as structure:
            try:
                await Snapshots(structure).apply(name)
            finally:
                self.size = self._parts.geometry.size

    async def at_snapshot(self, name: str) -> "Qcow2Image":
        """Return the disk of a snapshot, read-only.

        It takes over this image's files, so close it instead of this one, which must
        be read-only too.

        Raises:
            ConfigError: There is no such snapshot.
            ImageCorruptError: Its tables are impossible.
        """
        parts, header = self._parts, self.header
        snapshot = find_snapshot(parts.storage.name, await self.snapshots(), name)
        size = judged(snapshot, header, parts.storage.size)
        geometry = replace(
            parts.geometry,
            size=size,
            l1_offset=snapshot.l1_table_offset,
            l1_entries=snapshot.l1_size,
        )
        tables = Tables(
            parts.storage,
            geometry,
            parts.codec,
            await load_l1(parts.storage, geometry),
            parts.pins,
            limit=self._table_cache,
        )
        below = replace(parts, geometry=geometry, tables=tables)
        return Qcow2Image(
            below, self._decompress, None, header, table_cache=self._table_cache
        )

    async def prepare_version(self, version: int) -> None:
        """Let the image have nothing that a version does not know, and all that it wants."""
        async with self.structure() as structure:
            if version == 2:
                await ZeroClusters(structure).expand()
            else:
                await Snapshots(structure).complete()

    async def change_key_slots(self, change: SlotChange) -> None:
        """Add or remove passphrases of a LUKS image; see `KeySlots.change`."""
        cipher = self._parts.cipher
        async with self.structure() as structure:
            if structure.header.luks is None or cipher is None:
                raise ConfigError(
                    f"{self._parts.storage.name}: has no key slots: it is not encrypted"
                    " with LUKS"
                )
            slots = await KeySlots.read(
                self._parts.storage, *structure.header.luks, structure.commit.barrier
            )
            await slots.change(change, cipher.key)

    async def resize(self, size: int, *, shrink: bool = False) -> None:
        """See `BlockDevice.resize`, and `resize.py` for the order of writes."""
        async with self._resizing:
            self._require_space()
            name, old = self._parts.storage.name, self.size
            size = judge_size(name, self.header, size, shrink=shrink)
            self._bitmaps.require_resizable(size)
            if size < old:
                await self._shrink(size)
            elif size > old:
                await self._grow(old, size)

    async def _shrink(self, size: int) -> None:
        async with self.structure() as structure:
            await self._set_size(structure, size)
            await structure.drop_beyond(size, self._allocator.table_for_change)
            await self._store_resized(structure)
        await self._discarder.zero_piece(size, self._parts.geometry.align_up(size))
        await self._resize_data(size)
        await self.flush()

    async def _resize_data(self, size: int) -> None:
        """Let an external data file be as long as the disk, if there is one that can."""
        data = self._parts.data
        if self._parts.external and not data.fixed_size and data.size != size:
            await data.truncate(size)

    async def _grow(self, old: int, size: int) -> None:
        geometry, backing_size = self._parts.geometry, self._parts.backing_size
        table_for_change = self._allocator.table_for_change
        async with self.structure() as structure:
            needed = -(-size >> geometry.table_bits)
            await structure.drop_beyond(old, table_for_change)
            if needed > geometry.l1_entries:
                await structure.grow_l1(needed)
        start = geometry.align_up(old)
        await self._discarder.zero_piece(old, start)
        # what lay behind the disk is gone, and what comes is zeros
        await self._resize_data(min(old, self._parts.data.size))
        await self._resize_data(size)
        shown = min(size, backing_size)
        zero_entry = self._parts.codec.zero_entry
        if zero_entry is None:
            # version 2 can only hide the backing file behind zeros that are data
            for offset in range(start, shown, geometry.cluster_size):
                await self._writer.write(offset, bytes(geometry.cluster_size))
        async with self.structure() as structure:
            if zero_entry is not None:
                await structure.zero_entries(start, shown, zero_entry, table_for_change)
                await structure.commit.barrier()
            await self._set_size(structure, size)
            await self._store_resized(structure)
        if self._parts.raw and self._parts.cipher is None:
            # a raw data file is mapped as a whole
            await self.preallocate(old, size, "metadata", lambda _: None)

    async def _set_size(self, structure: Structure, size: int) -> None:
        """Let the header and all in memory say another size.

        All bitmaps count as in use until tables of the new size are stored.
        """
        if self._bitmaps.found:
            await self._bitmaps.flag(self._bitmaps.found)
            await structure.commit.barrier()
        await structure.write_header(SIZE_OFFSET, encode_u64(size))
        structure.set_size(size)
        self.size = size
        self._bitmaps.resize(size)

    async def _store_resized(self, structure: Structure) -> None:
        if self._bitmaps.found:
            await BitmapChanges(structure, self._bitmaps).store(self._bitmaps.found)

    async def compact(
        self, *, pace: float = 0.0, progress: Progress = lambda _moved, _total: None
    ) -> Compacted:
        """Move clusters from the end of the file into free space, and cut the file.

        Reads and writes go on meanwhile. Cancelling it ends it after the move that
        is under way; it does no harm, and what is done is done.

        Args:
            pace: How long to rest after each move, as a multiple of its duration: 1
                leaves half of the time to others.
            progress: See `Progress`.

        Raises:
            ConfigError: The image can't be compacted, or that goes on already.
            ImageCorruptError: Its metadata contradict themselves.
            OSError: Something can't be read or written.
        """
        compaction = self._new_compaction(pace, progress)
        self._compaction = asyncio.get_running_loop().create_task(compaction.run())
        self._stop_compaction = compaction.stop
        try:
            return await asyncio.shield(self._compaction)
        finally:
            await self._end_compaction()

    def _new_compaction(self, pace: float, progress: Progress) -> Compaction:
        space, name = self._require_space(), self._parts.storage.name
        if self._compaction is not None:
            raise ConfigError(f"{name}: is being compacted already")
        if self._parts.external:
            raise ConfigError(
                f"{name}: has its data in another file, where each cluster has its place"
            )
        if self._parts.storage.fixed_size:
            raise ConfigError(f"{name}: a block device does not get smaller")
        if self.header.external_data:
            raise ConfigError(f"{name}: its data are in a file of their own already")
        if self._structure is None:
            raise TypeError("an image with space has a structure")
        parts, mapping, allocator = self._parts, self._mapping, self._allocator
        return Compaction(
            self._structure,
            self.structure,
            Mover(parts, space, mapping, allocator),
            CompressedMover(
                parts,
                self._structure.pool,
                space.commit,
                mapping,
                allocator,
                self._inflater,
            ),
            pace=pace,
            progress=progress,
        )

    async def _end_compaction(self) -> None:
        """Let a compaction end, if there is one."""
        task = self._compaction
        if task is not None:
            self._stop_compaction()
            await asyncio.wait([task])
            if not task.cancelled():
                task.exception()  # whoever waits for `compact` gets it
            self._compaction = None

    async def close(self) -> None:
        """See `BlockDevice.close`."""
        await self._end_compaction()
        await super().close()

    async def preallocate(
        self, offset: int, end: int, mode: str, progress: Callable[[int], None]
    ) -> None:
        """See `BlockDevice.preallocate`."""
        space, parts = self._require_space(), self._parts
        self.require_range(offset, end - offset)
        if mode == "off":
            return
        if parts.backing is not None:
            raise ConfigError(
                f"{parts.storage.name}: preallocation hides the backing file"
            )
        if parts.cipher is not None and mode != "full":
            raise ConfigError(
                f"{parts.storage.name}: preallocated clusters of an encrypted image would"
                " read as noise: only full writes what they need"
            )
        if mode == "full":
            await write_zeros(self, offset, end, progress)
        else:
            preallocator = Preallocator(parts, self._mapping, self._allocator, space)
            done = 0
            async for host_offset, length in preallocator.map_range(offset, end):
                if mode == "falloc" and not parts.external:
                    await parts.data.allocate(host_offset, length)
                done = min(done + length, end - offset)
                progress(done)
            if mode == "falloc" and parts.external and end > offset:
                await parts.data.allocate(offset, end - offset)
        await self.flush()

    @asynccontextmanager
    async def structure(self) -> AsyncIterator[Structure]:
        """Have the image alone, to change its header and tables.

        Raises:
            RequestError: The image is open read-only.
            OSError: What came before could not be made durable.
        """
        structure = self._structure
        async with self.exclusive():
            if structure is None:
                raise TypeError("an image with space has a structure")
            yield structure
