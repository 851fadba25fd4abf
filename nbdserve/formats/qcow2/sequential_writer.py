"""Writing a whole qcow2 image from front to back, compressed or not.

A new image that nobody sees before it is complete needs no order of writes: clusters
are appended as they come, each L2 table behind the last cluster that it maps, and
refcounts are counted in memory and written at the end. The header goes last.

    header | L1 table | data and L2 tables | refcount table | refcount blocks

Compressed clusters are packed byte by byte and may share host clusters with
their neighbours, each of which then counts one reference for each of them
(docs/interop/qcow2.rst, "Compressed Clusters Descriptor").
"""

import sys
import zlib
from array import array
from collections.abc import Callable
from typing import Final

from nbdserve.errors import ConfigError, ImageFormatError
from nbdserve.formats.mapped import subclusters
from nbdserve.formats.mapped.tables import encode_entries, encode_words
from nbdserve.formats.qcow2.cluster_counts import ClusterCounts, encode_block
from nbdserve.formats.qcow2.create import Options
from nbdserve.formats.qcow2.entries import COMPRESSED_FLAG, COPIED, ZERO_FLAG
from nbdserve.formats.qcow2.header import (
    COMPRESSION_DEFLATE,
    COMPRESSION_ZSTD,
    CRYPT_LUKS,
    CRYPT_NONE,
    CURRENT_LENGTH,
    INCOMPATIBLE_COMPRESSION_TYPE,
    MAX_REFCOUNT_TABLE_BYTES,
    V2_LENGTH,
    Header,
    encode_header,
)
from nbdserve.formats.regions import nonzero_runs
from nbdserve.storage.base import Buffer, Storage

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

#: Compressed bytes gathered before they are written.
_GATHERED: Final = 1 << 20


def deflate(data: Buffer) -> bytes:
    """Compress as compression type 0 wants it: raw, in a window of 4 KiB."""
    compressor = zlib.compressobj(-1, zlib.DEFLATED, -12, 9)
    return compressor.compress(data) + compressor.flush()


def pack_zstd(data: Buffer) -> bytes:
    """Compress as compression type 1 wants it: one zstd frame."""
    return zstd.compress(data)


#: By the name of the option; each releases the GIL.
COMPRESSORS: Final[dict[str, Callable[[Buffer], bytes]]] = {
    "zlib": deflate,
    "zstd": pack_zstd,
}


class SequentialWriter:
    """Fills an empty storage with an image; guest clusters come in order, each once.

    Clusters that never come show the backing file, or zeros without one.

    Attributes:
        size: Bytes of the disk, whole sectors.
        cluster_size: Bytes.
        compression: "zlib", "zstd", or None if nothing is compressed.
    """

    def __init__(
        self,
        storage: Storage,
        size: int,
        options: Options,
        *,
        compression: str | None = None,
    ) -> None:
        """Begin an image.

        Args:
            storage: Empty; the caller closes it.
            size: Bytes of the disk, rounded up to 512 as qemu does.
            options: Its layout; preallocation and data files are not for this writer.
            compression: See above. Clusters may be stored plainly all the same.

        Raises:
            ConfigError: The disk is too large for its clusters, or the compression
                is not possible in this version, or packages for encryption are missing.
        """
        if compression == "zstd" and options.version < 3:
            raise ConfigError("compression zstd needs compat 3")
        self.cluster_size = options.cluster_size
        self.compression = compression
        self._storage = storage
        self._options = options
        self.size = -(-size // 512) * 512
        self._bits = options.cluster_size.bit_length() - 1
        self._entries = options.l2_entries
        self._size_shift = 62 - (self._bits - 8)
        self._most_references = (1 << options.refcount_bits) - 1
        entries = options.l1_entries(self.size)
        self._l1 = array("Q", bytes(8 * entries))
        self._counts = ClusterCounts()
        self._end = 0
        self._allocate(1 + self._clusters(8 * entries))
        luks = options.encryption
        self._cipher = None if luks is None else luks.cipher()
        self._luks = 0
        if luks is not None:
            self._luks = self._allocate(self._clusters(luks.length)) << self._bits
        self._table_number = -1
        self._table = array("Q")
        self._bitmaps = array("Q")
        #: Where the next compressed cluster goes if it fits there.
        self._packed_end = 0
        self._gathered = bytearray()

    async def plain(self, first: int, data: bytearray | memoryview) -> None:
        """Store clusters as they are.

        Args:
            first: The number of the first guest cluster.
            data: Whole clusters, zeros behind the end of the disk. Zeros are left
                out of the file.
        """
        view = memoryview(data)
        while view:
            count = min(len(view) >> self._bits, self._left_in_table(first))
            piece = view[: count << self._bits]
            host_offset = await self._map(first, count) << self._bits
            if self._cipher is not None:
                guest_offset = first << self._bits
                piece = await self._cipher.encrypt(piece, guest_offset, host_offset)
            for start, end in nonzero_runs(bytearray(piece)):
                await self._write(host_offset + start, piece[start:end])
            first += count
            view = view[len(piece) :]

    async def compressed(self, number: int, packed: bytes) -> None:
        """Store a cluster that was compressed; `packed` is shorter than a cluster."""
        await self._turn_to(number)
        offset = self._place(len(packed))
        last = offset + len(packed) - 1
        clusters = range(offset >> self._bits, (last >> self._bits) + 1)
        self._counts.add(clusters.start, len(clusters))
        self._end = max(self._end, clusters.stop)
        if offset != self._packed_end or len(self._gathered) >= _GATHERED:
            await self._write_gathered()
        self._gathered += packed
        self._packed_end = offset + len(packed)
        # sectors that it touches, besides the first one
        sectors = (last >> 9) - (offset >> 9)
        self._table[number % self._entries] = (
            COMPRESSED_FLAG | sectors << self._size_shift | offset
        )

    async def zeros(self, first: int, count: int) -> None:
        """Let clusters read as zeros although the backing file may have data there."""
        end = first + count
        while first < end:
            count = min(end - first, self._left_in_table(first))
            if self._options.version < 3:
                # no entry says so: they get clusters to which nothing is written
                await self._zeros_as_data(first, count)
            else:
                await self._turn_to(first)
                index = first % self._entries
                if self._options.extended_l2:
                    bitmaps = array("Q", [subclusters.ALL_ZERO]) * count
                    self._bitmaps[index : index + count] = bitmaps
                else:
                    words = array("Q", [ZERO_FLAG]) * count
                    self._table[index : index + count] = words
            first += count

    async def _zeros_as_data(self, first: int, count: int) -> None:
        """Give clusters places that read as zeros: only encryption has to write them."""
        if self._cipher is None:
            await self._map(first, count)
            return
        for number in range(first, first + count):
            await self.plain(number, bytearray(self.cluster_size))

    async def finish(self) -> None:
        """Write what is left, and make all of it durable.

        Raises:
            ConfigError: The refcount table or the backing file's name is too long.
            OSError: It can't be written.
        """
        await self._write_gathered()
        await self._write_table()
        await self._write(self.cluster_size, encode_words(self._l1))
        table, table_clusters = await self._write_refcounts()
        await self._storage.truncate(self._end << self._bits)
        try:
            encoded = encode_header(self._header(table, table_clusters))
        except ImageFormatError as error:
            raise ConfigError(str(error)) from error
        if self._options.encryption is not None:
            await self._write(self._luks, self._options.encryption.encode())
        await self._write(0, encoded)
        await self._storage.flush()

    def _clusters(self, length: int) -> int:
        return -(-length // self.cluster_size)

    def _allocate(self, count: int) -> int:
        """Append clusters with one reference each; return the first one's number."""
        first = self._end
        self._end += count
        self._counts.add(first, count)
        return first

    def _place(self, length: int) -> int:
        """Return the host offset for compressed data."""
        offset = self._packed_end
        used = offset & (self.cluster_size - 1)
        cluster = offset >> self._bits
        if used and self._counts[cluster] < self._most_references:
            fits = used + length <= self.cluster_size
            if fits or cluster + 1 == self._end:
                return offset
        return self._end << self._bits

    def _left_in_table(self, number: int) -> int:
        """Return how many guest clusters from this one on belong to its L2 table."""
        return self._entries - number % self._entries

    async def _map(self, first: int, count: int) -> int:
        """Give new host clusters, in one piece, to guest clusters of one L2 table."""
        await self._turn_to(first)
        host = self._allocate(count)
        index = first % self._entries
        start, step = host << self._bits | COPIED, self.cluster_size
        words = array("Q", range(start, start + count * step, step))
        self._table[index : index + count] = words
        self._bitmaps[index : index + count] = array("Q", [subclusters.ALL]) * count
        return host

    async def _turn_to(self, number: int) -> None:
        """Have the L2 table of a guest cluster at hand."""
        wanted = number // self._entries
        if wanted != self._table_number:
            await self._write_table()
            self._table_number = wanted
            self._table = array("Q", bytes(8 * self._entries))
            self._bitmaps = self._table[:]

    async def _write_table(self) -> None:
        if self._table_number < 0:
            return
        host_offset = self._allocate(1) << self._bits
        bitmaps = self._bitmaps if self._options.extended_l2 else None
        await self._write(host_offset, encode_entries(self._table, bitmaps))
        self._l1[self._table_number] = host_offset | COPIED
        self._table_number = -1

    async def _write_gathered(self) -> None:
        if self._gathered:
            start = self._packed_end - len(self._gathered)
            gathered, self._gathered = self._gathered, bytearray()
            await self._write(start, gathered)

    async def _write_refcounts(self) -> tuple[int, int]:
        """Write refcount table and blocks; return the table's offset and clusters."""
        per_block = self.cluster_size * 8 // self._options.refcount_bits
        used = self._end
        table = blocks = 1
        # Both cover themselves too: repeat until nothing grows.
        while True:
            before = table, blocks
            blocks = -(-(used + table + blocks) // per_block)
            table = self._clusters(8 * blocks)
            if (table, blocks) == before:
                break
        if table * self.cluster_size > MAX_REFCOUNT_TABLE_BYTES:
            raise ConfigError(
                "the refcount table would be too large: take larger clusters"
            )
        table_offset = self._allocate(table + blocks) << self._bits
        first_block = table_offset + (table << self._bits)
        words = array("Q")
        for index in range(blocks):
            words.append(first_block + (index << self._bits))
            await self._write(words[-1], self._encode_block(index, per_block))
        await self._write(table_offset, encode_words(words))
        return table_offset, table

    def _encode_block(self, index: int, per_block: int) -> bytes:
        first = index * per_block
        counts: bytes | list[int] = self._counts.slice(first, per_block)
        if 255 in counts:
            counts = self._counts.counts(first, per_block)
        return encode_block(counts, self._options.refcount_bits.bit_length() - 1)

    def _header(self, table_offset: int, table_clusters: int) -> Header:
        options = self._options
        incompatible, compatible, _ = options.features()
        zstd_used = self.compression == "zstd"
        if zstd_used:
            incompatible |= INCOMPATIBLE_COMPRESSION_TYPE
        return Header(
            version=options.version,
            backing_name=options.backing_name,
            cluster_bits=self._bits,
            size=self.size,
            l1_size=len(self._l1),
            l1_table_offset=self.cluster_size if self._l1 else 0,
            refcount_table_offset=table_offset,
            refcount_table_clusters=table_clusters,
            refcount_order=options.refcount_bits.bit_length() - 1,
            incompatible_features=incompatible,
            compatible_features=compatible,
            compression_type=COMPRESSION_ZSTD if zstd_used else COMPRESSION_DEFLATE,
            header_length=V2_LENGTH if options.version == 2 else CURRENT_LENGTH,
            extensions=options.extensions(self._luks),
            crypt_method=CRYPT_LUKS if options.encryption else CRYPT_NONE,
        )

    async def _write(self, offset: int, data: Buffer) -> None:
        if not self._storage.try_write(offset, data):
            await self._storage.write(offset, data)
