"""Zeros in an external data file, where each cluster has its place for ever.

If the file has to be a raw image by itself (bit 1 of the autoclear features,
docs/interop/qcow2.rst), zeros are written there and the mapping stays. Otherwise a cluster
leaves the mapping like any other; its storage is given back once no durable entry
names it, unless it has been written again by then.
"""

from errno import EOPNOTSUPP
from itertools import takewhile
from typing import Final

from nbdserve.block.zeros import zeros
from nbdserve.formats.mapped.allocator import Allocator
from nbdserve.formats.mapped.commit import Committer, Freed
from nbdserve.formats.mapped.entries import (
    NORMAL,
    OWNED,
    UNALLOCATED,
    ZERO,
    ZERO_ALLOCATED,
)
from nbdserve.formats.mapped.mapping import Mapping
from nbdserve.formats.mapped.parts import Parts
from nbdserve.formats.mapped.write import Writer

#: Clusters given back by one call: those that write to one of them wait meanwhile.
_MOST: Final = 1 << 10


class ExternalZeros:
    """Zeroes and gives back ranges of one image's data file."""

    def __init__(
        self,
        parts: Parts,
        mapping: Mapping,
        allocator: Allocator,
        writer: Writer,
        commit: Committer,
    ) -> None:
        """Join the parts."""
        self._data = parts.data
        # zeros in the file would be noise to the guest
        self._encrypted = parts.cipher is not None
        self._geometry = parts.geometry
        self._pins = parts.pins
        self._mapping = mapping
        self._allocator = allocator
        self._writer = writer
        if parts.external:
            commit.on_vacated(self.clear)

    async def zero_in_place(self, offset: int, end: int, *, unmap: bool) -> None:
        """Make a range of the file read as zeros, and whatever is mapped there with it."""
        while offset < end:
            run = await self._mapping.run(offset, end)
            if run.kind == NORMAL:
                await self._allocator.claim(offset)
                continue
            length = run.length
            if run.kind not in (OWNED, UNALLOCATED, ZERO, ZERO_ALLOCATED):
                # its link is not in the file yet, or it is not valid
                length = min(length, self._geometry.cluster_size)
                length = await self._write_zeros(offset, length)
            elif not await self._zero(offset, length, unmap=unmap):
                length = await self._write_zeros(offset, length)
            offset += length

    async def _write_zeros(self, offset: int, length: int) -> int:
        """Write some of that many zeros; return how many."""
        piece = zeros(offset, offset + length)
        await self._writer.write(offset, piece)
        return len(piece)

    async def _zero(self, offset: int, length: int, *, unmap: bool) -> bool:
        """Zero a range of the file; False if there is no quick way."""
        if self._encrypted:
            return False
        length = min(length, max(self._data.size - offset, 0))
        if not length:
            return True
        generation = self._pins.enter()
        try:
            await self._data.zero(offset, length, unmap=unmap)
        except OSError as error:
            if error.errno != EOPNOTSUPP:
                raise
            return False
        finally:
            self._pins.leave(generation)
        return True

    async def clear(self, vacated: list[Freed]) -> None:
        """Step C of a commit: give back what is not in use again."""
        bits, busy = self._geometry.cluster_bits, self._allocator.busy
        for start, length in vacated:
            offset, end = start, min(start + length, self._geometry.size)
            while offset < end:
                run = await self._mapping.run(offset, end)
                # from here to the first await of `_punch` nothing else runs
                first, stop = offset >> bits, offset + run.length
                whole = (self._geometry.align_up(stop) if stop == end else stop) >> bits
                last = max(whole, first + 1)
                if run.kind in (UNALLOCATED, ZERO):
                    last = min(last, first + _MOST)
                    free = takewhile(lambda each: each not in busy, range(first, whole))
                    last = max(first + await self._punch([*free][:_MOST]), first + 1)
                offset = last << bits

    async def _punch(self, clusters: list[int]) -> int:
        """Give clusters back that no entry names, in a row; return how many they were."""
        if not clusters:
            return 0
        bits, busy = self._geometry.cluster_bits, self._allocator.busy
        for each in clusters:
            busy.enter(each)
        try:
            await self._data.punch(clusters[0] << bits, len(clusters) << bits)
        except OSError as error:
            # a file that can't have holes stays as large as it was
            if error.errno != EOPNOTSUPP:
                raise
        finally:
            for each in clusters:
                busy.leave(each)
        return len(clusters)
