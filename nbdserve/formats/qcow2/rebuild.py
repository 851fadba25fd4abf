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

import errno
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbdserve.errors import ImageCorruptError
from nbdserve.formats.check_result import CheckResult
from nbdserve.formats.qcow2.check import compare_refcounts, read_header
from nbdserve.formats.qcow2.cluster_counts import encode_block
from nbdserve.formats.qcow2.header import (
    INCOMPATIBLE_DIRTY,
    INCOMPATIBLE_OFFSET,
    encode_u64,
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
    new_blocks = _plan_new_blocks(walk)
    _require_width(walk)
    _write_blocks(walk, new_blocks)
    os.fsync(fd)
    if new_blocks:
        _write_table_words(walk, new_blocks)
        os.fsync(fd)
    flags_fixed = _fix_copied(walk)
    if flags_fixed:
        os.fsync(fd)
    if header.dirty:
        features = header.incompatible_features & ~INCOMPATIBLE_DIRTY
        _write_all(fd, encode_u64(features), INCOMPATIBLE_OFFSET)
        os.fsync(fd)
    return RebuildResult(result.corruptions, result.leaks, flags_fixed)


def _used_blocks(walk: Walk) -> set[int]:
    """Return the indexes of all refcount blocks that have something to count."""
    per_block = walk.header.refcount_block_entries
    blocks: set[int] = set()
    for first, length in walk.used.used_ranges():
        blocks.update(range(first // per_block, (first + length - 1) // per_block + 1))
    return blocks


def _plan_new_blocks(walk: Walk) -> dict[int, int]:
    """Choose a cluster at the end of the file for each missing refcount block.

    Returns:
        Index in the refcount table -> cluster number. These are counted as used,
        which may call for further blocks.
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
            raise ImageCorruptError(
                f"{walk.result.filename} is dirty and its refcount table is too small"
                " for it: repair it with qemu-img check -r all"
            )
        for index in missing:
            planned[index] = end
            walk.used.add(end, 1)
            end += 1


def _require_width(walk: Walk) -> None:
    limit = (1 << walk.header.refcount_bits) - 1
    most = walk.used.highest_count()
    if most > limit:
        raise ImageCorruptError(
            f"{walk.result.filename}: a cluster is used {most} times, refcounts of"
            f" {walk.header.refcount_bits} bits end at {limit}"
        )


def _write_blocks(walk: Walk, new_blocks: dict[int, int]) -> None:
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
        counts: bytes | list[int] = walk.used.slice(first, per_block)
        if 255 in counts:
            counts = walk.used.counts(first, per_block)
        block = encode_block(counts, header.refcount_order)
        if index in new_blocks or walk.file.read(host_offset, len(block)) != block:
            _write_all(walk.file.fd, block, host_offset)


def _write_table_words(walk: Walk, new_blocks: dict[int, int]) -> None:
    header = walk.header
    for index, cluster in new_blocks.items():
        _write_all(
            walk.file.fd,
            encode_u64(cluster << header.cluster_bits),
            header.refcount_table_offset + index * 8,
        )


def _fix_copied(walk: Walk) -> int:
    """Set COPIED where a cluster is used once, clear it elsewhere; return how many."""
    header = walk.header
    l1 = walk.file.words(header.l1_table_offset, header.l1_size)
    fixed = _fix_table(walk, header.l1_table_offset, l1, 1)
    step = header.l2_entry_size // 8
    for table in sorted({word & OFFSET_MASK for word in l1} - {0}):
        words = walk.file.words(table, header.cluster_size // 8)
        if not header.external_data:
            fixed += _fix_table(walk, table, words, step)
    return fixed


def _fix_table(walk: Walk, host_offset: int, words: "array[int]", step: int) -> int:
    bits = walk.header.cluster_bits
    fixed = 0
    for index in range(0, len(words), step):
        word = words[index]
        if not word & OFFSET_MASK or word & COMPRESSED:
            continue
        single = walk.used[(word & OFFSET_MASK) >> bits] == 1
        if single != bool(word & COPIED):
            words[index] = word ^ COPIED
            fixed += 1
    if fixed:
        if sys.byteorder == "little":
            words.byteswap()
        _write_all(walk.file.fd, words.tobytes(), host_offset)
    return fixed


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        if written == 0:
            raise OSError(errno.EIO, "a write made no progress")
        view = view[written:]
        offset += written
