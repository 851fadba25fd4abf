"""Rebuilding the refcounts of an image whose dirty bit is set.

With lazy refcounts a writer may leave refcounts behind as long as the dirty bit
says so (docs/interop/qcow2.rst of qemu, incompatible feature bit 0). Before
the first write they are recomputed from what the tables name. The dirty bit goes
last, so that a crash on the way only means doing it again:

    refcount blocks, new ones included -> barrier -> words of the refcount table
    -> barrier -> COPIED flags -> barrier -> dirty bit -> barrier

Blocking calls; the walk takes long on large images, so keep it away from an
event loop.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbdserve.errors import ImageCorruptError
from nbdserve.formats.check_result import CheckResult
from nbdserve.formats.mapped.tables import encode_words
from nbdserve.formats.qcow2.check import compare_refcounts, read_header
from nbdserve.formats.qcow2.cluster_counts import ClusterCounts, encode_block
from nbdserve.formats.qcow2.header import (
    INCOMPATIBLE_DIRTY,
    INCOMPATIBLE_OFFSET,
    Header,
    encode_u64,
)
from nbdserve.formats.qcow2.new_refcounts import (
    require_width,
    write_all,
    write_new_refcounts,
)
from nbdserve.formats.qcow2.walk import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    REFCOUNT_TABLE_RESERVED_MASK,
    ImageFile,
    Walk,
    require_countable,
)

if TYPE_CHECKING:
    from array import array


@dataclass(frozen=True, slots=True)
class RebuildResult:
    """What a rebuild found and set right.

    Attributes:
        refcounts_raised: Clusters whose stored refcount was too low.
        leaks_reclaimed: Clusters whose stored refcount was too high.
        flags_fixed: L1 and L2 entries whose COPIED flag was wrong.
    """

    refcounts_raised: int
    leaks_reclaimed: int
    flags_fixed: int


def rebuild_refcounts(fd: int, name: str) -> RebuildResult:
    """Recompute all refcounts and COPIED flags and clear the dirty bit.

    Args:
        fd: Open for reading and writing; nobody else may write meanwhile.
        name: The image, for messages.

    Raises:
        ImageError: The tables contradict themselves, so that there is nothing to
            go by; the file is left as it was.
        OSError: The file can't be read or written; the dirty bit is still set.
    """
    header = read_header(fd)
    file = ImageFile(fd)
    require_countable(header, file.size)
    result = CheckResult(filename=name, format="qcow2")
    walk = Walk(file, header, result)
    walk.run()
    if result.corruptions:
        raise ImageCorruptError(
            f"{name} is dirty and can't be repaired, {result.corruptions} of its"
            f" pointers are wrong, first: {result.messages[0]}"
        )
    compare_refcounts(walk)
    require_width(walk.used, header, name)
    new_blocks = plan_new_blocks(walk)
    if new_blocks is None:
        return _start_anew(walk)
    write_blocks(walk, new_blocks)
    os.fsync(fd)
    if new_blocks:
        write_table_words(walk, new_blocks)
        os.fsync(fd)
    flags_fixed = fix_copied(walk)
    if flags_fixed:
        os.fsync(fd)
    clear_incompatible(fd, header, INCOMPATIBLE_DIRTY)
    return RebuildResult(result.corruptions, result.leaks, flags_fixed)


def _used_blocks(walk: Walk) -> set[int]:
    """Return the indexes of all refcount blocks that have something to count."""
    per_block = walk.header.refcount_block_entries
    blocks: set[int] = set()
    for first, length in walk.used.used_ranges():
        blocks.update(range(first // per_block, (first + length - 1) // per_block + 1))
    return blocks


def _start_anew(walk: Walk) -> RebuildResult:
    """Write a larger refcount table, with all blocks, where the old one is too small."""
    fd, name = walk.file.fd, walk.result.filename
    counts = Walk(walk.file, walk.header, CheckResult(filename=name, format="qcow2"))
    counts.run_without_refcounts()
    write_new_refcounts(fd, name, walk.header, counts.used)
    flags_fixed = fix_copied(counts)
    os.fsync(fd)
    clear_incompatible(fd, walk.header, INCOMPATIBLE_DIRTY)
    return RebuildResult(walk.result.corruptions, walk.result.leaks, flags_fixed)


def clear_incompatible(fd: int, header: Header, bits: int) -> None:
    """Clear bits of incompatible features, durably, if any of them is set."""
    if header.incompatible_features & bits:
        features = header.incompatible_features & ~bits
        write_all(fd, encode_u64(features), INCOMPATIBLE_OFFSET)
        os.fsync(fd)


def plan_new_blocks(walk: Walk) -> dict[int, int] | None:
    """Choose a cluster at the end of the file for each missing refcount block.

    Returns:
        Index in the refcount table -> cluster number. These are counted as used,
        which may call for further blocks. None if the table is too small for them.
    """
    table_clusters = walk.header.refcount_table_entries
    end = max(
        -(-walk.file.size // walk.header.cluster_size),
        walk.used.last() + 1,
    )
    planned: dict[int, int] = {}
    while True:
        missing = [
            index
            for index in sorted(_used_blocks(walk) - planned.keys())
            if index >= table_clusters or not walk.refcount_table[index]
        ]
        if not missing:
            return planned
        if missing[-1] >= table_clusters:
            return None
        for index in missing:
            planned[index] = end
            walk.used.add(end, 1)
            end += 1


def write_blocks(
    walk: Walk, new_blocks: dict[int, int], wanted: ClusterCounts | None = None
) -> None:
    """Write those refcount blocks that differ from what was counted, or from `wanted`."""
    counted = walk.used if wanted is None else wanted
    header = walk.header
    per_block = header.refcount_block_entries
    for index, word in enumerate(walk.refcount_table):
        if word:
            host_offset = word & ~REFCOUNT_TABLE_RESERVED_MASK
        elif index in new_blocks:
            host_offset = new_blocks[index] << header.cluster_bits
        else:
            continue
        first = index * per_block
        counts: bytes | list[int] = counted.slice(first, per_block)
        if 255 in counts:
            counts = counted.counts(first, per_block)
        block = encode_block(counts, header.refcount_order)
        if index in new_blocks or walk.file.read(host_offset, len(block)) != block:
            write_all(walk.file.fd, block, host_offset)


def write_table_words(walk: Walk, new_blocks: dict[int, int]) -> None:
    """Enter new blocks, which are durable, into the refcount table."""
    header = walk.header
    for index, cluster in new_blocks.items():
        write_all(
            walk.file.fd,
            encode_u64(cluster << header.cluster_bits),
            header.refcount_table_offset + index * 8,
        )


def fix_copied(walk: Walk, counts: ClusterCounts | None = None) -> int:
    """Set COPIED where a refcount is 1, clear it elsewhere.

    Args:
        walk: Knows the tables.
        counts: The refcounts, if they are others than those counted.

    Returns:
        How many entries are others now.
    """
    header = walk.header
    counts = walk.used if counts is None else counts
    l1 = walk.file.words(header.l1_table_offset, header.l1_size)
    fixed = _fix_table(walk, header.l1_table_offset, l1, 1, counts)
    step = header.l2_entry_size // 8
    for table in sorted({word & OFFSET_MASK for word in l1} - {0}):
        if not is_table(walk, table):
            continue
        words = walk.file.words(table, header.cluster_size // 8)
        if not header.external_data:
            fixed += _fix_table(walk, table, words, step, counts)
    return fixed


def is_table(walk: Walk, host_offset: int) -> bool:
    """Return whether a pointer leads to an L2 table that is nothing else as well."""
    header = walk.header
    if host_offset % header.cluster_size or host_offset >= walk.file.size:
        return False
    use = walk.tables.get(host_offset)
    cluster = host_offset >> header.cluster_bits
    return use is not None and walk.used[cluster] == use.total


def _fix_table(
    walk: Walk,
    host_offset: int,
    words: "array[int]",
    step: int,
    counts: ClusterCounts,
) -> int:
    bits = walk.header.cluster_bits
    fixed = 0
    for index in range(0, len(words), step):
        word = words[index]
        if not word & OFFSET_MASK or word & COMPRESSED:
            continue
        single = counts[(word & OFFSET_MASK) >> bits] == 1
        if single != bool(word & COPIED):
            words[index] = word ^ COPIED
            fixed += 1
    if fixed:
        # the caller goes on with the words
        write_all(walk.file.fd, encode_words(words), host_offset)
    return fixed
