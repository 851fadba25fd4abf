"""A qcow or qcow2 image as a disk: the parts of the engine, joined."""

from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from errno import ENOTSUP, EPERM
from typing import Any, Protocol

from nbdserve.block.device import BlockDevice, Hole
from nbdserve.block.extents import Extent
from nbdserve.block.loan import Piece
from nbdserve.errors import RequestError
from nbdserve.formats.crypto.luks import SECTOR
from nbdserve.formats.mapped.allocator import Allocator
from nbdserve.formats.mapped.discard import Discarder
from nbdserve.formats.mapped.encrypted import SectorReader, SectorWriter
from nbdserve.formats.mapped.entries import BITMAP_SHIFT, NORMAL, SPLIT, WORD_MASK
from nbdserve.formats.mapped.inflate import Decompress, Inflater
from nbdserve.formats.mapped.lend import Lender
from nbdserve.formats.mapped.mapping import Mapping
from nbdserve.formats.mapped.parts import Parts, Space
from nbdserve.formats.mapped.read import Reader
from nbdserve.formats.mapped.redo import Link, Redo
from nbdserve.formats.mapped.status import block_status
from nbdserve.formats.mapped.write import Writer
from nbdserve.storage.base import Buffer


class Writes(Protocol):
    """Carries out a guest's writes."""

    def write(
        self, offset: int, data: Buffer, *, fua: bool = False
    ) -> Coroutine[Any, Any, None]:
        """See `Writer.write`."""


class Discards(Protocol):
    """Carries out a guest's zeroes and discards."""

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fua: bool
    ) -> Coroutine[Any, Any, None]:
        """See `Discarder.write_zeroes`."""

    def trim(self, offset: int, length: int, *, fua: bool) -> Coroutine[Any, Any, None]:
        """See `Discarder.trim`."""


class MappedImage(BlockDevice):
    """An open image; writable if it has a `Space`."""

    notes: list[str]

    def __init__(
        self, parts: Parts, decompress: Decompress, space: Space | None
    ) -> None:
        """Take over the storage and the backing disk, which `close` closes."""
        geometry = parts.geometry
        self.size = geometry.size
        self.read_only = space is None
        self.minimum_block = 1 if parts.cipher is None else SECTOR
        self.preferred_block = max(geometry.grain, 4096)
        self.can_trim = space is not None
        self.can_fast_zero = parts.codec.zero_entry is not None or not parts.backing
        self.notes = []
        self._parts = parts
        self._space = space
        self._mapping = Mapping(parts)
        self._inflater = Inflater(parts, decompress)
        self._reader = reader = Reader(parts, self._mapping, self._inflater)
        encrypted = parts.cipher is not None
        self._reads: Reader | SectorReader = (
            SectorReader(reader) if encrypted else reader
        )
        self._lender = Lender(parts, self._mapping, read_only=self.read_only)
        if space is not None:
            commit = space.commit
            commit.on_release(space.pool.release)
            parts.tables.on_damage = space.pool.on_damage = commit.damage
            self._allocator = Allocator(parts, self._mapping, self._reader, space)
            self._writer = Writer(parts, self._mapping, self._allocator, commit)
            self._discarder = Discarder(
                parts, self._mapping, self._allocator, self._writer, commit
            )
            # what carries out a guest's changes; a format may put something in front
            self._carriers: tuple[Writes, Discards] = self._writer, self._discarder
            if encrypted:
                sectors = SectorWriter(reader, self._writer, self._discarder)
                self._carriers = sectors, sectors
            self._writes: Writes
            self._discards: Discards
            self._writes, self._discards = self._carriers

    # Handing the coroutine on instead of awaiting it saves a frame on the hot path.

    def read_into(
        self, offset: int, buffer: memoryview
    ) -> Coroutine[Any, Any, Sequence[Hole]]:
        """See `BlockDevice.read_into`."""
        if offset < 0 or offset + len(buffer) > self.size:
            self.require_range(offset, len(buffer))
        return self._reads.read_into(offset, buffer)

    def lend(self, offset: int, length: int) -> Sequence[Piece] | None:
        """See `BlockDevice.lend`."""
        if offset + length > self.size:
            return None
        return self._lender.lend(offset, length)

    def write(
        self, offset: int, data: Buffer, *, fua: bool = False
    ) -> Coroutine[Any, Any, None]:
        """See `BlockDevice.write`."""
        self._require_space()
        if offset < 0 or offset + len(data) > self.size:
            self.require_range(offset, len(data))
        return self._writes.write(offset, data, fua=fua)

    def place(self, offset: int, length: int) -> Piece | None:
        """See `BlockDevice.place`."""
        if self._space is None or self._writes is not self._writer:
            return None
        if offset + length > self.size:
            return None
        return self._writer.place(offset, length)

    async def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        may_unmap: bool = True,
        fast_only: bool = False,
        fua: bool = False,
    ) -> None:
        """See `BlockDevice.write_zeroes`."""
        self._require_space()
        self.require_range(offset, length)
        if fast_only and not (self.can_fast_zero and may_unmap):
            raise RequestError(ENOTSUP, "zeroing this would be as slow as a write")
        await self._discards.write_zeroes(offset, length, may_unmap=may_unmap, fua=fua)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """See `BlockDevice.trim`."""
        self._require_space()
        self.require_range(offset, length)
        await self._discards.trim(offset, length, fua=fua)

    async def flush(self) -> None:
        """See `BlockDevice.flush`."""
        if self._space is not None:
            await self._space.commit.flush()

    async def cache(self, offset: int, length: int) -> None:
        """See `BlockDevice.cache`: tables and host clusters are fetched."""
        end = min(offset + length, self.size)
        while offset < end:
            run = await self._mapping.run(offset, end)
            if run.kind >= NORMAL:
                await self._parts.data.prefetch(run.host_offset, run.length)
            offset += run.length

    async def block_status(
        self, offset: int, length: int, *, max_extents: int = 1 << 20
    ) -> list[Extent]:
        """See `BlockDevice.block_status`."""
        self.require_range(offset, length)
        parts, holes = self._parts, None
        # a hole of an encrypted image reads as noise
        if parts.cipher is None and parts.data.is_sparse(parts.geometry.cluster_size):
            holes = parts.data
        return await block_status(
            self._mapping, parts, offset, length, max_extents, holes
        )

    def hosts(self, links: list[Link]) -> list[int]:
        """Return the host offset of each plain cluster that links bring in.

        Where only subclusters are others, it is there already. A data file has no
        clusters that somebody else could name.
        """
        if self._parts.external:
            return []
        named = [
            (self._host(link.entry_in_file), self._host(link.entry)) for link in links
        ]
        return [new for old, new in named if new not in (None, old)]

    def _host(self, entry: int) -> int | None:
        """Return the host offset of the plain cluster that an entry names, if it does."""
        codec = self._parts.codec
        word = entry & WORD_MASK
        kind = codec.classify(word, entry >> BITMAP_SHIFT)
        return word & codec.l2_offset_mask if kind in (NORMAL, SPLIT) else None

    async def replay(self, links: list[Link], unnamed: set[int] | None = None) -> int:
        """Link what a killed server had acknowledged and not linked yet.

        Args:
            links: At most one for each guest cluster.
            unnamed: Host offsets of the clusters that nothing names, which loses
                those that are linked; None if that is known of all of them.

        Returns:
            How many links were still missing.
        """
        missing = 0
        for link in links:
            hosts = self.hosts([link])
            if unnamed is not None:
                if not unnamed.issuperset(hosts):
                    continue
                unnamed.difference_update(hosts)
            missing += await self._allocator.relink(*link)
        await self.flush()
        return missing

    async def resize(self, size: int, *, shrink: bool = False) -> None:
        """Refuse: qcow version 1 can't be resized by qemu either."""
        raise RequestError(
            ENOTSUP,
            f"{self._parts.storage.name}: qcow version 1 images can't be resized;"
            " convert it to qcow2",
        )

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[Space]:
        """Have the mapping alone: nothing of it changes, and the file is what memory says.

        Reads go on. Writes wait, those in place too, since no cluster counts as the
        disk's own: who owns what is looked up again afterwards.

        Raises:
            RequestError: The image is open read-only.
            OSError: What came before could not be made durable.
        """
        space = self._require_space()
        tables = self._parts.tables
        async with self._parts.gate.alone():
            await space.prepare()
            await space.commit.settle()
            tables.forget_owners()
            await self._parts.pins.drained()
            try:
                yield space
            finally:
                tables.forget_owners()

    @property
    def backing(self) -> BlockDevice | None:
        """The disk below, if there is one."""
        return self._parts.backing

    @property
    def broken(self) -> str | None:
        """See `BlockDevice.broken`."""
        error = None if self._space is None else self._space.commit.failed
        return None if error is None else f"an earlier sync failed ({error})"

    @property
    def recent_pause_s(self) -> float:
        """The same as `longest_pause_s`, since it was last set to 0."""
        return self._parts.gate.recent_s

    @recent_pause_s.setter
    def recent_pause_s(self, value_s: float) -> None:
        self._parts.gate.recent_s = value_s

    @property
    def longest_pause_s(self) -> float:
        """How long writers have had to wait for the longest `exclusive`."""
        return self._parts.gate.longest_s

    def use_redo(self, redo: Redo) -> None:
        """Log acknowledged links of copying writes from now on."""
        if self._space is not None:
            self._space.commit.redo = redo

    async def settle(self) -> None:
        """Commit and give back what is reserved; nothing may be written after that."""
        if self._space is not None:
            await self._close_space(self._space)

    async def close(self) -> None:
        """See `BlockDevice.close`."""
        try:
            await self.settle()
        finally:
            await self._parts.storage.close()
            await self._parts.data.close()
            if self._parts.backing is not None:
                await self._parts.backing.close()

    async def _close_space(self, space: Space) -> None:
        clean = False
        try:
            await space.commit.close()
            # what the redo log says is in the image now
            clean = True
            await space.pool.close()
        finally:
            if space.commit.redo is not None:
                space.commit.redo.close(remove=clean)

    def _require_space(self) -> Space:
        if self._space is None:
            raise RequestError(EPERM, f"{self._parts.storage.name} is open read-only")
        return self._space
