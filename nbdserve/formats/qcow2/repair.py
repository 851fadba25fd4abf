"""Repairing a qcow2 image: entries, refcounts, COPIED flags, in this order.

Reading must never get worse by it: an entry that can't be followed costs its bytes
only if whoever asks agrees, and while there is such an entry nothing is given back that
it may have led to.

    entries -> barrier -> refcounts (in place, or anew at the end of the file) -> barrier
    -> COPIED -> barrier -> corrupt and dirty bits -> barrier

Blocking calls; the image must not be in use.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from nbdserve.formats.check_result import CheckResult
from nbdserve.formats.mapped import subclusters
from nbdserve.formats.qcow2.check import (
    check_image,
    compare_refcounts,
    read_header,
)
from nbdserve.formats.qcow2.cluster_counts import SEGMENT, SEGMENT_BITS, ClusterCounts
from nbdserve.formats.qcow2.header import (
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
    encode_u64,
)
from nbdserve.formats.qcow2.new_refcounts import (
    require_width,
    write_all,
    write_new_refcounts,
)
from nbdserve.formats.qcow2.rebuild import (
    clear_incompatible,
    fix_copied,
    is_table,
    write_blocks,
)
from nbdserve.formats.qcow2.walk import (
    COMPRESSED,
    COPIED,
    L1_RESERVED_MASK,
    L2_RESERVED_MASK,
    OFFSET_MASK,
    ZERO,
    ImageFile,
    Walk,
    require_countable,
)

_MANY = 255

#: Told what a repair would lose, a line each; returns whether to do it all the same.
Agree = Callable[[list[str]], bool]


@dataclass(frozen=True, slots=True)
class Repair:
    """What a repair did.

    Attributes:
        before: What was found at first.
        after: What is left.
        declined: Whether nothing was done, because something would have been lost.
    """

    before: CheckResult
    after: CheckResult
    declined: bool = False

    @property
    def leaks_fixed(self) -> int:
        """Clusters given back."""
        return max(self.before.leaks - self.after.leaks, 0)

    @property
    def corruptions_fixed(self) -> int:
        """Contradictions that are gone."""
        return max(self.before.corruptions - self.after.corruptions, 0)


@dataclass(frozen=True, slots=True)
class _Fix:
    """Another value for a word of a table; `loses` says what that costs, if anything."""

    host_offset: int
    words: tuple[int, ...]
    loses: str | None


def repair_image(fd: int, name: str, *, everything: bool, agree: Agree) -> Repair:
    """Repair an image.

    Args:
        fd: Open for reading and writing; nobody else may use the image.
        name: The image, for messages.
        everything: Whether corruptions are repaired too, or leaks only.
        agree: Asked before anything that can be read, or might be rescued, is lost.

    Raises:
        ImageError: The header is unusable, or there is too much to count.
        OSError: The file can't be read or written.
    """
    before = check_image(fd, name)
    fixes = list(_Entries(_walk(fd, name)).fixes()) if everything else []
    losses = [fix.loses for fix in fixes if fix.loses is not None]
    if losses and not agree(losses):
        return Repair(before, before, declined=True)
    for fix in fixes:
        data = b"".join(map(encode_u64, fix.words))
        write_all(fd, data, fix.host_offset)
    if fixes:
        os.fsync(fd)
    walk = _walk(fd, name)
    sound = not walk.rebuild_needed
    compare_refcounts(walk)
    wanted, declined = walk.used, False
    if walk.pointer_corruptions and walk.result.leaks:
        loss = (
            f"{walk.result.leaks} clusters that nothing seems to use, while"
            f" {walk.pointer_corruptions} pointers can't be followed: what those led to"
            " may lie there"
        )
        declined = not agree([loss])
        if declined:
            wanted = _combined(walk.used, walk.stored, max)
    if everything:
        _fix_counts(walk, wanted, sound=sound)
        if fix_copied(walk, wanted):
            os.fsync(fd)
    elif sound and not declined:
        if walk.result.leaks:
            write_blocks(walk, {}, _combined(walk.used, walk.stored, min))
            os.fsync(fd)
        # as qemu-img: flags too, where the refcounts are right
        if not walk.result.corruptions and fix_copied(walk):
            os.fsync(fd)
    after = check_image(fd, name)
    if not after.corruptions and not after.check_errors:
        clear_incompatible(
            fd, read_header(fd), INCOMPATIBLE_CORRUPT | INCOMPATIBLE_DIRTY
        )
    return Repair(before, after, declined=declined)


def _walk(fd: int, name: str) -> Walk:
    header = read_header(fd)
    file = ImageFile(fd)
    require_countable(header, file.size)
    walk = Walk(file, header, CheckResult(filename=name, format="qcow2"))
    walk.run()
    return walk


def _fix_counts(walk: Walk, wanted: ClusterCounts, *, sound: bool) -> None:
    """Let the stored refcounts be what is wanted, in place if table and blocks are sound."""
    header, fd = walk.header, walk.file.fd
    per_block = header.refcount_block_entries
    missing = any(
        index >= len(walk.refcount_table) or not walk.refcount_table[index]
        for first, length in wanted.used_ranges()
        for index in range(first // per_block, (first + length - 1) // per_block + 1)
    )
    if sound and not missing:
        require_width(wanted, header, walk.result.filename)
        write_blocks(walk, {}, wanted)
        os.fsync(fd)
        return
    if wanted is walk.used:
        # without the old table and blocks, which are free then
        anew = Walk(walk.file, header, CheckResult(filename="", format="qcow2"))
        anew.run_without_refcounts()
        wanted = anew.used
    write_new_refcounts(fd, walk.result.filename, header, wanted)


def _combined(
    used: ClusterCounts, stored: ClusterCounts, choose: Callable[[int, int], int]
) -> ClusterCounts:
    """Return the smaller or the larger of two counts of each cluster."""
    result = ClusterCounts()
    for number in sorted({*used.segments(), *stored.segments()}):
        base = number << SEGMENT_BITS
        ours, theirs = used.segment(number), stored.segment(number)
        if _MANY not in ours and _MANY not in theirs:
            result.load(base, bytes(map(choose, ours, theirs)), {})
            continue
        for cluster in range(base, base + SEGMENT):
            count = choose(used[cluster], stored[cluster])
            if count:
                result.add(cluster, 1, count)
    return result


@dataclass(slots=True)
class _Entries:
    """Finds entries of L1 and L2 tables that have to be others."""

    walk: Walk
    _seen: set[int] = field(default_factory=set)

    def fixes(self) -> Iterator[_Fix]:
        """Yield what is to be written, each word once."""
        header = self.walk.header
        yield from self._l1(header.l1_table_offset, header.l1_size, "")
        for snapshot in self.walk.snapshots:
            host_offset, entries = snapshot.l1_table_offset, snapshot.l1_size
            end = host_offset + 8 * entries
            if host_offset % header.cluster_size or end > self.walk.file.size:
                continue
            if host_offset in self._seen:
                continue
            self._seen.add(host_offset)
            name = snapshot.name.decode("utf-8", "backslashreplace")
            yield from self._l1(host_offset, entries, f" of snapshot {name!r}")

    def _l1(self, host_offset: int, entries: int, whose: str) -> Iterator[_Fix]:
        header = self.walk.header
        covered = header.cluster_size * header.l2_entries
        for index, word in enumerate(self.walk.file.words(host_offset, entries)):
            if not word:
                continue
            at = host_offset + 8 * index
            table = word & OFFSET_MASK
            guest = index * covered
            if not table or table % header.cluster_size or self._is_past(table):
                span = f"bytes {guest} to {guest + covered - 1}{whose}"
                yield _Fix(at, (0,), f"all that was mapped in {span}: L1 entry {index}")
                continue
            if word & L1_RESERVED_MASK:
                yield _Fix(at, (word & ~L1_RESERVED_MASK,), None)
            if table not in self._seen and is_table(self.walk, table):
                self._seen.add(table)
                yield from self._l2(table, guest, whose)

    def _l2(self, host_offset: int, guest: int, whose: str) -> Iterator[_Fix]:
        header = self.walk.header
        words, bitmaps = self.walk.l2_words(host_offset)
        for index, word in enumerate(words):
            bitmap = bitmaps[index] if bitmaps is not None else 0
            if not word and not bitmap:
                continue
            at = host_offset + index * header.l2_entry_size
            start = guest + index * header.cluster_size
            problem, better = self._judge(word, start)
            fixed = self._nothing() if problem else (better,)
            if bitmap and not problem:
                problem, better_bitmap = self._judge_bitmap(better, bitmap)
                fixed = better, better_bitmap
            if problem:
                span = f"bytes {start} to {start + header.cluster_size - 1}{whose}"
                yield _Fix(at, fixed, f"{span}: {problem}")
            elif fixed not in ((word,), (word, bitmap)):
                yield _Fix(at, fixed, None)

    def _is_place(self, word: int) -> bool:
        """Return whether an entry names a host cluster; the first one of a data file has no offset."""
        if word & OFFSET_MASK:
            return True
        return bool(
            self.walk.header.external_data and word & COPIED and not word & ZERO
        )

    def _judge_bitmap(self, word: int, bitmap: int) -> tuple[str, int]:
        """Return what is wrong with a bitmap beyond repair, and its better value."""
        if word & COMPRESSED:
            # it belongs to no subcluster, and all data are there
            return "", 0
        there = subclusters.allocated(bitmap)
        if there and not self._is_place(word):
            lost = subclusters.zero(bitmap) | there
            return "some of its subclusters have no place", lost << subclusters.COUNT
        # What is zero and allocated at once: its bytes are there, so they are kept.
        return "", subclusters.with_allocated(bitmap, there)

    def _nothing(self) -> tuple[int, ...]:
        """Return the words of a cluster that reads as zeros, if they can say that."""
        if self.walk.header.extended_l2:
            return 0, subclusters.ALL_ZERO
        return (ZERO if self.walk.header.version > 2 else 0,)

    def _judge(self, word: int, guest: int) -> tuple[str, int]:
        """Return what is wrong with an L2 entry beyond repair, and its better value.

        `guest` is its guest offset, which an external data file has as the place.
        """
        if word & COMPRESSED:
            return self._judge_compressed(word)
        header = self.walk.header
        if word & ZERO and header.version == 2:
            return "marked as zeros, which version 2 does not know", 0
        data = word & OFFSET_MASK
        problem = ""
        if data % header.cluster_size:
            problem = f"its place {data:#x} is not aligned to a cluster"
        elif not header.external_data and self._is_past(data):
            problem = f"its place {data:#x} lies past the end of the file"
        elif self._is_place(word) and header.external_data and data != guest:
            problem = f"its place {data:#x} in the data file is another cluster's"
        if not problem:
            reserved = L2_RESERVED_MASK | (ZERO if header.extended_l2 else 0)
            return "", word & ~reserved
        # where there are zeros anyway, the place does not matter
        zeros = word & ZERO and not header.extended_l2
        return ("", ZERO) if zeros else (problem, 0)

    def _judge_compressed(self, word: int) -> tuple[str, int]:
        if self.walk.header.external_data:
            return "compressed, in an image with external data", 0
        shift = 62 - (self.walk.header.cluster_bits - 8)
        if self._is_past(word & (1 << shift) - 1):
            return "its compressed data lie past the end of the file", 0
        return "", word & ~COPIED

    def _is_past(self, host_offset: int) -> bool:
        return host_offset >= self.walk.file.size
