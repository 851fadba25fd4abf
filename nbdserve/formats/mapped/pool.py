"""Free space: every cluster the engine allocates comes out of a reserved pool.

The pool holds runs of clusters that no entry names, whose reference count is 1
already, and whose bytes read as zeros. Once a barrier has made all that durable,
an L2 entry may name such a cluster at once, before any further barrier: whatever a power cut
leaves of the write, the cluster shows zeros or the new bytes, and never anything
else. So a first write costs the guest's bytes and one word.

A run is *soft* while the barrier that makes it durable is under way. A soft cluster
may be used by entries that wait for the next commit, whose barrier covers it too.

A clean close gives the rest of the pool back; a crash leaks it at most.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from errno import EFBIG, ENOSPC, EOPNOTSUPP
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from nbdserve.errors import ImageCorruptError
from nbdserve.formats.mapped.commit import Freed
from nbdserve.formats.mapped.free_runs import FreeRuns
from nbdserve.storage.base import Storage

if TYPE_CHECKING:
    from collections.abc import Callable

#: Bytes of the first reservation, and of those that follow in haste. What is reserved is
#: sparse: it costs no disk space until it is used.
FIRST_RESERVATION: Final = 64 << 20
_MOST: Final = 1 << 30
#: A reservation that lasted less than this is followed by the larger kind.
_HASTE_S: Final = 10.0
#: Smaller clusters are reserved as if they had this size: there the bookkeeping counts.
_USUAL_BITS: Final = 16
_LEAST_CLUSTERS: Final = 8
_ZEROS: Final = bytes(1 << 16)
_SECTOR: Final = 512
#: More ranges than this are cheaper to make durable by a barrier.
_MOST_RANGES: Final = 8

#: Punches, of 15 us or more each, between two turns of the loop.
_PUNCHES: Final = 32

#: A range of the file that was written: offset and length in bytes.
Written = tuple[int, int]
#: Neighbouring clusters: the number of the first one, and how many.
Clusters = tuple[int, int]


class Durability(Protocol):
    """How a pool makes durable what it wrote (`Committer`)."""

    async def barrier(self) -> None:
        """Make everything durable that was written before."""

    async def barrier_of(self, offset: int, length: int) -> None:
        """Make a range of the file durable, and its length as far as the range's end."""


class Grant(NamedTuple):
    """Clusters taken from the pool.

    Attributes:
        host_offset: The first byte of the first one.
        clusters: How many, contiguous.
        durable: Whether an entry may name them before the next barrier.
    """

    host_offset: int
    clusters: int
    durable: bool


@dataclass(slots=True)
class _Run:
    """Contiguous clusters in the pool, by cluster number."""

    start: int
    count: int
    durable: bool


class Pool(ABC):
    """The reserved clusters of one image, and how the format reserves more.

    Attributes:
        metadata: Numbers of the clusters that hold the header and other tables than
            L2 tables: neither data nor an L2 table may ever be written there.
        tables: Numbers of the clusters that hold L2 tables of the active disk.
        on_damage: Called if refcounts and entries are found to contradict each other.
    """

    def __init__(
        self,
        storage: Storage,
        cluster_bits: int,
        durability: Durability,
        end: int,
        metadata: set[int],
        tables: set[int],
    ) -> None:
        """`end` is the number of the first cluster past everything in use."""
        self.metadata = metadata
        self.tables = tables
        self.on_damage: Callable[[], None] | None = None
        self._storage = storage
        self._cluster_bits = cluster_bits
        self._durability = durability
        self._end = end
        self._runs: list[_Run] = []
        self._free = FreeRuns()
        # free, but lent, or their old bytes could not be punched so far
        self._unpunched: list[tuple[int, int]] = []
        self._lock = asyncio.Lock()
        self._refilling: asyncio.Task[None] | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._bytes = FIRST_RESERVATION
        self._refilled_at = 0.0
        self._soft = False

    # -- what the format does

    @abstractmethod
    async def _reserve(self, runs: list[tuple[int, int]]) -> list[Written]:
        """Give the clusters of `runs` (first, count) a reference, in the file.

        If it fails, none of them has one in memory.

        Returns:
            What was written and has to become durable.
        """

    @abstractmethod
    async def _unreserve(self, runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Take a reference from each cluster of `runs` (first, count), in the file.

        If it fails, all of them have it still, as far as memory says.

        Returns:
            The runs (first, count) that nobody refers to any more.
        """

    @abstractmethod
    async def references(self, host_offset: int) -> int:
        """Return how many entries name the cluster at `host_offset`."""

    def surely_alone(self, host_offset: int, count: int) -> int:
        """Return how many of neighbouring clusters one entry alone names, without waiting.

        Only what is in memory counts, and what may be written to: 0 also means "not known".
        """
        return 0

    @abstractmethod
    async def _old_holes(
        self, most: int, known: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Return runs that were free before this image was opened, a few at a time.

        Args:
            most: Clusters wanted.
            known: Runs known to be free already.
        """

    # -- taking

    def take(self, count: int, *, soft: bool = False) -> Grant | None:
        """Take up to `count` contiguous clusters, without waiting.

        Args:
            count: At least 1.
            soft: Accept clusters that the next barrier has yet to make durable.

        Returns:
            None if the pool has none; then `refill` waits for more.
        """
        self._soft = soft
        for run in self._runs:
            if run.durable or soft:
                return self._cut(run, min(count, run.count))
        return None

    def take_whole(self, count: int) -> Grant | None:
        """Take exactly `count` contiguous durable clusters, or None."""
        for run in self._runs:
            if run.durable and run.count >= count:
                return self._cut(run, count)
        return None

    def _cut(self, run: _Run, count: int) -> Grant:
        grant = Grant(run.start << self._cluster_bits, count, run.durable)
        run.start += count
        run.count -= count
        if not run.count:
            self._runs.remove(run)
        if self._refilling is None and self._low():
            self._start_refill(1)
        return grant

    def _low(self) -> bool:
        # Who takes soft clusters need not wait if the next barrier comes too late.
        least = self._target >> (3 if self._soft else 1)
        count = 0
        for run in self._runs:
            count += run.count
            if count >= least:
                return False
        return True

    @property
    def _target(self) -> int:
        """Clusters of one reservation."""
        return max(self._bytes >> max(self._cluster_bits, _USUAL_BITS), _LEAST_CLUSTERS)

    # -- refilling

    async def refill(self, contiguous: int = 1) -> None:
        """Wait until the pool has `contiguous` durable clusters in a row.

        Raises:
            OSError: There is no space, or the file can't be written.
        """
        while not any(run.durable and run.count >= contiguous for run in self._runs):
            if self._refilling is None:
                self._start_refill(contiguous)
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def _start_refill(self, contiguous: int) -> None:
        task = asyncio.get_running_loop().create_task(self._refill(contiguous))
        self._refilling = task
        task.add_done_callback(self._refill_ended)

    def _refill_ended(self, task: asyncio.Task[None]) -> None:
        self._refilling = None
        waiters, self._waiters = self._waiters, []
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        for waiter in waiters:
            if waiter.done():
                continue
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)

    async def _refill(self, contiguous: int) -> None:
        now = time.monotonic()
        if self._refilled_at and now - self._refilled_at < _HASTE_S:
            self._bytes = max(self._bytes, _MOST)
        wanted = max(contiguous, self._target)
        async with self._lock:
            found: list[tuple[int, int]] = []
            end = self._end
            try:
                if self._unpunched:
                    await self._reuse([])
                await self._find(found, wanted, contiguous)
                new = found == [(end, found[0][1])] and not self._storage.fixed_size
                tail = await self._put_tail(*found[0]) if new else None
                written = await self._reserve(found)
            except BaseException:
                for start, count in found:
                    self._keep_free(start, count)
                raise
            added = [_Run(start, count, durable=False) for start, count in found]
            self._runs += added
            # If this fails the image takes no more writes, and the runs stay soft.
            await self._make_durable(tail, written)
            for run in added:
                run.durable = True
        self._refilled_at = time.monotonic()

    async def _make_durable(self, tail: Written | None, written: list[Written]) -> None:
        """Make a reservation durable: what was punched is in no range that was written."""
        if tail is None:
            await self._durability.barrier()
        else:
            await self._persist([tail, *written])

    async def _persist(self, written: list[Written]) -> None:
        """Make what was written durable, and if possible nothing else.

        A barrier writes out all other dirty data too, while their writer goes on: with
        200 MiB of them it takes 110 ms here, with 1 GiB 620 ms, and a few ranges 2 ms.
        """
        if len(written) > _MOST_RANGES:
            await self._durability.barrier()
            return
        for offset, length in written:
            await self._durability.barrier_of(offset, length)

    async def _put_tail(self, start: int, count: int) -> Written:
        """Write the last sector of new clusters: once durable, so is the file's length."""
        tail = ((start + count) << self._cluster_bits) - _SECTOR
        await self._storage.put(tail, bytes(_SECTOR))
        return tail, _SECTOR

    async def _find(
        self, found: list[tuple[int, int]], wanted: int, contiguous: int
    ) -> None:
        """Add free clusters to `found`: freed by us, old holes, then past the end."""
        found += self._free.take(wanted, contiguous)
        missing = wanted - sum(count for _, count in found)
        if missing > 0:
            holes = await self._old_holes(missing, found + self._unused())
            for start, count in holes:
                self._require_no_metadata(start, count)
            for start, count in await self._recall(holes):
                # Not in `found` before: what is given back from there counts as zeros.
                await self._zero(start, count)
                found.append((start, count))
                missing -= count
        largest = max((count for _, count in found), default=0)
        # no need to grow the file for the last few
        if largest < contiguous or missing > wanted // 2:
            found.append(await self._grow(max(missing, contiguous), contiguous))

    def _unused(self) -> list[tuple[int, int]]:
        """Return the runs that we know nobody refers to, whether free by now or not."""
        return self._free.runs() + self._unpunched

    async def _grow(self, count: int, contiguous: int) -> tuple[int, int]:
        """Take clusters past the end of everything in use, extending the file."""
        start = self._end
        end = (start + count) << self._cluster_bits
        if self._storage.fixed_size:
            count = min(count, (self._storage.size >> self._cluster_bits) - start)
            if count < contiguous:
                raise OSError(ENOSPC, f"{self._storage.name}: no free cluster is left")
            await self._zero(start, count)
        elif end > self._storage.size:
            try:
                await self._storage.truncate(end)
            except OSError as error:
                if error.errno != EFBIG:
                    raise
                # larger than the file system or a limit allows: just what is needed
                count = contiguous
                await self._storage.truncate((start + count) << self._cluster_bits)
        self._end = start + count
        return start, count

    async def _zero(self, start: int, count: int) -> None:
        """Make clusters that hold old bytes read as zeros."""
        offset = start << self._cluster_bits
        end = min((start + count) << self._cluster_bits, self._storage.size)
        if end <= offset:
            return
        try:
            await self._storage.zero(offset, end - offset, unmap=True)
        except OSError as error:
            if error.errno != EOPNOTSUPP:
                raise
            while offset < end:
                piece = _ZEROS[: end - offset]
                await self._storage.put(offset, piece)
                offset += len(piece)

    # -- giving back

    def require_data(self, host_offset: int, length: int) -> None:
        """Refuse to give back what an entry names as data and is in fact a table.

        Raises:
            ImageCorruptError: Metadata would be punched and used again.
        """
        start = host_offset >> self._cluster_bits
        end = (host_offset + length - 1 >> self._cluster_bits) + 1
        self._require_no_metadata(start, end - start)

    def _require_no_metadata(self, start: int, count: int) -> None:
        for cluster in range(start, start + count):
            if cluster in self.metadata or cluster in self.tables:
                raise self.damaged(
                    f"the cluster at "
                    f"{cluster << self._cluster_bits:#x} holds metadata, and an entry "
                    "or a refcount denies it; run 'nbdserve image check' on it"
                )

    def damaged(self, problem: str) -> ImageCorruptError:
        """Report damage, and return the error for it."""
        if self.on_damage is not None:
            self.on_damage()
        return ImageCorruptError(f"{self._storage.name}: {problem}")

    async def release(self, freed: list[Freed]) -> None:
        """Take a reference from clusters that nothing durable and nobody under way names.

        Those without any reference left are punched, and can be reserved again.

        Raises:
            OSError: All of them have that reference still.
        """
        async with self._lock:
            await self._reuse(await self._unreserve(self._clusters(freed)))

    async def _reuse(self, runs: list[Clusters]) -> None:
        """Punch clusters that nobody refers to, and keep them for the next reservation.

        Those that are lent, or can't be punched, stay out of use until that has changed.
        """
        waiting, self._unpunched = self._unpunched + runs, []
        for number, run in enumerate(await self._recall(waiting), 1):
            try:
                await self._zero(*run)
            except OSError:
                self._unpunched.append(run)
            else:
                self._keep_free(*run)
            if not number % _PUNCHES:
                await asyncio.sleep(0)

    async def _recall(self, runs: list[Clusters]) -> list[Clusters]:
        """Return what of some runs can be punched and written to; keep the rest for later.

        A client may not have read yet what sendfile put into its socket (`block/loan.py`).
        """
        regions: dict[Written, list[Clusters]] = {}
        unlent: list[Clusters] = []
        bits = self._cluster_bits
        for start, count in runs:
            position, end = start, start + count
            for region in self._storage.lent(start << bits, count << bits):
                first = max(region[0] >> bits, start)
                stop = min(sum(region) >> bits, end)
                if first > position:
                    unlent.append((position, first - position))
                regions.setdefault(region, []).append((first, stop - first))
                position = stop
            if position < end:
                unlent.append((position, end - position))
        if regions:
            try:
                await self._persist(self._within_file(regions))
            except OSError:  # `Durability` remembers: this was the last change
                self._unpunched += [run for lent in regions.values() for run in lent]
                return unlent
        for region, lent in regions.items():
            with suppress(OSError):  # what was not forgotten is kept
                await self._storage.recall(*region)
            for start, count in lent:
                lent_still = self._storage.any_cached(start << bits, count << bits)
                (self._unpunched if lent_still else unlent).append((start, count))
        return unlent

    def _within_file(self, ranges: Iterable[Written]) -> list[Written]:
        size = self._storage.size
        return [
            (offset, min(length, size - offset))
            for offset, length in ranges
            if offset < size
        ]

    def _clusters(self, freed: list[Freed]) -> list[tuple[int, int]]:
        """Return byte extents as runs of clusters, neighbours joined."""
        runs: list[tuple[int, int]] = []
        for offset, length in sorted(freed):
            start = offset >> self._cluster_bits
            count = ((offset + length - 1) >> self._cluster_bits) + 1 - start
            if runs and runs[-1][0] + runs[-1][1] == start:
                runs[-1] = (runs[-1][0], runs[-1][1] + count)
            else:
                runs.append((start, count))
        return runs

    def _keep_free(self, start: int, count: int) -> None:
        """Add a run of clusters that read as zeros to the free ones."""
        if not self.tables.isdisjoint(range(start, start + count)):
            self.tables.difference_update(range(start, start + count))
        self._free.add(start, count)

    async def close(self) -> None:
        """Give the pool back and cut the free clusters off the end of the file.

        Raises:
            OSError: It could not be done; at worst clusters are leaked.
        """
        if self._refilling is not None:
            await asyncio.wait([self._refilling])
        async with self._lock:
            await self._reuse([])
            runs, self._runs = self._runs, []
            reserved = [(run.start, run.count) for run in runs]
            for free in await self._unreserve(reserved):
                self._keep_free(*free)
            await self._durability.barrier()
            # Only what this session itself has found free or added: where refcounts
            # are wrong, somebody's data may lie behind the last one.
            end = self._free.last_before(self._end) << self._cluster_bits
            if not self._storage.fixed_size and end < self._storage.size:
                await self._storage.truncate(end)
                await self._durability.barrier()
