"""The pool of a qcow2 image that can be kept below an end, so that the file gets smaller.

While the image is compacted (`compaction.py`), what is reserved comes from free space
below the *ceiling*, what is free above it is cut off the file, and refcount blocks and
the refcount table move below it too:

    block: copy -> barrier -> its word in the refcount table -> barrier -> the old one is free
    block that counts nothing but itself: the word is cleared -> barrier -> it is free
    table: copy -> barrier -> one write of header bytes 48 to 59 -> barrier -> the old one is free

*Crash in any gap: the old place or the new one; the other is a leak at most.*

If clients need more than is free down there, the ceiling is given up: a write
never fails because of it.
"""

import asyncio
from array import array
from typing import Final

from nbdserve.formats.mapped.pool import FIRST_RESERVATION, Grant, _Run
from nbdserve.formats.qcow2.cluster_counts import decode_block
from nbdserve.formats.qcow2.refcounts import RefcountedPool

#: Clusters reserved at a time below the ceiling, and bytes of them at most.
_CLUSTERS: Final = 64
_BYTES: Final = 4 << 20
_ZERO_WORD: Final = bytes(8)
#: Any number of references is a use.
_IN_USE: Final = b"\0" + b"\1" * 255


class CompactingPool(RefcountedPool):
    """A pool that takes clusters below a ceiling while there is one."""

    _ceiling: int | None = None

    @property
    def end(self) -> int:
        """The number of the first cluster past everything in use."""
        return self._end

    @property
    def ceiling(self) -> int | None:
        """The number of the first cluster that is not to be used, None if all may be."""
        return self._ceiling

    @property
    def _target(self) -> int:
        if self._ceiling is None:
            return super()._target
        return max(1, min(_CLUSTERS, _BYTES >> self._cluster_bits))

    def _low(self) -> bool:
        # what is free below the ceiling is for those who need it now
        return self._ceiling is None and super()._low()

    # -- what is used

    async def used(self) -> int:
        """Return how many clusters have a reference, without those reserved here."""
        count = 0
        async with self._lock:  # nothing is reserved meanwhile
            for number in range(len(self._table)):
                block = await self._block(number)
                if block is not None:
                    used = block.used()
                    count += len(used) - used.count(0)
                    await asyncio.sleep(0)
            return count - sum(run.count for run in self._runs)

    async def usage(self, low: int) -> bytearray:
        """Return a byte for each cluster from `low` to `end`: its references, at most 255.

        What is reserved here counts as free.
        """
        async with self._lock:
            return await self._usage(low)

    async def _usage(self, low: int) -> bytearray:
        end = self._end
        usage = bytearray(max(end - low, 0))
        size = 1 << self._block_bits
        for number in range(low >> self._block_bits, -(-end // size)):
            block = await self._block(number)
            if block is None:
                continue
            counts, _ = decode_block(bytes(block.data), self._order)
            base = number * size
            first, last = max(base, low), min(base + size, end)
            usage[first - low : last - low] = counts[first - base : last - base]
            await asyncio.sleep(0)
        for run in self._runs:
            first, last = max(run.start, low), min(run.start + run.count, end)
            if first < last:
                usage[first - low : last - low] = bytes(last - first)
        return usage

    def blocks(self) -> dict[int, int]:
        """Return the numbers of the clusters with refcount blocks, and of their blocks."""
        return {
            host_offset >> self._cluster_bits: number
            for number, host_offset in enumerate(self._table)
            if host_offset
        }

    @property
    def table_place(self) -> tuple[int, int]:
        """The first cluster of the refcount table, and how many."""
        return (
            self._table_offset >> self._cluster_bits,
            len(self._table) >> self._cluster_bits - 3,
        )

    # -- the ceiling

    async def confine(self, ceiling: int) -> None:
        """Take clusters below `ceiling` from now on, and give back what is reserved above."""
        self._ceiling = ceiling
        async with self._lock:
            kept: list[_Run] = []
            high: list[tuple[int, int]] = []
            for run in self._runs:
                below = min(max(ceiling - run.start, 0), run.count)
                if below:
                    kept.append(_Run(run.start, below, run.durable))
                if below < run.count:
                    high.append((run.start + below, run.count - below))
            self._runs = kept
            for start, count in await self._unreserve(high):
                self._keep_free(start, count)
            await self._claim_holes(ceiling)

    def unconfine(self) -> None:
        """Take clusters anywhere again, and begin with small reservations."""
        self._ceiling = None
        self._bytes = FIRST_RESERVATION
        self._refilled_at = 0.0

    async def _claim_holes(self, low: int) -> None:
        """Know all clusters from `low` on that nothing refers to as free."""
        known = self._unused() + [(run.start, run.count) for run in self._runs]
        usage = (await self._usage(low)).translate(_IN_USE)
        for start, count in known:
            first, last = max(start, low), min(start + count, self._end)
            if first < last:
                usage[first - low : last - low] = b"\1" * (last - first)
        holes: list[tuple[int, int]] = []
        position = usage.find(0)
        while position >= 0:
            stop = usage.find(1, position)
            end = len(usage) if stop < 0 else stop
            start, count = low + position, end - position
            self._require_no_metadata(start, count)
            holes.append((start, count))
            position = usage.find(0, end)
        await self._reuse(holes)

    async def _find(
        self, found: list[tuple[int, int]], wanted: int, contiguous: int
    ) -> None:
        if self._ceiling is not None:
            await self._find_below(found, wanted, contiguous, self._ceiling)
            if any(count >= contiguous for _, count in found):
                return
            room = self._ceiling - self._end
            if room >= contiguous and not self._storage.fixed_size:
                found.append(await self._grow(min(wanted, room), contiguous))
                return
            # clients fill the disk faster than it can be compacted
            self.unconfine()
        await super()._find(found, wanted, contiguous)

    async def _find_below(
        self,
        found: list[tuple[int, int]],
        wanted: int,
        contiguous: int,
        ceiling: int,
    ) -> None:
        found += self._free.take(wanted, contiguous, ceiling)
        missing = wanted - sum(count for _, count in found)
        while missing > 0 and self._searched < len(self._table):
            holes = await self._old_holes(missing, found + self._unused())
            for start, count in holes:
                self._require_no_metadata(start, count)
            for start, count in await self._recall(holes):
                await self._zero(start, count)
                found.append((start, count))
                missing -= count

    async def take_low(self, count: int, *, whole: bool = False) -> Grant | None:
        """Take up to `count` contiguous, durable clusters below the ceiling.

        Args:
            count: At least 1.
            whole: Whether no fewer will do.

        Returns:
            None if none are free there, or there is no ceiling any more.
        """
        while self._ceiling is not None:
            least = count if whole else 1
            for run in self._runs:
                if run.durable and min(run.count, self._ceiling - run.start) >= least:
                    most = min(count, run.count, self._ceiling - run.start)
                    return self._cut(run, most)
            if not await self._reserve_low(least):
                return None
        return None

    def put_back(self, grant: Grant) -> None:
        """Take back durable clusters to which nothing was written."""
        start = grant.host_offset >> self._cluster_bits
        self._runs.append(_Run(start, grant.clusters, durable=True))

    async def _reserve_low(self, contiguous: int) -> bool:
        """Reserve clusters below the ceiling, if there are any; never grow the file."""
        async with self._lock:
            ceiling = self._ceiling
            if ceiling is None:
                return False
            found: list[tuple[int, int]] = []
            wanted = max(contiguous, self._target)
            try:
                await self._find_below(found, wanted, contiguous, ceiling)
                await self._reserve(found)
            except BaseException:
                for start, count in found:
                    self._keep_free(start, count)
                raise
            added = [_Run(start, count, durable=False) for start, count in found]
            self._runs += added
            await self._durability.barrier()
            for run in added:
                run.durable = True
            return any(run.count >= contiguous for run in added)

    async def cut_end(self) -> None:
        """Cut the free clusters off the end of the file.

        Raises:
            OSError: It could not be done, and nothing has changed.
        """
        async with self._lock:
            if (
                self._storage.fixed_size
                or self._free.last_before(self._end) == self._end
            ):
                return
            # nothing durable names them, nor counts them, any more
            await self._durability.barrier()
            end = self._end
            start = self._free.cut(end)
            try:
                if start << self._cluster_bits < self._storage.size:
                    await self._storage.truncate(start << self._cluster_bits)
            except BaseException:
                self._free.add(start, end - start)
                raise
            self._end = start
            # What grows the file again makes just its own ranges durable: a cut must
            # not take away the new end after that.
            await self._durability.barrier()

    # -- refcount structures move

    async def drop_block(self, number: int) -> bool:
        """Do without a refcount block that counts nothing but itself; see above.

        Returns:
            Whether it was such a block.

        Raises:
            OSError: Nobody knows what the refcount table in the file says now.
        """
        async with self._lock:
            block = await self._block(number)
            if block is None:
                return True
            cluster = block.host_offset >> self._cluster_bits
            used = block.used()
            only_itself = len(used) - used.count(0) == 1 and (
                cluster >> self._block_bits == number
            )
            if not only_itself:
                return False
            await self._write_blocks([number])
            offset = self._table_offset + 8 * number
            await self._storage.write(offset, _ZERO_WORD)
            await self._durability.barrier()
            self._table[number] = 0
            self._blocks.pop(number, None)
            self.metadata.discard(cluster)
            await self._zero(cluster, 1)
            self._keep_free(cluster, 1)
            return True

    async def move_block(self, number: int, grant: Grant) -> None:
        """Move a refcount block to a cluster taken for it; see above.

        Raises:
            OSError: Nobody knows what the refcount table in the file says now.
        """
        async with self._lock:
            block = await self._existing(number)
            await self._write_blocks([number])
            block.writing = True  # keeps it in the cache
            try:
                await self._storage.write(grant.host_offset, bytes(block.data))
                await self._durability.barrier()
                await self._storage.write(
                    self._table_offset + 8 * number,
                    grant.host_offset.to_bytes(8, "big"),
                )
                await self._durability.barrier()
            finally:
                block.writing = False
            old = block.host_offset >> self._cluster_bits
            block.host_offset = self._table[number] = grant.host_offset
            self._blocks[number] = block
            self.metadata.discard(old)
            self.metadata.add(grant.host_offset >> self._cluster_bits)
            for run in await self._unreserve([(old, 1)]):
                await self._zero(*run)
                self._keep_free(*run)

    async def move_table(self, grant: Grant) -> None:
        """Move the refcount table to clusters taken for it; see above.

        Raises:
            OSError: It could not be done.
        """
        async with self._lock:
            first = grant.host_offset >> self._cluster_bits
            await self._move_table(array("Q", self._table), {}, first, grant.clusters)
