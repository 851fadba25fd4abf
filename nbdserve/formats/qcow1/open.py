"""Opening a qcow version 1 image."""

from dataclasses import dataclass

from nbdserve.block.device import BlockDevice
from nbdserve.errors import ImageCorruptError
from nbdserve.formats.chain import BackingReference
from nbdserve.formats.crypto.unlock import legacy_cipher
from nbdserve.formats.mapped.commit import Committer
from nbdserve.formats.mapped.geometry import Geometry
from nbdserve.formats.mapped.image import MappedImage
from nbdserve.formats.mapped.inflate import inflate
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
from nbdserve.formats.qcow1.check import unnamed_clusters
from nbdserve.formats.qcow1.entries import Qcow1Entries
from nbdserve.formats.qcow1.header import (
    CRYPT_AES,
    LENGTH,
    Header,
    header_bytes_needed,
    parse_header,
)
from nbdserve.formats.qcow1.space import UncountedPool
from nbdserve.storage.base import Storage


async def read_header(storage: Storage) -> Header:
    """Read and judge the header of an image.

    Raises:
        ImageError: It is not qcow version 1, or broken.
        OSError: It can't be read.
    """
    first = bytearray(min(LENGTH, storage.size))
    await storage.read(0, memoryview(first))
    data = bytearray(min(header_bytes_needed(bytes(first)), storage.size))
    await storage.read(0, memoryview(data))
    return parse_header(bytes(data), storage.size)


@dataclass(frozen=True, slots=True)
class Qcow1Driver:
    """Opens qcow version 1 images (see `chain.Driver`)."""

    options: EngineOptions = DEFAULT_OPTIONS

    async def backing(self, storage: Storage) -> BackingReference | None:
        """Return what the header says of a backing file; its format is not recorded."""
        header = await read_header(storage)
        if header.backing_name is None:
            return None
        return BackingReference(header.backing_name, None)

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
        cipher = None
        if header.crypt_method == CRYPT_AES:
            cipher = legacy_cipher(storage, self.options.secrets)
        geometry = Geometry(
            header.disk_size,
            header.cluster_bits,
            header.l2_bits,
            header.l1_table_offset,
            header.l1_size,
        )
        l1 = await load_l1(storage, geometry)
        pins = Pins()
        space = None
        if not read_only:
            commit = Committer(
                storage,
                pins,
                interval_s=self.options.commit_interval_s,
                writethrough=writethrough,
                table_bytes=self.options.table_cache,
            )
            # What a killed server left in the page cache is read from now on, so it has
            # to be as durable as the rest before anything is built on it, or flushed.
            await commit.barrier()
            space = _open_space(storage, header, geometry, l1, commit)
        codec = Qcow1Entries(header.cluster_bits)
        limit = self.options.table_cache
        tables = Tables(storage, geometry, codec, l1, pins, limit=limit)
        parts = Parts(
            storage, storage, geometry, codec, tables, pins, backing, cipher=cipher
        )
        image = MappedImage(parts, inflate, space)
        if not read_only:
            state_dir = self.options.state_dir
            await replay_leftover(image, storage, state_dir, unnamed_clusters)
            await start_redo(image, storage, state_dir)
        return image


def _open_space(
    storage: Storage,
    header: Header,
    geometry: Geometry,
    l1: Table,
    commit: Committer,
) -> Space:
    located = Located()
    located.add(0, LENGTH, header.cluster_bits)
    located.add(geometry.l1_offset, 8 * geometry.l1_entries, header.cluster_bits)
    name = header.backing_name or b""
    located.add(header.backing_file_offset, len(name), header.cluster_bits)
    located.tables = table_clusters(l1, Qcow1Entries.l1_offset_mask, geometry)
    pool = UncountedPool(
        storage, header.cluster_bits, commit, located.metadata, located.tables
    )

    async def owned(host_offset: int, is_table: bool) -> bool:
        # Compared by bytes, not clusters: L1 and what follows it may share one.
        length = geometry.l2_bytes if is_table else geometry.cluster_size
        l1_end = geometry.l1_offset + 8 * geometry.l1_entries
        if host_offset < max(l1_end, header.backing_file_offset + len(name)):
            problem = "overlaps the header or the L1 table"
        elif host_offset >= storage.size:
            problem = "lies past the end of the file"
        elif not is_table and host_offset >> header.cluster_bits in pool.tables:
            problem = "is an L2 table too"
        elif host_offset + length > storage.size and is_table:
            problem = "runs past the end of the file"
        else:
            return True
        raise ImageCorruptError(
            f"{storage.name}: the cluster at {host_offset:#x} {problem}; "
            "run 'nbdserve image check' on it"
        )

    async def prepare() -> None:
        """Nothing in the header has to change."""

    return Space(pool, commit, owned, prepare)
