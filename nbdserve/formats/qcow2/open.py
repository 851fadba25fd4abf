"""Opening a qcow2 image: header, tables, and what its features ask of a writer."""

import asyncio
import os
from dataclasses import dataclass, replace
from functools import partial

from nbdserve.block.device import BlockDevice
from nbdserve.errors import DataFileError, ImageCorruptError, ImageError
from nbdserve.formats.chain import BackingReference
from nbdserve.formats.crypto.image_cipher import ImageCipher
from nbdserve.formats.crypto.unlock import legacy_cipher, luks_cipher
from nbdserve.formats.mapped.commit import Committer
from nbdserve.formats.mapped.geometry import Geometry
from nbdserve.formats.mapped.inflate import inflate, unzstd
from nbdserve.formats.mapped.opening import (
    DEFAULT_OPTIONS,
    EngineOptions,
    Located,
    load_l1,
    replay_leftover,
    start_redo,
    table_clusters,
)
from nbdserve.formats.mapped.parts import Parts, Space
from nbdserve.formats.mapped.tables import Table, Tables
from nbdserve.formats.mapped.waits import Pins
from nbdserve.formats.qcow2.bitmaps import Bitmaps
from nbdserve.formats.qcow2.check import check_image, unnamed_clusters
from nbdserve.formats.qcow2.compacting_pool import CompactingPool
from nbdserve.formats.qcow2.entries import OFFSET_MASK, ExtendedEntries, Qcow2Entries
from nbdserve.formats.qcow2.extensions import EXTENSION_DATA_FILE
from nbdserve.formats.qcow2.header import (
    AUTOCLEAR_BITMAPS,
    AUTOCLEAR_DATA_FILE_RAW,
    AUTOCLEAR_OFFSET,
    COMPRESSION_ZSTD,
    CRYPT_AES,
    FIXED_LENGTH,
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_OFFSET,
    Header,
    encode_u64,
    header_bytes_needed,
    parse_header,
    require_writable,
)
from nbdserve.formats.qcow2.image import Qcow2Image
from nbdserve.formats.qcow2.rebuild import rebuild_refcounts
from nbdserve.formats.qcow2.refcounts import load_refcount_table
from nbdserve.formats.qcow2.repair import repair_image
from nbdserve.formats.qcow2.snapshot_table import judge_snapshot
from nbdserve.formats.qcow2.snapshots import read_snapshots
from nbdserve.storage.base import Storage
from nbdserve.storage.file import FileStorage

#: Clusters of snapshots' L1 tables that are told from data (64 bytes of memory each);
#: what is beyond, no sane image has, and its refcounts protect it.
_MAX_SNAPSHOT_L1_CLUSTERS = 1 << 20


async def read_header(storage: Storage) -> Header:
    """Read and judge the header of an image.

    Raises:
        ImageError: It is not qcow2, or broken.
        OSError: It can't be read.
    """
    first = bytearray(min(FIXED_LENGTH, storage.size))
    await storage.read(0, memoryview(first))
    data = bytearray(min(header_bytes_needed(bytes(first)), storage.size))
    await storage.read(0, memoryview(data))
    return parse_header(bytes(data), storage.size)


@dataclass(frozen=True, slots=True)
class Qcow2Driver:
    """Opens qcow2 images (see `chain.Driver`, and `data_file.SplitDriver`).

    Attributes:
        options: For the engine.
        data: The external data file of the image to open, if it has one; the disk
            owns it as well.
    """

    options: EngineOptions = DEFAULT_OPTIONS
    data: Storage | None = None

    async def backing(self, storage: Storage) -> BackingReference | None:
        """Return what the header says of a backing file."""
        header = await read_header(storage)
        if header.backing_name is None:
            return None
        return BackingReference(header.backing_name, header.backing_format)

    async def data_file(self, storage: Storage) -> bytes | None:
        """Return what the header says of an external data file."""
        header = await read_header(storage)
        if not header.external_data:
            return None
        name = header.extension(EXTENSION_DATA_FILE)
        if not name:
            raise DataFileError(
                "has its data in another file, and does not record the name of that"
            )
        return name

    def with_data(self, data: Storage) -> "Qcow2Driver":
        """Return a driver that opens an image whose data lie in `data`."""
        return replace(self, data=data)

    async def open(
        self,
        storage: Storage,
        *,
        read_only: bool,
        backing: BlockDevice | None,
        writethrough: bool,
    ) -> BlockDevice:
        """Open an image; on success it owns `storage` and `backing`."""
        header = await read_header(storage)
        # this may take seconds, and find out that a passphrase is wrong
        cipher = await self._cipher(storage, header)
        build = partial(
            self._build,
            storage,
            cipher=cipher,
            read_only=read_only,
            backing=backing,
            writethrough=writethrough,
        )
        image = await build()
        if read_only:
            return image
        state_dir = self.options.state_dir
        if await replay_leftover(image, storage, state_dir, unnamed_clusters):
            notes = image.notes
            await image.settle()
            await _reclaim(storage, notes)
            image = await build()
            # what both have found is said once
            image.notes = list(dict.fromkeys(notes + image.notes))
        await start_redo(image, storage, state_dir)
        return image

    async def _build(
        self,
        storage: Storage,
        *,
        cipher: ImageCipher | None,
        read_only: bool,
        backing: BlockDevice | None,
        writethrough: bool,
    ) -> Qcow2Image:
        header = await read_header(storage)
        data = self._data(storage, header, read_only=read_only)
        if not read_only:
            require_writable(header)
            if header.dirty:
                header = await self._repair(storage)
        geometry = Geometry(
            header.disk_size,
            header.cluster_bits,
            header.cluster_bits - (4 if header.extended_l2 else 3),
            header.l1_table_offset,
            header.l1_size,
            header.extended_l2,
        )
        l1 = await load_l1(storage, geometry)
        pins = Pins()
        space = None
        if read_only:
            bitmaps = await Bitmaps.load(storage, header, None)
        else:
            commit = Committer(
                storage,
                pins,
                interval_s=self.options.commit_interval_s,
                writethrough=writethrough,
                table_bytes=self.options.table_cache,
                data=self.data if header.external_data else None,
            )
            # What a killed server left in the page cache is read from now on, so it has
            # to be as durable as the rest before anything is built on it, or flushed.
            await commit.barrier()
            space, bitmaps = await _open_space(storage, header, geometry, l1, commit)
        spelling = ExtendedEntries if header.extended_l2 else Qcow2Entries
        codec = spelling(
            header.version, header.cluster_bits, external=header.external_data
        )
        limit = self.options.table_cache
        tables = Tables(storage, geometry, codec, l1, pins, limit=limit)
        parts = Parts(
            storage,
            data,
            geometry,
            codec,
            tables,
            pins,
            backing,
            header.raw_data,
            cipher,
        )
        decompress = unzstd if header.compression_type == COMPRESSION_ZSTD else inflate
        return Qcow2Image(
            parts, decompress, space, header, table_cache=limit, bitmaps=bitmaps
        )

    def _data(self, storage: Storage, header: Header, *, read_only: bool) -> Storage:
        """Return the file that guest data lie in."""
        if not header.external_data:
            return storage
        if self.data is None:
            raise DataFileError("its data lie in another file, which is not open")
        if header.nb_snapshots and not read_only:
            raise ImageCorruptError(
                "has an external data file and internal snapshots: there can't be both"
            )
        if header.raw_data and header.backing_name is not None:
            raise ImageCorruptError(
                "says that its data file is all of the disk (bit 1 of"
                " autoclear_features), and has a backing file too"
            )
        return self.data

    async def _cipher(self, storage: Storage, header: Header) -> ImageCipher | None:
        """Unlock an encrypted image."""
        if header.luks is not None:
            return await luks_cipher(storage, *header.luks, self.options.secrets)
        if header.crypt_method == CRYPT_AES:
            return legacy_cipher(storage, self.options.secrets)
        return None

    async def _repair(self, storage: Storage) -> Header:
        """Bring refcounts in order that another writer had put off (the dirty bit)."""
        if not isinstance(storage, FileStorage):
            raise ImageCorruptError(
                "the dirty bit is set: its refcounts must be rebuilt before writing"
            )
        await storage.call(lambda fd: rebuild_refcounts(fd, storage.name))
        return await read_header(storage)


async def _reclaim(storage: Storage, notes: list[str]) -> None:
    """Give back what a killed server had reserved and not used.

    It takes a walk over all tables (2 s for 512 GiB, mapped), so that kills don't add
    up. An image that is found to be damaged is left as it is.
    """
    if not isinstance(storage, FileStorage):
        return

    def reclaim(fd: int) -> int:
        found = check_image(fd, storage.name)
        if not found.leaks or found.corruptions or found.check_errors:
            return 0
        after = repair_image(
            fd, storage.name, everything=False, agree=lambda _: False
        ).after
        sound = not after.leaks and not after.corruptions and not after.check_errors
        if sound and after.image_end_offset < storage.size and not storage.fixed_size:
            os.ftruncate(fd, after.image_end_offset)
        return found.leaks - after.leaks

    count = await storage.call(reclaim)
    if count:
        notes.append(
            f"{storage.name}: gave back {count} clusters that a killed server had reserved"
        )


async def _open_space(
    storage: Storage,
    header: Header,
    geometry: Geometry,
    l1: Table,
    commit: Committer,
) -> tuple[Space, Bitmaps]:
    located = await _locate(storage, header)
    located.tables = table_clusters(l1, OFFSET_MASK, geometry)
    table = await load_refcount_table(storage, header)
    for host_offset in table:
        if host_offset:
            located.add(host_offset, 1, header.cluster_bits)
    pool = CompactingPool(
        storage, header, table, commit, located.metadata, located.tables
    )
    await pool.find_end()
    bitmaps = await Bitmaps.load(storage, header, pool)
    guard = _Guard(storage, header, pool, commit, bitmaps)
    return Space(pool, commit, guard.owned, guard.prepare), bitmaps


async def _locate(storage: Storage, header: Header) -> Located:
    """Find out which clusters hold the header and tables."""
    located = Located()
    bits = header.cluster_bits
    located.add(0, 1, bits)
    located.add(header.l1_table_offset, 8 * header.l1_size, bits)
    if header.luks is not None:
        located.add(*header.luks, bits)
    located.add(
        header.refcount_table_offset, header.refcount_table_clusters << bits, bits
    )
    if not header.nb_snapshots:
        return located
    try:
        snapshots, length = await read_snapshots(storage, header)
    except ImageError:
        # The snapshots can't be used; the active disk can, and its refcounts
        # protect what they share.
        located.add(header.snapshots_offset, 1, bits)
        return located
    located.add(header.snapshots_offset, length, bits)
    left = _MAX_SNAPSHOT_L1_CLUSTERS
    for snapshot in snapshots:
        try:
            judge_snapshot(
                snapshot,
                cluster_size=header.cluster_size,
                entries_needed=0,
                file_size=storage.size,
            )
        except ImageError:
            # as above
            continue
        left -= (8 * snapshot.l1_size >> bits) + 1
        if left < 0:
            break
        located.add(snapshot.l1_table_offset, 8 * snapshot.l1_size, bits)
    return located


class _Guard:
    """What the format wants before an image is changed, and before a cluster is."""

    def __init__(
        self,
        storage: Storage,
        header: Header,
        pool: CompactingPool,
        commit: Committer,
        bitmaps: Bitmaps,
    ) -> None:
        self._storage = storage
        self._header = header
        self._pool = pool
        self._commit = commit
        self._bitmaps = bitmaps
        kept = AUTOCLEAR_BITMAPS if bitmaps.kept else 0
        if header.external_data:
            kept |= AUTOCLEAR_DATA_FILE_RAW
        self._autoclear = header.autoclear_features & kept
        self._prepared = self._autoclear == header.autoclear_features
        commit.on_damage(self._mark_corrupt)
        self._lock = asyncio.Lock()

    async def prepare(self) -> None:
        """Clear the autoclear bits of what is not kept up to date, and flag what is.

        Durable before the first change, as docs/interop/qcow2.rst wants.
        """
        if not self._prepared or self._bitmaps.silent:
            async with self._lock:
                await self._announce()

    async def _announce(self) -> None:
        if self._prepared and not self._bitmaps.silent:
            return
        if not self._prepared:
            await self._storage.write(AUTOCLEAR_OFFSET, encode_u64(self._autoclear))
        await self._bitmaps.announce(self._commit.barrier)
        self._prepared = True

    async def owned(self, host_offset: int, is_table: bool) -> bool:
        """Return whether one entry alone uses a cluster, if it can be one to write to."""
        if self._header.external_data and not is_table:
            # each cluster has its own place in the data file
            return True
        bits = self._header.cluster_bits
        cluster = host_offset >> bits
        if host_offset & (1 << bits) - 1 or not host_offset:
            problem = "is no cluster to write to"
        elif host_offset >= self._storage.size:
            problem = "lies past the end of the file"
        elif cluster in self._pool.metadata or (
            not is_table and cluster in self._pool.tables
        ):
            problem = "holds metadata, and an entry names it as a place to write to"
        else:
            references = await self._pool.references(host_offset)
            if references:
                return references == 1
            problem = "is in use although its refcount says it is free"
        raise self._pool.damaged(
            f"the cluster at {host_offset:#x} {problem}; "
            "run 'nbdserve image check' on it"
        )

    async def _mark_corrupt(self) -> None:
        """Set the corrupt bit (version 3): only a repair makes writing safe again.

        docs/interop/qcow2.rst: an image with this bit "must not be written to", so no
        write is taken from now on; what was written before can be flushed and read.
        """
        if self._header.version >= 3:
            word = bytearray(8)
            await self._storage.read(INCOMPATIBLE_OFFSET, memoryview(word))
            features = int.from_bytes(word, "big") | INCOMPATIBLE_CORRUPT
            await self._storage.write(INCOMPATIBLE_OFFSET, encode_u64(features))
            await self._commit.barrier()
