"""Compaction: clusters move from the end of the file into free space, and the file is cut.

In rounds, until nothing more can be gained: a survey finds out who uses the clusters
at the end; then what is reserved is taken from below the place where the file could
end (`compacting_pool.py`), and cluster by cluster moves down there (`mapped/move.py`), a
few at a time. Clients go on reading and writing all the while, so a survey is only
a plan: each move looks again.

What has to stay where it is: clusters that snapshots use, or several entries; the
tables of snapshots; persistent bitmaps; a LUKS header; leaks. The file ends behind
the last one of them.
"""

import asyncio
import time
from array import array
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Final

from nbdserve.errors import ImageCorruptError
from nbdserve.formats.mapped.move import Mover
from nbdserve.formats.qcow2.compacting_pool import CompactingPool
from nbdserve.formats.qcow2.compressed_move import CompressedMover
from nbdserve.formats.qcow2.entries import COMPRESSED_FLAG, OFFSET_MASK
from nbdserve.formats.qcow2.snapshots import judged, read_snapshots
from nbdserve.formats.qcow2.structure import Structure
from nbdserve.formats.qcow2.tree import read_entries, read_words
from nbdserve.formats.qcow2.walk import runs

#: Bytes moved at once: copying them takes less than a millisecond of the loop.
_BATCH: Final = 256 << 10
#: Bytes moved between two commits: what a client's flush has to wait for at most.
_COMMIT: Final = 8 << 20
#: Bytes moved before the file is cut.
_CUT: Final = 64 << 20
#: Clusters at the end of the file of which a survey remembers the owners (8 bytes each).
_WINDOW: Final = 1 << 18
#: Bytes left free below the end if there are clients, who write meanwhile.
_SPARE: Final = 4 << 20
#: Entries looked at between two looks at the event loop.
_TURN: Final = 1024
_MOST_ROUNDS: Final = 64
_MANY: Final = 255

#: Told how many bytes were moved, and how many there are to move in all as far as is known.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Compacted:
    """What a compaction has done.

    Attributes:
        size_before: Bytes of the file.
        size_after: Bytes of the file when it was last cut.
        moved: Bytes that were moved.
        stays: Clusters that had to stay where they are, at the end of the file.
        longest_pause_s: How long clients' changes of the mapping waited at most.
        finished: Whether it came to its end; otherwise it was stopped.
    """

    size_before: int
    size_after: int
    moved: int = 0
    stays: int = 0
    longest_pause_s: float = 0.0
    finished: bool = False


@dataclass(slots=True)
class Plan:
    """What a survey has found.

    Attributes:
        low: The first cluster that may be moved.
        window: The first one whose owner is known.
        end: The first one past all.
        owners: From `window` on, the guest cluster of a plain cluster, plus 1; or 0.
        tables: Clusters with L2 tables of the active disk, and their L1 indexes.
        compressed: Guest clusters whose compressed data lie in the window, by host offset.
        blocks: Clusters with refcount blocks, and which ones.
        left: Clusters that could be moved.
        stays: Clusters that keep the file from being shorter.
    """

    low: int
    window: int
    end: int
    owners: "array[int]"
    tables: dict[int, int] = field(default_factory=dict)
    compressed: dict[int, int] = field(default_factory=dict)
    blocks: dict[int, int] = field(default_factory=dict)
    left: int = 0
    stays: int = 0


class Compaction:
    """One compaction of one open image.

    Attributes:
        result: As far as it is known.
    """

    def __init__(
        self,
        structure: Structure,
        alone: Callable[[], AbstractAsyncContextManager[Structure]],
        mover: Mover,
        compressed: CompressedMover,
        *,
        pace: float,
        progress: Progress,
    ) -> None:
        """Begin nothing yet.

        Args:
            structure: Of the image.
            alone: How to have it alone (`Qcow2Image.structure`).
            mover: Moves its clusters.
            compressed: Moves its compressed clusters.
            pace: How long to rest after each move, as a multiple of its duration; 0 if
                there are no clients.
            progress: See `Progress`.
        """
        pool = structure.pool
        if not isinstance(pool, CompactingPool):
            raise TypeError("this is not the pool of an image that was opened")
        self._stopped = False
        self._structure = structure
        self._alone = alone
        self._parts = structure.parts
        self._pool: CompactingPool = pool
        self._commit = structure.commit
        self._mover = mover
        self._compressed = compressed
        self._pace = pace
        bits = self._parts.geometry.cluster_bits
        self._spare = max(1, _SPARE >> bits) if pace else 1
        self._progress = progress
        self._bits = self._parts.geometry.cluster_bits
        self._size = self._parts.geometry.cluster_size
        self._moved = 0
        self._uncommitted = 0
        self._uncut = 0
        size = self._parts.storage.size
        self.result = Compacted(size, size)

    def stop(self) -> None:
        """Let it end after the move that is under way."""
        self._stopped = True

    async def run(self) -> Compacted:
        """Compact until there is nothing to gain, or it is stopped.

        Raises:
            ImageCorruptError: An entry names a cluster that counts as free.
            OSError: Something can't be read or written; the image is as good as before.
        """
        gate = self._parts.gate
        gate.recent_s = 0.0
        try:
            for _ in range(_MOST_ROUNDS):
                before = self._moved
                plan = await self._plan()
                await self._pool.confine(plan.low)
                await self._carry_out(plan)
                await self._cut()
                # or clients have taken what was free
                finished = not plan.left or self._pool.ceiling is None
                gained = plan.end - self._pool.end
                little = gained * 4 < self._moved - before or gained <= 0
                all_known = plan.window <= plan.low
                if self._stopped or finished or (all_known and little):
                    break
        finally:
            self._pool.unconfine()
            self.result = replace(
                self.result,
                moved=self._moved << self._bits,
                longest_pause_s=gate.recent_s,
                finished=not self._stopped,
            )
        return self.result

    # -- the survey

    async def _plan(self) -> Plan:
        await self._commit.flush()
        await self._commit.released()
        low = await self._pool.used() + self._spare
        usage = await self._pool.usage(low)
        end = low + len(usage)
        window = max(low, end - _WINDOW)
        plan = Plan(low, window, end, array("Q", bytes(8 * max(end - window, 0))))
        claims = bytearray(len(usage))
        if claims:
            await self._claim_active(plan, usage, claims)
            await self._verify_snapshots(usage, low)
            self._claim_metadata(plan, claims)
        for position in range(len(usage) - 1, -1, -1):
            count = usage[position]
            if count and (count != claims[position] or count == _MANY):
                plan.low = low + position + 1
                plan.window = max(plan.window, plan.low)
                plan.stays = len(usage[: position + 1]) - usage[: position + 1].count(0)
                break
        movable = usage[plan.low - low :]
        plan.left = len(movable) - movable.count(0)
        # what was not remembered because of the window is for the next round
        if window > low and plan.window == window:
            plan.stays = 0
        self.result = replace(self.result, stays=plan.stays)
        return plan

    async def _claim_active(
        self, plan: Plan, usage: bytearray, claims: bytearray
    ) -> None:
        """Count what the active disk names from `plan.low` on, and remember who does."""
        low, entries = plan.low, self._parts.geometry.l2_entries
        for number, word in enumerate(self._parts.tables.l1.words[:]):
            if not word:
                continue
            cluster = (word & OFFSET_MASK) >> self._bits
            if cluster >= low:
                plan.tables[cluster] = number
                self._claim(claims, cluster - low, 1)
            words = await self._words(number, word)
            for start in range(0, len(words), _TURN):
                base = number * entries + start
                await self._claim_entries(
                    plan, usage, claims, base, words[start : start + _TURN]
                )

    async def _claim_entries(
        self,
        plan: Plan,
        usage: bytearray,
        claims: bytearray,
        base: int,
        words: "array[int]",
    ) -> None:
        low, window = plan.low, plan.window
        for index, host_offset, clusters, packed in self._named(words):
            first = host_offset >> self._bits
            if first + clusters <= low:
                continue
            skipped = max(low - first, 0)
            self._claim(claims, first + skipped - low, clusters - skipped)
            await self._require_counted(base + index, first, clusters, plan, usage)
            if packed:
                if first + clusters > window:
                    plan.compressed[host_offset] = base + index
                continue
            begin = max(first, window)
            stop = min(first + clusters, plan.end)
            if begin < stop:
                guest = base + index + begin - first + 1
                plan.owners[begin - window : stop - window] = array(
                    "Q", range(guest, guest + stop - begin)
                )
        await asyncio.sleep(0)

    def _named(self, words: "array[int]") -> "list[tuple[int, int, int, bool]]":
        """Return what entries name: index, host offset, clusters, and whether compressed."""
        named: list[tuple[int, int, int, bool]] = []
        for index, first, length in runs(words, self._size):
            if not first & COMPRESSED_FLAG:
                if first & OFFSET_MASK:
                    named.append((index, first & OFFSET_MASK, length, False))
                continue
            for each in range(length):
                word = first + each * self._size
                offset, extent = self._parts.codec.compressed_extent(word)
                clusters = (offset + extent - 1 >> self._bits) - (offset >> self._bits)
                named.append((index + each, offset, clusters + 1, True))
        return named

    @staticmethod
    def _claim(claims: bytearray, start: int, count: int) -> None:
        stop = min(start + count, len(claims))
        if not any(claims[start:stop]):
            claims[start:stop] = b"\1" * (stop - start)
            return
        for position in range(start, stop):
            claims[position] = min(claims[position] + 1, _MANY)

    async def _require_counted(
        self,
        guest_cluster: int,
        first: int,
        clusters: int,
        plan: Plan,
        usage: bytearray,
    ) -> None:
        """Refuse an image in which an entry names a cluster that counts as free.

        Args:
            guest_cluster: The first of a run of plain ones, or a compressed one.
            first: The first cluster that it names, or they do.
            clusters: How many.
            plan: What is known.
            usage: References from `low` on, when the survey began.

        Raises:
            ImageCorruptError: Cutting the file could lose data.
        """
        start = max(first - plan.low, 0)
        stop = min(first + clusters - plan.low, len(usage))
        position = usage.find(0, start, stop) if start < stop else -1
        while position >= 0:
            cluster = plan.low + position
            # it may have been allocated, or freed, since the counts were read
            if not await self._pool.references(cluster << self._bits):
                await self._require_gone(guest_cluster, cluster - first, cluster)
            position = usage.find(0, position + 1, stop)

    async def _require_gone(
        self, guest_cluster: int, distance: int, cluster: int
    ) -> None:
        """Refuse an image in which this entry, or that of a run, still names a free cluster."""
        bits = self._parts.geometry.l2_bits
        table = await self._parts.tables.load(guest_cluster >> bits)
        if table is None:
            return
        index = guest_cluster & (1 << bits) - 1
        for position in {index, index + distance}:
            for _, host_offset, clusters, _ in self._named(
                table.words[position : position + 1]
            ):
                first = host_offset >> self._bits
                if first <= cluster < first + clusters:
                    self._refuse(cluster)

    def _refuse(self, cluster: int) -> None:
        raise ImageCorruptError(
            f"{self._parts.storage.name}: the cluster at {cluster << self._bits:#x} is in"
            " use although its refcount says it is free; run 'nbdserve image check' on it"
        )

    async def _verify_snapshots(self, usage: bytearray, low: int) -> None:
        """Refuse an image of which a snapshot names clusters that count as free."""
        header, storage = self._structure.header, self._parts.storage
        snapshots, _ = await read_snapshots(storage, header)
        for snapshot in snapshots:
            judged(replace(snapshot, disk_size=0), header, storage.size)
            l1 = await read_words(storage, snapshot.l1_table_offset, snapshot.l1_size)
            for word in l1:
                if not word:
                    continue
                words, _ = await read_entries(self._parts, word & OFFSET_MASK)
                for _, host_offset, clusters, _ in self._named(words):
                    first = host_offset >> self._bits
                    start = max(first - low, 0)
                    stop = min(first + clusters - low, len(usage))
                    if start < stop and 0 in usage[start:stop]:
                        self._refuse(first)
                await asyncio.sleep(0)

    def _claim_metadata(self, plan: Plan, claims: bytearray) -> None:
        """Count the tables that can be moved besides L2 tables."""
        low, header = plan.low, self._structure.header
        for cluster, number in self._pool.blocks().items():
            if cluster >= low:
                plan.blocks[cluster] = number
                self._claim(claims, cluster - low, 1)
        start, count = self._pool.table_place
        if start >= low:
            self._claim(claims, start - low, count)
        start = header.l1_table_offset >> self._bits
        if start >= low:
            self._claim(claims, start - low, self._l1_clusters)

    @property
    def _l1_clusters(self) -> int:
        length = 8 * len(self._parts.tables.l1.words)
        return max(1, self._parts.geometry.align_up(length) >> self._bits)

    async def _words(self, number: int, word: int) -> "array[int]":
        """Return the entries of an L2 table, without keeping it in memory."""
        table = self._parts.tables.cached.get(number)
        if table is not None:
            return table.words[:]
        words, _ = await read_entries(self._parts, word & OFFSET_MASK)
        return words

    # -- the moves

    async def _carry_out(self, plan: Plan) -> None:
        """Move what the plan knows, from the end of the file down."""
        most = max(1, _BATCH >> self._bits)
        done = self._moved
        cluster = plan.end - 1
        while cluster >= plan.window and not self._at_end:
            count = self._run_down(plan, cluster, most)
            if count:
                first = cluster - count + 1
                await self._step(self._move_data(plan, first, count))
                cluster = first
            elif cluster in plan.tables:
                await self._step(self._move_table(plan.tables[cluster], cluster))
            cluster -= 1
            left = plan.left - (self._moved - done)
            self._progress(
                self._moved << self._bits, self._moved + max(left, 0) << self._bits
            )
        blobs = sorted(plan.compressed.items(), reverse=True)
        while blobs and not self._at_end:
            await self._step(self._move_compressed(blobs))
        if not self._at_end:
            await self._move_metadata(plan)

    @property
    def _at_end(self) -> bool:
        return self._stopped or self._pool.ceiling is None

    def _run_down(self, plan: Plan, cluster: int, most: int) -> int:
        """Return how many plain clusters up to this one are in a row for the guest too."""
        at = cluster - plan.window
        owner = plan.owners[at]
        if not owner:
            return 0
        # clusters of one table: the guest clusters before this one there
        most = min(
            most, at + 1, ((owner - 1) & self._parts.geometry.l2_entries - 1) + 1
        )
        count = 1
        while count < most and plan.owners[at - count] == owner - count:
            count += 1
        return count

    async def _move_data(self, plan: Plan, first: int, count: int) -> int:
        guest = plan.owners[first - plan.window] - 1
        moved = 0
        while moved < count and not self._at_end:
            grant = await self._pool.take_low(count - moved)
            if grant is None:
                break
            host_offset = first + moved << self._bits
            if await self._mover.move(guest + moved, host_offset, grant):
                self._moved += grant.clusters
                moved += grant.clusters
                continue
            self._pool.put_back(grant)
            if grant.clusters > 1:
                # one of them is in the way of the others
                for each in range(moved, moved + grant.clusters):
                    await self._move_data_alone(guest + each, first + each)
            elif await self._mover.drop_place(guest + moved, host_offset):
                self._moved += 1
            moved += grant.clusters
        return count << self._bits

    async def _move_data_alone(self, guest_cluster: int, cluster: int) -> None:
        host_offset = cluster << self._bits
        grant = await self._pool.take_low(1)
        if grant is None:
            return
        if await self._mover.move(guest_cluster, host_offset, grant):
            self._moved += 1
            return
        self._pool.put_back(grant)
        if await self._mover.drop_place(guest_cluster, host_offset):
            self._moved += 1

    async def _move_table(self, number: int, cluster: int) -> int:
        grant = await self._pool.take_low(1)
        if grant is None:
            return 0
        if await self._mover.move_table(number, cluster << self._bits, grant):
            self._moved += 1
        else:
            self._pool.put_back(grant)
        return self._size

    async def _move_compressed(self, blobs: list[tuple[int, int]]) -> int:
        """Move as many compressed clusters as fit, and take them off the list."""
        grant = await self._pool.take_low(max(1, _BATCH >> self._bits))
        if grant is None:
            blobs.clear()
            return 0
        if await self._compressed.move(blobs, grant):
            self._moved += grant.clusters
        return grant.clusters << self._bits

    async def _step(self, work: Coroutine[Any, Any, int]) -> None:
        """Do some work, commit and cut now and then, and rest."""
        start_s = time.monotonic()
        length = await work
        self._uncommitted += length
        self._uncut += length
        if self._uncut >= _CUT:
            await self._cut()
        elif self._uncommitted >= _COMMIT:
            await self._commit.flush()
            self._uncommitted = 0
        await asyncio.sleep((time.monotonic() - start_s) * self._pace)

    async def _move_metadata(self, plan: Plan) -> None:
        """Move refcount blocks and table and the L1 table, where that helps."""
        # the blocks of what is free by now count nothing but themselves
        await self._commit.flush()
        await self._commit.released()
        for cluster, number in sorted(plan.blocks.items(), reverse=True):
            if self._at_end:
                return
            if cluster >= plan.low:
                await self._move_block(number)
        start, count = self._pool.table_place
        if start >= plan.low:
            grant = await self._pool.take_low(count, whole=True)
            if grant is not None:
                await self._pool.move_table(grant)
                self._moved += count
        start = self._structure.header.l1_table_offset >> self._bits
        if start >= plan.low and not self._at_end:
            await self._move_l1()

    async def _move_block(self, number: int) -> None:
        try:
            if await self._pool.drop_block(number):
                return
            grant = await self._pool.take_low(1)
            if grant is not None:
                await self._pool.move_block(number, grant)
                self._moved += 1
        except OSError as error:
            # nobody knows which refcount block the file names
            self._commit.failed = self._commit.failed or error
            raise

    async def _move_l1(self) -> None:
        count = self._l1_clusters
        grant = await self._pool.take_low(count, whole=True)
        if grant is None:
            return
        async with self._alone() as structure:
            if self._l1_clusters != count:
                # the disk has another size by now
                self._pool.put_back(grant)
                return
            first = grant.host_offset >> self._bits
            self._pool.metadata.update(range(first, first + count))
            entries = len(self._parts.tables.l1.words)
            await structure.grow_l1(entries, grant.host_offset)
            self._moved += count

    async def _cut(self) -> None:
        """Commit, and cut what is free by that off the file."""
        await self._commit.flush()
        await self._commit.released()
        await self._pool.cut_end()
        self._uncommitted = self._uncut = 0
        # before clients let the file grow again, by what is reserved for them
        self.result = replace(self.result, size_after=self._parts.storage.size)
