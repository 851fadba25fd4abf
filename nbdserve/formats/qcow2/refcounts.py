"""Reference counts of an image that is being written: loaded as needed, changed in place.

All increments happen while clusters are reserved for the pool, before anybody can name
them, and all decrements after the commit that took the last name away: so a
refcount is never durably smaller than the number of durable entries.

A refcount block that does not exist yet is written with its own count in it, made
durable, and only then entered into the refcount table; a table that is too small is
copied to the end of the file together with the new blocks, and one write of the header
moves over to it.
"""

import asyncio
import struct
from array import array
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from errno import EFBIG
from operator import add
from typing import Final

from nbdserve.errors import ImageError
from nbdserve.formats.mapped.pool import Durability, Pool, Written
from nbdserve.formats.mapped.tables import decode_words, encode_words
from nbdserve.formats.qcow2.cluster_counts import ClusterCounts
from nbdserve.formats.qcow2.entries import OFFSET_MASK
from nbdserve.formats.qcow2.header import (
    MAX_REFCOUNT_TABLE_BYTES,
    REFCOUNT_TABLE_GROUP_OFFSET,
    Header,
    encode_refcount_table_group,
)
from nbdserve.formats.qcow2.refcount_block import Block
from nbdserve.storage.base import Storage

#: Bytes of refcount blocks kept in memory (one block of 64 KiB counts for 2 GiB).
_CACHE_BYTES: Final = 4 << 20
#: Blocks searched for old holes in one reservation.
_SEARCH_BLOCKS: Final = 4
#: Clusters given back between two looks at the event loop: about a millisecond.
_TURN: Final = 1024
_WORD: Final = struct.Struct(">Q")


def _append(runs: list[tuple[int, int]], cluster: int) -> None:
    """Add a cluster to runs that it may continue."""
    if runs and sum(runs[-1]) == cluster:
        runs[-1] = (runs[-1][0], runs[-1][1] + 1)
    else:
        runs.append((cluster, 1))


def _mark_used(used: bytearray, base: int, runs: list[tuple[int, int]]) -> None:
    """Mark runs of clusters in a map that begins with cluster `base`."""
    for start, count in runs:
        first = max(start - base, 0)
        last = min(start + count - base, len(used))
        if first < last:
            used[first:last] = b"\1" * (last - first)


def _take_holes(
    used: bytearray, base: int, most: int, found: list[tuple[int, int]]
) -> int:
    """Add up to `most` unused clusters of a map to `found`; return how many."""
    left = most
    position = used.find(0)
    while position >= 0 and left > 0:
        end = used.find(1, position)
        end = len(used) if end < 0 else end
        count = min(end - position, left)
        found.append((base + position, count))
        left -= count
        position = used.find(0, end)
    return most - left


class RefcountedPool(Pool):
    """The pool of a qcow2 image, over its refcount table and blocks."""

    def __init__(
        self,
        storage: Storage,
        header: Header,
        table: "array[int]",
        durability: Durability,
        metadata: set[int],
        tables: set[int],
    ) -> None:
        """`table` is the refcount table; `find_end` must follow."""
        end = -(-storage.size >> header.cluster_bits)
        super().__init__(
            storage, header.cluster_bits, durability, end, metadata, tables
        )
        self._order = header.refcount_order
        self._limit = (1 << header.refcount_bits) - 1
        self._block_bits = header.cluster_bits + 3 - header.refcount_order
        self._table = table
        self._table_offset = header.refcount_table_offset
        self._blocks: OrderedDict[int, Block] = OrderedDict()
        self._most_blocks = max(4, _CACHE_BYTES >> header.cluster_bits)
        self._searched = 0
        self._header_in_doubt = False
        self._cluster_size = header.cluster_size

    # -- blocks

    async def _block(self, number: int) -> Block | None:
        """Return a refcount block, None if it does not exist."""
        while True:
            block = self._blocks.get(number)
            if block is not None:
                self._blocks.move_to_end(number)
                return block
            if number >= len(self._table) or not self._table[number]:
                return None
            host_offset = self._table[number]
            data = await self._read_block(number, host_offset)
            # somebody else may have loaded it meanwhile, or compaction moved it
            if number not in self._blocks and self._table[number] == host_offset:
                return self._keep(number, Block(host_offset, data, self._order))

    async def _read_block(self, number: int, host_offset: int) -> bytearray:
        if (
            host_offset & ~OFFSET_MASK
            or host_offset & self._cluster_size - 1
            or host_offset >= self._storage.size
        ):
            raise self.damaged(
                f"entry {number} of the refcount table "
                f"({host_offset:#x}) is not the place of a refcount block; "
                "run 'nbdserve image check' on it"
            )
        data = bytearray(self._cluster_size)
        view = memoryview(data)
        if not self._storage.try_read(host_offset, view):
            await self._storage.read(host_offset, view)
        return data

    async def _existing(self, number: int) -> Block:
        block = await self._block(number)
        if block is None:
            raise self.damaged(f"refcount block {number} is missing")
        return block

    def _keep(self, number: int, block: Block) -> Block:
        self._blocks[number] = block
        excess = len(self._blocks) - self._most_blocks
        if excess > 0:
            for old in list(self._blocks)[: excess + 8]:
                if self._blocks[old].clean and old != number:
                    del self._blocks[old]
        return block

    async def _write_blocks(self, numbers: list[int]) -> list[Written]:
        """Write what changed in these blocks, and return where."""
        written: list[Written] = []
        for number in numbers:
            block = self._blocks.get(number)
            # what has left the cache was in the file already
            changed = block.changed() if block is not None else None
            if block is None or changed is None:
                continue
            start, end = changed
            block.writing = True
            try:
                await self._storage.put(
                    block.host_offset + start, bytes(block.data[start:end])
                )
            except BaseException:
                block.keep_changed(changed)
                raise
            finally:
                block.writing = False
            written.append((block.host_offset + start, end - start))
        return written

    def _split(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Cut a run of clusters into (block number, first index, count)."""
        while count:
            index = start & (1 << self._block_bits) - 1
            piece = min(count, (1 << self._block_bits) - index)
            yield start >> self._block_bits, index, piece
            start += piece
            count -= piece

    async def references(self, host_offset: int) -> int:
        """See `Pool`; 0 where no block counts that cluster."""
        cluster = host_offset >> self._cluster_bits
        block = await self._block(cluster >> self._block_bits)
        return block.get(cluster & (1 << self._block_bits) - 1) if block else 0

    def surely_alone(self, host_offset: int, count: int) -> int:
        """See `Pool`; as far as one refcount block goes."""
        cluster = host_offset >> self._cluster_bits
        block = self._blocks.get(cluster >> self._block_bits)
        end = (cluster + count) << self._cluster_bits
        if block is None or host_offset & self._cluster_size - 1 or not host_offset:
            return 0
        if end > self._storage.size:
            return 0
        first = cluster & (1 << self._block_bits) - 1
        found = 0
        for references in block.counts(
            first, min(count, (1 << self._block_bits) - first)
        ):
            number = cluster + found
            if references != 1 or number in self.metadata or number in self.tables:
                break
            found += 1
        return found

    @asynccontextmanager
    async def unmoved(self) -> AsyncIterator[None]:
        """Keep the refcount table where it is, so that the header can be written anew."""
        async with self._lock:
            yield

    # -- sharing

    async def counts(self, start: int, count: int) -> list[int]:
        """Return the references of neighbouring clusters; 0 where no block counts them."""
        found: list[int] = []
        for number, first, length in self._split(start, count):
            block = await self._block(number)
            found += block.counts(first, length) if block else [0] * length
        return found

    async def require_room(self, more: ClusterCounts) -> None:
        """Refuse more references than a refcount can hold.

        Raises:
            ImageError: Names the width.
        """
        async for _, block, first, added in self._pieces(more):
            old = block.counts(first, len(added))
            if any(map(self._limit.__lt__, map(add, old, added))):
                raise ImageError(
                    f"{self._storage.name}: a cluster would be used more than"
                    f" {self._limit} times, and its refcounts of {1 << self._order}"
                    " bits can't say that"
                )

    async def share(self, more: ClusterCounts) -> None:
        """Give clusters more references, in the file; `require_room` comes first.

        If it fails, none of them has one in memory, and the file may have leaks.
        """
        changed: list[tuple[Block, int, Sequence[int]]] = []
        async with self._lock:
            try:
                async for _, block, first, added in self._pieces(more):
                    old = block.counts(first, len(added))
                    changed.append((block, first, old))
                    block.put_counts(first, list(map(add, old, added)))
                await self._write_blocks(self._touched())
            except BaseException:
                for block, first, before in reversed(changed):
                    block.put_counts(first, before)
                raise

    async def unshare(self, fewer: ClusterCounts) -> None:
        """Take references from clusters, in the file.

        Nothing durable may name them that often any more. Those without any reference left
        are punched, and can be reserved again.
        """
        free: list[tuple[int, int]] = []
        async with self._lock:
            async for number, block, first, taken in self._pieces(fewer, skip=True):
                old = block.counts(first, len(taken))
                # a count too low was wrong already: leave it to the check
                new = [max(a - b, 0) for a, b in zip(old, taken, strict=True)]
                block.put_counts(first, new)
                base = (number << self._block_bits) + first
                for index, value in enumerate(new):
                    if not value and old[index]:
                        _append(free, base + index)
            await self._write_blocks(self._touched())
            await self._reuse(free)

    def _touched(self) -> list[int]:
        return [number for number, block in self._blocks.items() if not block.clean]

    async def _pieces(
        self, counts: ClusterCounts, *, skip: bool = False
    ) -> AsyncIterator[tuple[int, Block, int, list[int]]]:
        """Yield number, refcount block, first index there, and `counts` from there on.

        A block that does not exist is an error, unless it is to be skipped.
        """
        for start, length in counts.used_ranges():
            for number, first, piece in self._split(start, length):
                base = (number << self._block_bits) + first
                values = counts.counts(base, piece)
                if not any(values):
                    continue
                block = await self._block(number)
                if block is not None:
                    yield number, block, first, values
                elif not skip:
                    await self._existing(number)
            await asyncio.sleep(0)

    # -- reserving

    async def _reserve(self, runs: list[tuple[int, int]]) -> list[Written]:
        """See `Pool`."""
        written: list[Written] = []
        changed: list[tuple[int, Block, int, int]] = []
        numbers: dict[int, None] = {}
        try:
            for start, count in runs:
                await self._make_blocks(start, count)
                for number, first, length in self._split(start, count):
                    block = await self._existing(number)
                    numbers[number] = None
                    self._require_free(number, first, length, block)
                    block.put_counts(first, [1] * length)
                    changed.append((number, block, first, length))
                # written run by run: the next one may push these blocks out
                written += await self._write_blocks(list(numbers))
                numbers.clear()
        except BaseException:
            for number, block, first, length in changed:
                kept = self._blocks.setdefault(number, block)
                kept.put_counts(first, [0] * length)
            raise
        return written

    def _require_free(self, number: int, first: int, length: int, block: Block) -> None:
        start = (number << self._block_bits) + first
        clusters = range(start, start + length)
        if (
            self.metadata.isdisjoint(clusters)
            and self.tables.isdisjoint(clusters)
            and not any(block.counts(first, length))
        ):
            return
        raise self.damaged(
            f"one of the {length} clusters at "
            f"{start << self._cluster_bits:#x} is in use although its refcount says it "
            "is free; run 'nbdserve image check' on it"
        )

    async def _make_blocks(self, start: int, count: int) -> None:
        """Make sure that a refcount block exists for each cluster of a run."""
        missing = [
            number
            for number, _, _ in self._split(start, count)
            if number >= len(self._table) or not self._table[number]
        ]
        if not missing:
            return
        if self._header_in_doubt:
            # or the blocks could be entered into a table that the header does not name
            await self._name_table(self._table_offset, len(self._table))
            self._header_in_doubt = False
        table = self._table
        fresh: dict[int, int] = {}
        self._place(missing, table, fresh)
        entries = max(fresh) + 1
        grown = table_start = 0
        if entries > len(table):
            grown = self._table_clusters(entries)
            table_start = self._end
            self._end += grown
            capacity = grown << self._cluster_bits - 3
            table = array("Q", self._table) + array("Q", bytes(8)) * (
                capacity - len(self._table)
            )
            for number, _, _ in self._split(table_start, grown):
                if not table[number] and number not in fresh:
                    self._place([number], table, fresh)
        counted = [(cluster, 1) for cluster in fresh.values()]
        if grown:
            counted.append((table_start, grown))
        blocks = await self._write_fresh(fresh, counted)
        if grown:
            await self._move_table(table, blocks, table_start, grown)
        else:
            await self._enter(blocks)

    def _place(
        self, missing: list[int], table: "array[int]", fresh: dict[int, int]
    ) -> None:
        """Choose clusters at the end of the file for new blocks, and for the blocks of those.

        Each is counted by itself, or by a block that is chosen earlier or exists.
        """
        left = dict.fromkeys(missing)
        while left:
            own = self._end >> self._block_bits
            if own in fresh or (own < len(table) and table[own]):
                own = next(iter(left))
            left.pop(own, None)
            if own not in fresh:
                fresh[own] = self._end
                self._end += 1

    def _table_clusters(self, entries: int) -> int:
        """Return the clusters of a table with room for `entries`, and for more later."""
        needed = -(-entries * 8 >> self._cluster_bits)
        most = max(1, MAX_REFCOUNT_TABLE_BYTES >> self._cluster_bits)
        if needed > most:
            raise OSError(
                EFBIG,
                f"{self._storage.name}: its refcount table is as large as it may be",
            )
        # half as large again, so that growing is rare
        return min(needed + (needed + 1) // 2, most)

    async def _write_fresh(
        self, fresh: dict[int, int], counted: list[tuple[int, int]]
    ) -> dict[int, Block]:
        """Write new blocks, durably, in which the runs `counted` have a reference."""
        blocks = {
            number: Block(
                cluster << self._cluster_bits,
                bytearray(self._cluster_size),
                self._order,
            )
            for number, cluster in fresh.items()
        }
        touched: list[int] = []
        for start, count in counted:
            for number, first, length in self._split(start, count):
                block = blocks.get(number) or await self._existing(number)
                for index in range(first, first + length):
                    block.set(index, 1)
                if number not in blocks:
                    touched.append(number)
        written: list[Written] = []
        for block in blocks.values():
            block.changed()
            await self._storage.write(block.host_offset, bytes(block.data))
            written.append((block.host_offset, len(block.data)))
        written += await self._write_blocks(touched)
        await self._persist(written)
        return blocks

    async def _enter(self, blocks: dict[int, Block]) -> None:
        """Enter durable new blocks into the refcount table, in the order of `_place`.

        A block is entered only after the one that counts it: a cut in between would leave it
        without a reference, for others to take. If one can't be entered, those before
        it stay: they may count blocks of which the file has words.
        """
        waiting: dict[int, Written] = {}
        for number, block in blocks.items():
            if self._counted_in(block) in waiting:
                await self._persist(list(waiting.values()))
                waiting.clear()
            word = _WORD.pack(block.host_offset)
            place = self._table_offset + 8 * number
            await self._storage.write(place, word)
            self._adopt({number: block})
            waiting[number] = place, len(word)
        await self._persist(list(waiting.values()))

    def _counted_in(self, block: Block) -> int:
        """Return the number of the block that has a block's own reference."""
        return block.host_offset >> self._cluster_bits + self._block_bits

    async def _move_table(
        self, table: "array[int]", blocks: dict[int, Block], start: int, count: int
    ) -> None:
        """Write a larger refcount table, and point the header at it."""
        for number, block in blocks.items():
            table[number] = block.host_offset
        offset = start << self._cluster_bits
        words = encode_words(table)
        await self._storage.write(offset, words)
        await self._persist([(offset, len(words))])
        self._header_in_doubt = True
        await self._name_table(offset, len(table))
        self._header_in_doubt = False
        old_start = self._table_offset >> self._cluster_bits
        old_count = len(self._table) >> self._cluster_bits - 3
        self._table = table
        self._table_offset = offset
        self._adopt(blocks)
        self.metadata.update(range(start, start + count))
        self.metadata.difference_update(range(old_start, old_start + old_count))
        await self._reuse(await self._unreserve([(old_start, old_count)]))

    async def _name_table(self, offset: int, entries: int) -> None:
        """Let the header say where the refcount table is, durably."""
        group = encode_refcount_table_group(offset, entries >> self._cluster_bits - 3)
        await self._storage.write(REFCOUNT_TABLE_GROUP_OFFSET, group)
        await self._persist([(REFCOUNT_TABLE_GROUP_OFFSET, len(group))])

    def _adopt(self, blocks: dict[int, Block]) -> None:
        for number, block in blocks.items():
            self._table[number] = block.host_offset
            self._keep(number, block)
            self.metadata.add(block.host_offset >> self._cluster_bits)

    # -- giving back

    async def _unreserve(self, runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """See `Pool`."""
        free: list[tuple[int, int]] = []
        touched: dict[int, None] = {}
        changed: list[tuple[int, Block, int, list[int]]] = []
        counted = 0
        try:
            for start, clusters in runs:
                for number, first, length in self._split(start, clusters):
                    block = await self._block(number)
                    if block is None:
                        continue
                    touched[number] = None
                    base = number << self._block_bits
                    counts = list(block.counts(first, length))
                    changed.append((number, block, first, counts))
                    # a count of 0 was wrong already: leave it to the check
                    block.put_counts(first, [max(count - 1, 0) for count in counts])
                    for index, count in enumerate(counts, first):
                        if count == 1:
                            _append(free, base + index)
                    counted += length
                    if counted > _TURN:
                        counted = 0
                        await asyncio.sleep(0)
            await self._write_blocks(list(touched))
        except BaseException:
            # all of it is tried again, or none
            for number, block, first, counts in reversed(changed):
                self._blocks.setdefault(number, block).put_counts(first, counts)
            raise
        return free

    # -- searching

    async def _old_holes(
        self, most: int, known: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """See `Pool`: each refcount block is searched once, from the start of the file."""
        found: list[tuple[int, int]] = []
        for _ in range(_SEARCH_BLOCKS):
            if self._searched >= len(self._table):
                break
            block = await self._block(self._searched)
            if block is not None:
                base = self._searched << self._block_bits
                used = bytearray(block.used()[: max(self._end - base, 0)])
                _mark_used(used, base, known)
                most -= _take_holes(used, base, most, found)
                if most <= 0:
                    # the rest of this block is looked at next time
                    break
            self._searched += 1
        return found

    async def find_end(self) -> None:
        """Move the end of what is in use behind the last cluster with a refcount."""
        self._end = max(self._end, await self._last_used() + 1)

    async def _last_used(self) -> int:
        """Return the number of the last cluster with a reference."""
        for number in range(len(self._table) - 1, -1, -1):
            if not self._table[number]:
                continue
            block = await self._block(number)
            if block is None:
                continue
            last = block.used().rfind(1)
            if last >= 0:
                return (number << self._block_bits) + last
        return 0


async def load_refcount_table(storage: Storage, header: Header) -> "array[int]":
    """Read the refcount table of an image."""
    data = bytearray(header.refcount_table_entries * 8)
    await storage.read(header.refcount_table_offset, memoryview(data))
    return decode_words(data)
