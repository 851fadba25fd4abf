"""Checking a qcow version 1 image; qemu-img has no check for this format.

Without refcounts there is one question: does every table and cluster lie inside
the file, at a place of its own? Blocking reads, for the command line or another
process.
"""

import os
import sys
from array import array
from collections.abc import Collection, Iterator

from nbdserve.errors import ImageError
from nbdserve.formats.check_result import CheckResult
from nbdserve.formats.qcow1.header import Header, header_bytes_needed, parse_header

_COMPRESSED = 1 << 63
_SECTOR_BITS = 9
#: 256 MiB of marks: a file of 1 TiB.
_MAX_SECTORS = 1 << 31
_PAGE_BITS = 15
_PAGE = 1 << _PAGE_BITS
_BATCH = 1 << 16


class _Uses:
    """One bit for each 512-byte sector of the file, in pages made when needed."""

    def __init__(self) -> None:
        self._pages: dict[int, int] = {}

    def touches(self, first: int, length: int) -> bool:
        """Return whether any of these sectors is marked."""
        return any(
            self._pages.get(number, 0) & mask for number, mask in _masks(first, length)
        )

    def mark(self, first: int, length: int) -> None:
        """Mark sectors as used."""
        for number, mask in _masks(first, length):
            self._pages[number] = self._pages.get(number, 0) | mask


def _masks(first: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut a run of sectors into pages: (page, bits in it)."""
    end = first + length
    while first < end:
        number, start = first >> _PAGE_BITS, first & _PAGE - 1
        count = min(_PAGE - start, end - first)
        yield number, (1 << count) - 1 << start
        first += count


class _Check:
    """The state of one check."""

    def __init__(self, fd: int, header: Header, result: CheckResult, size: int) -> None:
        self._fd = fd
        self._header = header
        self._result = result
        self._size = size
        self._plain = _Uses()
        # Compressed clusters may share a sector with each other, not with the rest.
        self._compressed = _Uses()
        self._end = 0

    def run(self) -> None:
        """Walk the header, the L1 table and every L2 table."""
        header = self._header
        l1_end = header.l1_table_offset + header.l1_size * 8
        name_end = header.backing_file_offset + len(header.backing_name or b"")
        first_free = max(48, name_end)
        if header.l1_table_offset < first_free:
            self._result.corruption(
                f"the L1 table at {header.l1_table_offset:#x} overlaps the header or"
                " the backing file name"
            )
        # Header, name and L1 table are not aligned and may share a sector.
        self._end = max(first_free, l1_end)
        self._plain.mark(*_sectors(0, first_free))
        self._plain.mark(*_sectors(header.l1_table_offset, header.l1_size * 8))
        for start in range(0, header.l1_size, _BATCH):
            count = min(_BATCH, header.l1_size - start)
            words = self._words(header.l1_table_offset + start * 8, count)
            for index, word in enumerate(words, start):
                if word:
                    self._l2_table(index, word)
        self._result.image_end_offset = self._end

    def is_free(self, offset: int, length: int) -> bool:
        """Return whether nothing that was found lies in a region."""
        first, count = _sectors(offset, length)
        return not (
            self._plain.touches(first, count) or self._compressed.touches(first, count)
        )

    def _l2_table(self, index: int, host_offset: int) -> None:
        header = self._header
        what = f"L1 entry {index}: the L2 table at {host_offset:#x}"
        if not self._claim(what, host_offset, header.l2_bytes, whole=True):
            return
        words = self._words(host_offset, header.l2_entries)
        follows = 0
        for position, word in enumerate(words):
            if not word:
                continue
            what = f"L2 entry {position} of L1 entry {index}"
            self._result.allocated_clusters += 1
            if word & _COMPRESSED:
                self._result.compressed_clusters += 1
                self._result.fragmented_clusters += 1
                self._compressed_cluster(what, word)
                continue
            self._result.fragmented_clusters += int(follows not in (0, word))
            follows = word + header.cluster_size
            self._claim(
                f"{what}: the cluster at {word:#x}",
                word,
                header.cluster_size,
                whole=False,
            )

    def _claim(self, what: str, offset: int, length: int, *, whole: bool) -> bool:
        """Take a region; report what is wrong and return whether it can be read.

        A cluster may end past the end of the file, a table may not.
        """
        if offset & 511:
            self._result.corruption(f"{what} is not aligned to a sector")
            return False
        if offset >= self._size or (whole and offset + length > self._size):
            self._result.corruption(f"{what} lies past the end of the file")
            return False
        self._end = max(self._end, offset + length)
        first, count = _sectors(offset, length)
        taken = self._plain.touches(first, count)
        if taken or self._compressed.touches(first, count):
            self._result.corruption(f"{what} overlaps something else")
            return False
        self._plain.mark(first, count)
        return True

    def _compressed_cluster(self, what: str, word: int) -> None:
        header = self._header
        offset = word & (1 << 63 - header.cluster_bits) - 1
        length = word >> 63 - header.cluster_bits & header.cluster_size - 1
        if length == 0 or offset + length > self._size:
            self._result.corruption(
                f"{what}: {length} compressed bytes at {offset:#x} lie past the end of"
                " the file or are none"
            )
            return
        self._end = max(self._end, offset + length)
        first, count = _sectors(offset, length)
        self._compressed.mark(first, count)
        if self._plain.touches(first, count):
            self._result.corruption(
                f"{what}: the compressed data at {offset:#x} overlap something else"
            )

    def _words(self, offset: int, count: int) -> "array[int]":
        data = os.pread(self._fd, count * 8, offset)
        words = array("Q", data.ljust(count * 8, b"\0"))
        if sys.byteorder == "little":
            words.byteswap()
        return words


def _sectors(offset: int, length: int) -> tuple[int, int]:
    """Return the first sector that a region touches, and how many."""
    first = offset >> _SECTOR_BITS
    return first, (offset + length - 1 >> _SECTOR_BITS) - first + 1


def check_image(fd: int, filename: str) -> CheckResult:
    """Check an image without changing it.

    Args:
        fd: Open for reading.
        filename: For the result.

    Raises:
        ImageError: The header is unusable, or the file too large.
        OSError: The file can't be read.
    """
    header, size = _read_header(fd, filename)
    result = CheckResult(
        filename=filename,
        format="qcow",
        total_clusters=-(-header.disk_size // header.cluster_size),
    )
    _Check(fd, header, result, size).run()
    return result


def unnamed_clusters(fd: int, host_offsets: Collection[int]) -> set[int]:
    """Return which of these clusters no table of an image names, in part or as a whole.

    Args:
        fd: Open for reading.
        host_offsets: Where they begin.

    Raises:
        ImageError: The header is unusable, or the file too large.
        OSError: The file can't be read.
    """
    header, size = _read_header(fd, "")
    check = _Check(fd, header, CheckResult(filename="", format="qcow"), size)
    check.run()
    return {each for each in host_offsets if check.is_free(each, header.cluster_size)}


def _read_header(fd: int, filename: str) -> tuple[Header, int]:
    """Return the header, and the size of the file."""
    size = os.lseek(fd, 0, os.SEEK_END)
    start = os.pread(fd, 512, 0)
    needed = header_bytes_needed(start)
    if needed > len(start):
        start = os.pread(fd, needed, 0)
    header = parse_header(start, size)
    if size >> _SECTOR_BITS > _MAX_SECTORS:
        raise ImageError(f"{filename} has {size} bytes: too many to check")
    return header, size
