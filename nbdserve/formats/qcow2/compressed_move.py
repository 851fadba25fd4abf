"""Moving compressed clusters to another place in the file, packed side by side.

Nobody writes to compressed data in place, so it is enough to keep those out who would
replace it. Several entries name one host cluster, which counts each of them:

    copy, references of the new clusters -> barrier -> words (held) -> barrier ->
    the old clusters lose a reference for each entry

*Crash: each entry has the old place or the new one, both complete; leaks.*
"""

from array import array
from dataclasses import dataclass
from typing import Final

from nbdserve.errors import ImageError
from nbdserve.formats.mapped.allocator import Allocator
from nbdserve.formats.mapped.commit import Committer
from nbdserve.formats.mapped.entries import COMPRESSED
from nbdserve.formats.mapped.inflate import Inflater
from nbdserve.formats.mapped.mapping import Mapping
from nbdserve.formats.mapped.parts import Parts
from nbdserve.formats.mapped.pool import Grant
from nbdserve.formats.mapped.tables import Table
from nbdserve.formats.qcow2.cluster_counts import ClusterCounts
from nbdserve.formats.qcow2.entries import COMPRESSED_FLAG
from nbdserve.formats.qcow2.refcounts import RefcountedPool

#: Compressed data are stored in units of sectors (docs/interop/qcow2.rst).
_SECTOR: Final = 512


def compressed_word(host_offset: int, length: int, cluster_bits: int) -> int:
    """Return the L2 entry of compressed data, `length` bytes at `host_offset`."""
    last = host_offset + length - 1
    # sectors that it touches, besides the first one
    sectors = last // _SECTOR - host_offset // _SECTOR
    return COMPRESSED_FLAG | sectors << 62 - (cluster_bits - 8) | host_offset


@dataclass(slots=True)
class _Blob:
    """The compressed data of one cluster, and where they are to lie.

    Attributes:
        table: The L2 table.
        index: The entry there.
        guest_cluster: Its number.
        old: Host offset and length in bytes.
        new: The same.
    """

    table: Table
    index: int
    guest_cluster: int
    old: tuple[int, int]
    new: tuple[int, int]


class CompressedMover:
    """Moves compressed clusters of one image."""

    def __init__(
        self,
        parts: Parts,
        pool: RefcountedPool,
        commit: Committer,
        mapping: Mapping,
        allocator: Allocator,
        inflater: Inflater,
    ) -> None:
        """Join the parts."""
        self._parts = parts
        self._pool = pool
        self._commit = commit
        self._mapping = mapping
        self._allocator = allocator
        self._inflater = inflater
        self._bits = parts.geometry.cluster_bits

    async def move(self, blobs: list[tuple[int, int]], grant: Grant) -> bool:
        """Move the first of `blobs`, as many as fit, and take them off the list.

        Args:
            blobs: Host offsets where compressed data are expected, and guest clusters.
            grant: Clusters to move them to; what is not used of them is given back.

        Returns:
            Whether any was moved; those that have changed since are left alone.

        Raises:
            OSError: They can't be read or written; they stay where they are.
        """
        gate = self._parts.gate
        if gate.closed:
            await gate.opened()
        gate.enter()
        chosen: list[_Blob] = []
        try:
            await self._choose(blobs, grant, chosen)
            return await self._move(chosen, grant)
        finally:
            for blob in chosen:
                blob.table.users -= 1
                self._allocator.busy.leave(blob.guest_cluster)
            gate.leave()

    async def _choose(
        self, blobs: list[tuple[int, int]], grant: Grant, chosen: list[_Blob]
    ) -> None:
        """Keep writers out of the first blobs that fit into the grant."""
        self._commit.check_writable()
        l2_bits = self._parts.geometry.l2_bits
        position, end = grant.host_offset, grant.host_offset
        end += grant.clusters << self._bits
        while blobs:
            host_offset, guest_cluster = blobs[0]
            table = await self._allocator.table_for_change(guest_cluster >> l2_bits)
            index = guest_cluster & (1 << l2_bits) - 1
            if (
                guest_cluster in self._allocator.busy
                or self._mapping.kind(table, index) != COMPRESSED
                or self._commit.holds(table, index)
            ):
                del blobs[0]
                continue
            old = self._parts.codec.compressed_extent(table.words[index])
            if old[0] != host_offset or old[1] > grant.clusters << self._bits:
                del blobs[0]
                continue
            if position + old[1] > end:
                return
            del blobs[0]
            self._allocator.busy.enter(guest_cluster)
            table.users += 1
            new = position, old[1]
            chosen.append(_Blob(table, index, guest_cluster, old, new))
            position = -(-(position + old[1]) // _SECTOR) * _SECTOR

    async def _move(self, chosen: list[_Blob], grant: Grant) -> bool:
        shared = False
        linked = 0
        try:
            used = await self._copy(chosen, grant)
            more = self._references(chosen)
            if not await self._has_room(more):
                self._free(grant, 0)
                return False
            await self._pool.share(more)
            shared = True
            self._free(grant, used)
            for blob in chosen:
                await self._link(blob)
                linked += 1
        except BaseException:
            if shared:
                for blob in chosen[linked:]:
                    self._commit.free(*blob.new)
            else:
                self._free(grant, 0)
            raise
        return bool(chosen)

    def _free(self, grant: Grant, used: int) -> None:
        """Free the clusters of a grant behind the first `used`."""
        rest = grant.clusters - used
        if rest:
            start = grant.host_offset + (used << self._bits)
            self._commit.free(start, rest << self._bits)

    async def _has_room(self, more: ClusterCounts) -> bool:
        try:
            await self._pool.require_room(more)
        except ImageError:
            return False  # refcounts of few bits can't count so many: they stay
        return True

    async def _copy(self, chosen: list[_Blob], grant: Grant) -> int:
        """Write all of them to the new place; return how many clusters that takes."""
        if not chosen:
            return 0
        last, length = chosen[-1].new
        data = memoryview(bytearray(last + length - grant.host_offset))
        for blob in chosen:
            start = blob.new[0] - grant.host_offset
            await self._parts.storage.read(
                blob.old[0], data[start : start + blob.new[1]]
            )
        await self._parts.storage.put(grant.host_offset, data)
        return len(data) + (1 << self._bits) - 1 >> self._bits

    def _references(self, chosen: list[_Blob]) -> ClusterCounts:
        """Return the references that the clusters need besides the one they have."""
        uses: dict[int, int] = {}
        for blob in chosen:
            host_offset, length = blob.new
            first, last = (
                host_offset >> self._bits,
                host_offset + length - 1 >> self._bits,
            )
            for cluster in range(first, last + 1):
                uses[cluster] = uses.get(cluster, 0) + 1
        more = ClusterCounts()
        for cluster, count in uses.items():
            if count > 1:
                more.add(cluster, 1, count - 1)
        return more

    async def _link(self, blob: _Blob) -> None:
        word = compressed_word(*blob.new, self._bits)
        # other data may have had the same place and length once
        self._inflater.forget(word)
        await self._commit.change(
            blob.table, blob.index, array("Q", [word]), COMPRESSED, hold=True
        )
        self._commit.free(*blob.old)
