"""One walk over all metadata of a qcow2 image: who uses which cluster.

`check` compares what it finds with the refcounts on disk, `rebuild` writes it
there. The judgement follows qemu-img check, so that both agree on what is a
corruption; docs/interop/qcow2.rst of qemu says what the structures are.

A table that several pointers lead to (snapshots share most of theirs) is read
once and counts as often as it is used. Blocking reads: run it in the command
line's own process or another one, never beside an event loop.
"""

import os
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from nbdserve.errors import ImageCorruptError, ImageError
from nbdserve.formats.check_result import CheckResult
from nbdserve.formats.mapped import subclusters
from nbdserve.formats.qcow2.bitmap_directory import (
    BITMAP_TABLE_OFFSET_MASK,
    BITMAP_TABLE_RESERVED_MASK,
    parse_bitmap_directory,
)
from nbdserve.formats.qcow2.cluster_counts import ClusterCounts, decode_block
from nbdserve.formats.qcow2.extensions import (
    EXTENSION_BITMAPS,
    EXTENSION_LUKS,
    parse_bitmaps_extension,
    parse_luks_extension,
)
from nbdserve.formats.qcow2.header import (
    AUTOCLEAR_BITMAPS,
    MAX_L1_BYTES,
    MAX_OFFSET,
    Header,
)
from nbdserve.formats.qcow2.snapshot_table import (
    Snapshot,
    most_table_bytes,
    parse_snapshot_table,
)

COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
L1_RESERVED_MASK = 0x7F00_0000_0000_01FF
#: Bits 1 to 8 and 56 to 61; bit 62 says compressed, bit 0 zero.
L2_RESERVED_MASK = 0x3F00_0000_0000_01FE
REFCOUNT_TABLE_RESERVED_MASK = 0x1FF
_CHUNK = 512
_ZERO_CHUNK = array("Q", bytes(8 * _CHUNK))


class ImageFile:
    """An image file's bytes, as a walk wants them: zeros past the end."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.size = os.fstat(fd).st_size
        if self.size == 0:
            self.size = os.lseek(fd, 0, os.SEEK_END)

    def read(self, host_offset: int, length: int) -> bytes:
        """Return `length` bytes; what lies past the end of the file is zero."""
        parts = []
        left = length
        while left and host_offset < self.size:
            data = os.pread(self.fd, min(left, 64 << 20), host_offset)
            if not data:
                break
            parts.append(data)
            left -= len(data)
            host_offset += len(data)
        return b"".join([*parts, bytes(left)])

    def words(self, host_offset: int, count: int) -> "array[int]":
        """Return `count` big-endian 64-bit words."""
        words = array("Q", self.read(host_offset, count * 8))
        if sys.byteorder == "little":
            words.byteswap()
        return words


def runs(words: "array[int]", step: int) -> Iterator[tuple[int, int, int]]:
    """Find runs of words that grow by `step`; zero words are left out.

    A word with offset 0 (a zero cluster without a place) is a run of its own.

    Yields:
        (index, first word, number of words).
    """
    start = first = 0
    expected = -1
    for base in range(0, len(words), _CHUNK):
        chunk = words[base : base + _CHUNK]
        if not first and chunk == _ZERO_CHUNK[: len(chunk)]:
            continue
        for index, word in enumerate(chunk, base):
            if word == expected:
                expected += step
                continue
            if first:
                yield start, first, index - start
            start, first = index, word
            expected = word + step if word & OFFSET_MASK else -1
    if first:
        yield start, first, len(words) - start


@dataclass(slots=True)
class TableUse:
    """Which pointers lead to an L2 table.

    Attributes:
        total: How many.
        active: How many of them from the active L1 table.
        number: The L1 index of the first one.
    """

    number: int
    total: int = 0
    active: int = 0


@dataclass(slots=True)
class Walk:
    """The walk's state and outcome.

    Attributes:
        file: Where to read.
        header: As parsed.
        result: Takes the findings.
        used: How often each cluster is used.
        stored: The refcounts on disk.
        snapshots: The snapshot table.
        snapshot_table_bytes: Its length.
        refcount_table: Entries as stored.
        unreadable_blocks: Indexes of refcount table entries that can't be used.
        rebuild_needed: Whether refcount structures themselves are broken.
        pointer_corruptions: Corruptions found on the way to guest data.
        tables: For each L2 table in the file, by host offset, how many pointers lead
            to it.
    """

    file: ImageFile
    header: Header
    result: CheckResult
    used: ClusterCounts = field(default_factory=ClusterCounts)
    stored: ClusterCounts = field(default_factory=ClusterCounts)
    snapshots: list[Snapshot] = field(default_factory=list)
    snapshot_table_bytes: int = 0
    refcount_table: "array[int]" = field(default_factory=lambda: array("Q"))
    unreadable_blocks: set[int] = field(default_factory=set)
    rebuild_needed: bool = False
    pointer_corruptions: int = 0
    tables: dict[int, TableUse] = field(default_factory=dict)

    def run(self) -> None:
        """Count every use of every cluster, then read the stored refcounts."""
        self.run_without_refcounts()
        self._refcount_structures()

    def run_without_refcounts(self) -> None:
        """Count every use of every cluster, except by refcount table and blocks."""
        self.result.total_clusters = -(
            -self.header.disk_size // self.header.cluster_size
        )
        self.use(0, self.header.cluster_size, "header")
        self._snapshot_table()
        self._l1_tables()
        for host_offset, use in self.tables.items():
            self._l2_table(host_offset, use)
        self._encryption_header()
        self._bitmaps()
        self.pointer_corruptions = self.result.corruptions

    def use(self, host_offset: int, length: int, what: str, times: int = 1) -> bool:
        """Count the clusters of a region as used, if the file can have them.

        The last cluster of a file may be cut, but nothing may lie a whole
        cluster or more past the end.
        """
        if length <= 0:
            return True
        cluster_size = self.header.cluster_size
        if host_offset + length - self.file.size >= cluster_size:
            self.result.corruption(
                f"{what} at {host_offset:#x} with {length} bytes runs past the end of"
                f" the file by a cluster or more",
                times,
            )
            return False
        bits = self.header.cluster_bits
        first = host_offset >> bits
        last = host_offset + length - 1 >> bits
        self.used.add(first, last - first + 1, times)
        return True

    def is_readable(self, cluster: int) -> bool:
        """Return whether a cluster's stored refcount could be read."""
        block = cluster // self.header.refcount_block_entries
        return block not in self.unreadable_blocks

    def _snapshot_table(self) -> None:
        header = self.header
        if not header.nb_snapshots:
            return
        most = most_table_bytes(header.nb_snapshots)
        length = min(most, self.file.size - header.snapshots_offset)
        try:
            self.snapshots, self.snapshot_table_bytes = parse_snapshot_table(
                self.file.read(header.snapshots_offset, length), header.nb_snapshots
            )
        except ImageCorruptError as error:
            self.result.corruption(str(error))
            return
        self.use(header.snapshots_offset, self.snapshot_table_bytes, "snapshot table")

    def _l1_tables(self) -> None:
        header = self.header
        self._l1_table(header.l1_table_offset, header.l1_size, 1, active=True)
        shared = Counter((s.l1_table_offset, s.l1_size) for s in self.snapshots)
        for (host_offset, entries), times in shared.items():
            if host_offset % header.cluster_size:
                self.result.corruption(
                    f"a snapshot's L1 table at {host_offset:#x} is not aligned to a"
                    " cluster",
                    times,
                )
            elif entries * 8 > MAX_L1_BYTES:
                self.result.corruption(
                    f"a snapshot's L1 table at {host_offset:#x} has {entries} entries",
                    times,
                )
            else:
                self._l1_table(host_offset, entries, times, active=False)

    def _l1_table(
        self, host_offset: int, entries: int, times: int, *, active: bool
    ) -> None:
        if not entries or not self.use(host_offset, entries * 8, "L1 table", times):
            return
        words = self.file.words(host_offset, entries)
        for start, first, length in runs(words, self.header.cluster_size):
            for index in range(start, start + length):
                word = first + (index - start) * self.header.cluster_size
                if word & L1_RESERVED_MASK:
                    self.result.corruption(
                        f"L1 entry {index} at {host_offset + index * 8:#x} is"
                        f" {word:#018x}: reserved bits are set",
                        times,
                    )
                table = word & OFFSET_MASK
                inside = self.use(table, self.header.cluster_size, "L2 table", times)
                if table % self.header.cluster_size:
                    self.result.corruption(
                        f"L1 entry {index} at {host_offset + index * 8:#x}: the L2"
                        f" table {table:#x} is not aligned to a cluster",
                        times,
                    )
                if not inside:
                    # only zeros are there, and millions of entries may say so
                    continue
                use = self.tables.setdefault(table, TableUse(index))
                use.total += times
                use.active += times if active else 0

    def _l2_table(self, host_offset: int, use: TableUse) -> None:
        step = self.header.cluster_size
        words, bitmaps = self.l2_words(host_offset)
        allocated = fragmented = compressed = 0
        follows = 0
        for start, first, length in runs(words, step):
            last = first + (length - 1) * step
            if (first | last) & (COMPRESSED | L2_RESERVED_MASK) or bitmaps is not None:
                entries = [(start + i, first + i * step, 1) for i in range(length)]
            else:
                entries = [(start, first, length)]
            for index, word, count in entries:
                at = host_offset + index * self.header.l2_entry_size
                if word & COMPRESSED:
                    bitmap = bitmaps[index] if bitmaps is not None else 0
                    if self._compressed(at, word, bitmap, use.total):
                        compressed += 1
                        fragmented += 1
                        allocated += 1
                    continue
                guest = (use.number * self.header.l2_entries + index) * step
                if not self._plain(at, word, count, use.total, guest):
                    continue
                data = word & OFFSET_MASK
                allocated += count
                fragmented += int(follows not in (0, data))
                follows = data + count * step
        if bitmaps is not None:
            self._subclusters(host_offset, words, bitmaps, use.total)
        self.result.allocated_clusters += allocated * use.active
        self.result.fragmented_clusters += fragmented * use.active
        self.result.compressed_clusters += compressed * use.active

    def l2_words(self, host_offset: int) -> "tuple[array[int], array[int] | None]":
        """Return an L2 table's entries, and with subclusters their bitmaps."""
        words = self.file.words(host_offset, self.header.cluster_size // 8)
        if self.header.extended_l2:
            return words[0::2], words[1::2]
        return words, None

    def _compressed(self, at: int, word: int, bitmap: int, times: int) -> bool:
        """Count a compressed cluster; return whether it can be one."""
        if word & COPIED:
            self.result.corruption(
                f"L2 entry at {at:#x} is {word:#018x}: COPIED on a compressed cluster",
                times,
            )
        problem = None
        if self.header.external_data:
            problem = "compressed in an image with external data"
        elif bitmap:
            problem = "a compressed cluster has subclusters"
        if problem:
            self.result.corruption(f"L2 entry at {at:#x}: {problem}", times)
            return False
        offset_bits = 62 - (self.header.cluster_bits - 8)
        data = word & (1 << offset_bits) - 1
        sectors = ((word & COMPRESSED - 1) >> offset_bits) + 1
        length = sectors * 512 - (data & 511)
        self.use(data, length, "compressed cluster", times)
        return True

    def _plain(self, at: int, word: int, count: int, times: int, guest: int) -> bool:
        """Count a run of plain clusters; return whether it is a run of clusters."""
        header = self.header
        # qemu-img check is silent about the zero flag in version 2; reading it is EIO.
        no_zero_flag = header.extended_l2 or header.version == 2
        if word & L2_RESERVED_MASK or (word & ZERO and no_zero_flag):
            self.result.corruption(
                f"L2 entry at {at:#x} is {word:#018x}: reserved bits are set",
                times * count,
            )
        data = word & OFFSET_MASK
        if data == 0 and not (header.external_data and word & COPIED):
            # With the zero flag, a cluster of zeros without a place in the file;
            # with COPIED alone, what qemu takes for unallocated.
            return False
        if data % header.cluster_size:
            self.result.corruption(
                f"L2 entry at {at:#x}: the data cluster {data:#x} is not aligned",
                times * count,
            )
        if header.external_data:
            if data != guest:
                self.result.corruption(
                    f"L2 entry at {at:#x}: {data:#x} is another cluster's place in the"
                    f" data file, not that of guest offset {guest:#x}",
                    times * count,
                )
            return True
        length = count * header.cluster_size
        if count == 1 or data + length - self.file.size < header.cluster_size:
            self.use(data, length, "data cluster", times)
        else:
            for index in range(count):
                self.use(
                    data + index * header.cluster_size,
                    header.cluster_size,
                    "data cluster",
                    times,
                )
        return True

    def _subclusters(
        self,
        host_offset: int,
        words: "array[int]",
        bitmaps: "array[int]",
        times: int,
    ) -> None:
        for index, bitmap in enumerate(bitmaps):
            # the rest can't be wrong, or has been looked at
            if not subclusters.allocated(bitmap) or words[index] & COMPRESSED:
                continue
            first = self.header.external_data and words[index] & COPIED
            if not words[index] & OFFSET_MASK and not first:
                problem = "subclusters are allocated, and the cluster is not"
            elif not subclusters.is_valid(bitmap):
                problem = "a subcluster is allocated and zero at once"
            else:
                continue
            at = host_offset + index * self.header.l2_entry_size
            self.result.corruption(f"L2 entry at {at:#x}: {problem}", times)

    def _encryption_header(self) -> None:
        luks = self.header.extension(EXTENSION_LUKS)
        if luks is not None:
            host_offset, length = parse_luks_extension(luks, self.header.cluster_bits)
            self.use(host_offset, length, "encryption header")

    def _bitmaps(self) -> None:
        header = self.header
        data = header.extension(EXTENSION_BITMAPS)
        if data is None or not header.autoclear_features & AUTOCLEAR_BITMAPS:
            return
        try:
            extension = parse_bitmaps_extension(data, header.cluster_bits)
            size, offset = extension.directory_size, extension.directory_offset
            if not self.use(offset, size, "bitmap directory"):
                return
            bitmaps = parse_bitmap_directory(
                self.file.read(offset, size), extension.nb_bitmaps
            )
        except ImageCorruptError as error:
            self.result.corruption(str(error))
            return
        for bitmap in bitmaps:
            self._bitmap_table(bitmap.table_offset, bitmap.table_entries)

    def _bitmap_table(self, host_offset: int, entries: int) -> None:
        if host_offset % self.header.cluster_size:
            self.result.corruption(
                f"the bitmap table at {host_offset:#x} is not aligned to a cluster"
            )
            return
        if not self.use(host_offset, entries * 8, "bitmap table"):
            return
        for index, word in enumerate(self.file.words(host_offset, entries)):
            data = word & BITMAP_TABLE_OFFSET_MASK
            if (
                word & BITMAP_TABLE_RESERVED_MASK
                or (data and word & 1)
                or data % self.header.cluster_size
            ):
                self.result.corruption(
                    f"bitmap table entry {index} at {host_offset + index * 8:#x} is"
                    f" {word:#018x}"
                )
            elif data:
                self.use(data, self.header.cluster_size, "bitmap cluster")

    def _refcount_structures(self) -> None:
        header = self.header
        entries = header.refcount_table_entries
        self.use(header.refcount_table_offset, entries * 8, "refcount table")
        self.refcount_table = self.file.words(header.refcount_table_offset, entries)
        file_clusters = -(-self.file.size // header.cluster_size)
        blocks: list[tuple[int, int]] = []
        for index, word in enumerate(self.refcount_table):
            if not word:
                continue
            block = word & ~REFCOUNT_TABLE_RESERVED_MASK
            cluster = block >> header.cluster_bits
            problem = None
            if block % header.cluster_size:
                problem = "is not aligned to a cluster"
                self.unreadable_blocks.add(index)
            elif cluster >= file_clusters:
                problem = "lies past the end of the file"
                if block > MAX_OFFSET:
                    self.unreadable_blocks.add(index)
            elif word & REFCOUNT_TABLE_RESERVED_MASK:
                # As in qemu: the block's counts are good, itself counts as unused.
                problem = "is named by an entry with reserved bits"
                blocks.append((index, cluster))
            if problem:
                self.rebuild_needed = True
                self.result.corruption(
                    f"refcount table entry {index} at"
                    f" {header.refcount_table_offset + index * 8:#x} is {word:#018x}:"
                    f" the block {problem}"
                )
                continue
            self.used.add(cluster, 1)
            blocks.append((index, cluster))
            if self.used[cluster] != 1:
                self.rebuild_needed = True
                self.result.corruption(
                    f"refcount block {index} at {block:#x} is used"
                    f" {self.used[cluster]} times"
                )
        for index, cluster in blocks:
            self._refcount_block(index, cluster)

    def _refcount_block(self, index: int, cluster: int) -> None:
        header = self.header
        block = self.file.read(cluster << header.cluster_bits, header.cluster_size)
        if block.count(0) == len(block):
            return
        counts, many = decode_block(block, header.refcount_order)
        self.stored.load(index * header.refcount_block_entries, counts, many)


def require_countable(header: Header, file_size: int) -> None:
    """Refuse a file so long that its cluster numbers make no sense.

    Raises:
        ImageError: Clusters must lie below 2^56 bytes.
    """
    if file_size > 1 << 56:
        raise ImageError(
            f"the file has {file_size} bytes: clusters of {header.cluster_size} bytes"
            " must lie below 2^56"
        )
