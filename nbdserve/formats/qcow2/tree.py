"""Everything that an L1 table leads to: the clusters of one disk, active or of a snapshot.

A cluster counts once for each way that leads to it, as docs/interop/qcow2.rst of
qemu counts references. Entries that can't be followed are refused before
anything is changed: what can't be counted must not be given back.
"""

import asyncio
import sys
from array import array
from collections.abc import Iterator

from nbdserve.errors import ImageCorruptError
from nbdserve.formats.mapped.entries import BAD
from nbdserve.formats.mapped.parts import Parts
from nbdserve.formats.mapped.pool import Pool
from nbdserve.formats.mapped.tables import decode_entries, decode_words
from nbdserve.formats.qcow2.cluster_counts import ClusterCounts
from nbdserve.formats.qcow2.entries import COMPRESSED_FLAG, OFFSET_MASK
from nbdserve.formats.qcow2.walk import runs
from nbdserve.storage.base import Storage

#: All bits of an entry's first byte but COPIED.
_NOT_COPIED = bytes(byte & 0x7F for byte in range(256))


async def read_words(storage: Storage, host_offset: int, count: int) -> "array[int]":
    """Read `count` 64-bit words of a table."""
    return decode_words(await _read(storage, host_offset, 8 * count))


async def read_entries(
    parts: Parts, host_offset: int
) -> "tuple[array[int], array[int] | None]":
    """Read an L2 table: its words, and the bitmaps of extended entries."""
    geometry = parts.geometry
    data = await _read(parts.storage, host_offset, geometry.l2_bytes)
    return decode_entries(data, extended=geometry.extended)


async def _read(storage: Storage, host_offset: int, length: int) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    if not storage.try_read(host_offset, view):
        await storage.read(host_offset, view)
    return data


def without_copied(words: "array[int]") -> "array[int]":
    """Return entries with COPIED cleared in all of them."""
    data = bytearray(words.tobytes())
    top = 7 if sys.byteorder == "little" else 0
    data[top::8] = data[top::8].translate(_NOT_COPIED)
    return array("Q", bytes(data))


def difference(old: "array[int]", new: "array[int]") -> tuple[int, int] | None:
    """Return the first and the last index in which two tables differ, if they do."""
    if old == new:
        return None
    first = next(i for i in range(len(old)) if old[i] != new[i])
    last = next(i for i in range(len(old) - 1, -1, -1) if old[i] != new[i])
    return first, last


def data_runs(words: "array[int]", step: int) -> Iterator[tuple[int, int, int]]:
    """Find runs of entries that name neighbouring plain clusters.

    Args:
        words: L2 entries.
        step: Bytes of a cluster.

    Yields:
        (index, host offset, clusters); compressed entries are left out.
    """
    for index, first, count in runs(words, step):
        if first & COMPRESSED_FLAG or not first & OFFSET_MASK:
            continue
        yield index, first & OFFSET_MASK, count


class Tree:
    """Reads trees of tables of one image."""

    def __init__(self, parts: Parts, pool: Pool) -> None:
        """`pool` knows which clusters are metadata, and can't be data of anybody."""
        self._parts = parts
        self._pool = pool

    async def count(self, l1: "array[int]") -> ClusterCounts:
        """Count the ways from an L1 table to each cluster.

        Raises:
            ImageCorruptError: An entry names no place for a table or data.
        """
        geometry = self._parts.geometry
        counts = ClusterCounts()
        for number, word in enumerate(l1):
            if not word:
                continue
            host_offset = self._table_offset(number, word)
            counts.add(host_offset >> geometry.cluster_bits, 1)
            words, _ = await read_entries(self._parts, host_offset)
            self.count_entries(counts, words)
            await asyncio.sleep(0)
        return counts

    def _table_offset(self, number: int, word: int) -> int:
        host_offset = word & OFFSET_MASK
        bits = self._parts.geometry.cluster_bits
        if (
            not self._parts.codec.l1_is_valid(word)
            or not host_offset
            or host_offset >= self._parts.storage.size
            or host_offset >> bits in self._pool.metadata
        ):
            raise ImageCorruptError(
                f"{self._parts.storage.name}: L1 entry {number} ({word:#018x}) is not"
                " the place of an L2 table; run 'nbdserve image check' on it"
            )
        return host_offset

    def count_entries(self, counts: ClusterCounts, words: "array[int]") -> None:
        """Add what L2 entries name; raises as `count`.

        Bitmaps of subclusters don't matter to that.
        """
        geometry, codec = self._parts.geometry, self._parts.codec
        size, bits = geometry.cluster_size, geometry.cluster_bits
        for index, first, length in runs(words, size):
            compressed = first & COMPRESSED_FLAG
            last = first + (length - 1) * size
            for word in (first, last):
                if codec.classify(word) == BAD:
                    raise ImageCorruptError(
                        f"{self._parts.storage.name}: the L2 entry {word:#018x} near"
                        f" index {index} is not valid; run 'nbdserve image check' on it"
                    )
            if compressed:
                for word in range(first, last + 1, size):
                    host_offset, extent = codec.compressed_extent(word)
                    self._count(counts, host_offset, extent)
            elif first & OFFSET_MASK and not self._parts.external:
                self._count(counts, first & OFFSET_MASK, length << bits)

    def _count(self, counts: ClusterCounts, host_offset: int, length: int) -> None:
        self._pool.require_data(host_offset, length)
        bits = self._parts.geometry.cluster_bits
        start = host_offset >> bits
        counts.add(start, (host_offset + length - 1 >> bits) + 1 - start)

    def numbers(self) -> list[int]:
        """Return the L1 indexes of the active disk that lead to a table."""
        return [i for i, word in enumerate(self._parts.tables.l1.words) if word]
