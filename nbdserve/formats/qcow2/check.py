"""Checking a qcow2 image: do refcounts, flags and pointers agree?

The judgement and the counts are those of `qemu-img check`. The walk is in
`walk`; here its counts are compared with the refcounts on disk, and the COPIED
flags with those. Blocking reads, for the command line or another process.
"""

import os
from collections import Counter
from collections.abc import Collection

from nbdserve.formats.check_result import CheckResult
from nbdserve.formats.qcow2.cluster_counts import SEGMENT, SEGMENT_BITS
from nbdserve.formats.qcow2.header import (
    Header,
    header_bytes_needed,
    parse_header,
)
from nbdserve.formats.qcow2.walk import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    ImageFile,
    Walk,
    require_countable,
    runs,
)


def read_header(fd: int) -> Header:
    """Read and judge the header of an open image file.

    Raises:
        ImageError: As `parse_header`.
        OSError: The file can't be read.
    """
    file = ImageFile(fd)
    start = os.pread(fd, 512, 0)
    needed = header_bytes_needed(start)
    if needed > len(start):
        start = file.read(0, min(needed, file.size))
    return parse_header(start, file.size)


def check_image(fd: int, filename: str) -> CheckResult:
    """Check an image without changing it.

    Args:
        fd: Open for reading.
        filename: For the result.

    Raises:
        ImageError: The header is unusable, or there is too much to count.
        OSError: The file can't be read.
    """
    header = read_header(fd)
    file = ImageFile(fd)
    require_countable(header, file.size)
    result = CheckResult(filename=filename, format="qcow2")
    walk = Walk(file, header, result)
    walk.run()
    compare_refcounts(walk)
    _check_copied(walk)
    return result


def unnamed_clusters(fd: int, host_offsets: Collection[int]) -> set[int]:
    """Return which of these clusters no table, snapshot or bitmap of an image names.

    Args:
        fd: Open for reading.
        host_offsets: Where they begin.

    Raises:
        ImageError: The header is unusable, or there is too much to count.
        OSError: The file can't be read.
    """
    header = read_header(fd)
    file = ImageFile(fd)
    require_countable(header, file.size)
    walk = Walk(file, header, CheckResult(filename="", format="qcow2"))
    walk.run()
    bits = header.cluster_bits
    return {offset for offset in host_offsets if not walk.used[offset >> bits]}


def compare_refcounts(walk: Walk) -> None:
    """Compare the refcounts on disk with the uses found."""
    header = walk.header
    clusters = max(
        -(-walk.file.size // header.cluster_size),
        walk.used.last() + 1,
    )
    numbers = sorted({*walk.used.segments(), *walk.stored.segments()})
    for number in numbers:
        base = number << SEGMENT_BITS
        used, stored = walk.used.segment(number), walk.stored.segment(number)
        if used == stored and 255 not in used:
            continue
        for index in range(min(SEGMENT, clusters - base)):
            if used[index] != stored[index] or used[index] == 255:
                _compare_cluster(walk, base + index)
    last = walk.used.last()
    stored_last = walk.stored.last()
    if stored_last >= clusters:
        stored_last = _last_below(walk, clusters)
    walk.result.image_end_offset = (max(last, stored_last) + 1) * header.cluster_size


def _last_below(walk: Walk, clusters: int) -> int:
    """Return the last cluster below `clusters` whose stored refcount isn't 0."""
    for number in reversed(walk.stored.segments()):
        base = number << SEGMENT_BITS
        counts = walk.stored.segment(number)[: max(0, clusters - base)].rstrip(b"\0")
        if counts:
            return base + len(counts) - 1
    return -1


def _compare_cluster(walk: Walk, cluster: int) -> None:
    header = walk.header
    used, stored = walk.used[cluster], walk.stored[cluster]
    if used == stored:
        return
    if not walk.is_readable(cluster):
        walk.result.check_error(
            f"cluster {cluster}: its refcount can't be read, its block is misplaced"
        )
        return
    text = (
        f"cluster {cluster} at {cluster << header.cluster_bits:#x}:"
        f" refcount={stored} reference={used}"
    )
    if stored < used:
        walk.result.corruption(text)
        walk.rebuild_needed |= stored == 0
    else:
        walk.result.leak(text)


def _check_copied(walk: Walk) -> None:
    """COPIED must be set exactly where the refcount is 1, in the active tables."""
    header = walk.header
    if not header.l1_size:
        return
    tables: Counter[int] = Counter()
    l1 = walk.file.words(header.l1_table_offset, header.l1_size)
    for index, word in enumerate(l1):
        table = word & OFFSET_MASK
        if not table:
            continue
        if table < walk.file.size:
            tables[table] += 1
        cluster = table >> header.cluster_bits
        refcount = walk.stored[cluster]
        if walk.is_readable(cluster) and (refcount == 1) != bool(word & COPIED):
            walk.result.corruption(
                f"OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={word:#x}"
                f" refcount={refcount}"
            )
    for table, times in tables.items():
        _check_copied_in(walk, table, times)


def _check_copied_in(walk: Walk, table: int, times: int) -> None:
    header = walk.header
    words, _ = walk.l2_words(table)
    for index, first, length in runs(words, header.cluster_size):
        if first & COMPRESSED or header.external_data or not first & OFFSET_MASK:
            continue
        cluster = (first & OFFSET_MASK) >> header.cluster_bits
        copied = bool(first & COPIED)
        if copied and walk.stored.is_ones(cluster, length):
            continue
        for position in range(length):
            refcount = walk.stored[cluster + position]
            if walk.is_readable(cluster + position) and (refcount == 1) != copied:
                word = first + position * header.cluster_size
                at = table + (index + position) * header.l2_entry_size
                walk.result.corruption(
                    f"OFLAG_COPIED data cluster: l2_entry={word:#x} at {at:#x}"
                    f" refcount={refcount}",
                    times,
                )
