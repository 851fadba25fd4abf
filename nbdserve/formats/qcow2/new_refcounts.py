"""A refcount table and its blocks, written anew behind everything else.

For a table that is broken or too small, and for another width of refcounts. The old
ones are left alone until the header names the new ones, which don't count the old ones any more:

    blocks and table at the end of the file -> barrier -> one write of sector 0 -> barrier

So a power cut leaves the old counts or the new ones. Blocking calls.
"""

import errno
import os
import struct

from nbdserve.errors import ImageError
from nbdserve.formats.qcow2.cluster_counts import ClusterCounts, encode_block
from nbdserve.formats.qcow2.header import (
    MAX_REFCOUNT_TABLE_BYTES,
    REFCOUNT_TABLE_GROUP_OFFSET,
    Header,
    encode_refcount_table_group,
)

REFCOUNT_ORDER_OFFSET = 96


def write_all(fd: int, data: bytes, offset: int) -> None:
    """Write all of `data`.

    Raises:
        OSError: It can't be written.
    """
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        if written == 0:
            raise OSError(errno.EIO, "a write made no progress")
        view = view[written:]
        offset += written


def require_width(used: ClusterCounts, header: Header, name: str) -> None:
    """Refuse counts that the header's refcount width can't hold.

    Raises:
        ImageError: Names the width.
    """
    limit = (1 << header.refcount_bits) - 1
    most = used.highest_count()
    if most > limit:
        raise ImageError(
            f"{name}: a cluster is used {most} times, refcounts of"
            f" {header.refcount_bits} bits end at {limit}"
        )


def write_new_refcounts(
    fd: int, name: str, header: Header, used: ClusterCounts
) -> None:
    """Let the image have a new refcount table with these counts.

    Args:
        fd: Open for reading and writing; nobody else may write meanwhile.
        name: The image, for messages.
        header: Of the image, with the refcount width that is wanted.
        used: How often each cluster is used, but for refcount table and blocks; the new ones
            are added.

    Raises:
        ImageError: There is too much to count.
        OSError: The file can't be written.
    """
    require_width(used, header, name)
    file_end = os.lseek(fd, 0, os.SEEK_END)
    start = max(-(-file_end >> header.cluster_bits), used.last() + 1)
    table_clusters, indexes = _plan(header, used, start)
    if table_clusters * header.cluster_size > MAX_REFCOUNT_TABLE_BYTES:
        raise ImageError(
            f"{name}: its refcount table would have {table_clusters} clusters: at most"
            f" {MAX_REFCOUNT_TABLE_BYTES >> header.cluster_bits}"
        )
    used.add(start, table_clusters + len(indexes))
    table = bytearray(table_clusters * header.cluster_size)
    per_block = header.refcount_block_entries
    for number, index in enumerate(indexes):
        host_offset = start + table_clusters + number << header.cluster_bits
        struct.pack_into(">Q", table, index * 8, host_offset)
        counts: bytes | list[int] = used.slice(index * per_block, per_block)
        if 255 in counts:
            counts = used.counts(index * per_block, per_block)
        write_all(fd, encode_block(counts, header.refcount_order), host_offset)
    write_all(fd, bytes(table), start << header.cluster_bits)
    os.fsync(fd)
    _switch(fd, header, start << header.cluster_bits, table_clusters)


def _switch(fd: int, header: Header, host_offset: int, clusters: int) -> None:
    """Point the header at the table, and give it the width, in one write of sector 0."""
    group = encode_refcount_table_group(host_offset, clusters)
    if header.version > 2:
        first = REFCOUNT_TABLE_GROUP_OFFSET + len(group)
        between = os.pread(fd, REFCOUNT_ORDER_OFFSET - first, first)
        group += between + struct.pack(">I", header.refcount_order)
    write_all(fd, group, REFCOUNT_TABLE_GROUP_OFFSET)
    os.fsync(fd)


def _plan(header: Header, used: ClusterCounts, start: int) -> tuple[int, list[int]]:
    """Return the clusters of the table, and the index of each block, in order.

    Table and blocks come to lie from cluster `start` on, and count themselves.
    """
    per_block = header.refcount_block_entries
    indexes: set[int] = set()
    for first, length in used.used_ranges():
        indexes.update(range(first // per_block, (first + length - 1) // per_block + 1))
    clusters = 1
    while True:
        end = start + clusters + len(indexes)
        more = set(range(start // per_block, (end - 1) // per_block + 1)) - indexes
        needed = -(-(max(indexes | more) + 1) * 8 >> header.cluster_bits)
        if not more and needed <= clusters:
            return clusters, sorted(indexes)
        indexes |= more
        clusters = max(clusters, needed)
