"""A raw image: the disk's bytes are the file's bytes.

Holes are what the file system says they are. A size that is no multiple of a sector
is served to the byte.
"""

import errno
import os
from collections.abc import Callable, Sequence

from nbdserve.block.device import BlockDevice, Hole
from nbdserve.block.extents import Extent
from nbdserve.block.loan import Piece
from nbdserve.block.zeros import clear, zeros
from nbdserve.errors import ConfigError, RequestError
from nbdserve.formats.preallocation import write_zeros
from nbdserve.storage.base import Storage

#: Reads from this size on ask whether they begin with a hole. A system call of 0.3 us
#: then saves copying 64 KiB (2.2 us), and sending it.
HOLE_QUERY_MIN = 64 << 10
#: Shorter holes are sent as the zeros that they are.
HOLE_MIN = 32 << 10


class RawImage(BlockDevice):
    """A raw disk over any storage, which it owns and closes."""

    def __init__(
        self, storage: Storage, *, read_only: bool = False, writethrough: bool = False
    ) -> None:
        """Serve `storage`.

        Args:
            storage: Where the bytes are.
            read_only: Whether to refuse changes; implied by a read-only storage.
            writethrough: Whether every change is durable on return.
        """
        self.size = storage.size
        self.read_only = read_only or storage.read_only
        self.preferred_block = 4096
        self.can_trim = not self.read_only
        # Block devices may write the zeros out one by one.
        self.can_fast_zero = not self.read_only and not storage.fixed_size
        self._storage = storage
        self._writethrough = writethrough
        self._sync_failed = False

    async def read_into(self, offset: int, buffer: memoryview) -> Sequence[Hole]:
        """Fill `buffer`; report a hole only where a large read begins with one."""
        if offset < 0 or offset + len(buffer) > self.size:
            self.require_range(offset, len(buffer))
        if len(buffer) >= HOLE_QUERY_MIN:
            hole = self._storage.hole_at(offset, len(buffer))
            if hole >= HOLE_MIN:
                clear(buffer[:hole])
                await self._read(offset + hole, buffer[hole:])
                return ((0, hole),)
        if not self._storage.try_read(offset, buffer):
            await self._storage.read(offset, buffer)
        return ()

    def lend(self, offset: int, length: int) -> Sequence[Piece] | None:
        """Lend the file's own pages: what is written there is the guest's."""
        if offset + length > self.size or not self._storage.is_cached(offset, length):
            return None
        return [(self._storage, offset, length)]

    def place(self, offset: int, length: int) -> Piece | None:
        """Say the file itself, as long as writing to it is quick."""
        unfit = self.read_only or self._sync_failed or self._writethrough
        past = offset + length > self.size
        if unfit or past or not self._storage.takes_pipes():
            return None
        return self._storage, offset, length

    async def _read(self, offset: int, buffer: memoryview) -> None:
        if buffer and not self._storage.try_read(offset, buffer):
            await self._storage.read(offset, buffer)

    async def write(
        self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False
    ) -> None:
        """Write to the page cache, or through it."""
        self._require_writable()
        if offset < 0 or offset + len(data) > self.size:
            self.require_range(offset, len(data))
        if not self._storage.try_write(offset, data):
            await self._storage.write(offset, data)
        if fua or self._writethrough:
            # Once more and durably: RWF_DSYNC syncs this range only, fdatasync the
            # whole file. The first write has found the space, so that an ENOSPC is
            # not taken for a failed sync, which ends all writing. It costs a copy.
            try:
                await self._storage.write(offset, data, durable=True)
            except OSError:
                self._sync_failed = True
                raise
            self._require_synced()

    async def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        may_unmap: bool = True,
        fast_only: bool = False,
        fua: bool = False,
    ) -> None:
        """Punch or zero by the file system, else write zeros unless `fast_only`."""
        self._require_writable()
        self.require_range(offset, length)
        if not await self._zero_quickly(
            offset, length, may_unmap=may_unmap, fast_only=fast_only
        ):
            if fast_only:
                raise RequestError(
                    errno.ENOTSUP, f"{self._storage.name}: no quick way to write zeros"
                )
            await self._write_zeros(offset, length)
        if fua or self._writethrough:
            await self.flush()

    async def _zero_quickly(
        self, offset: int, length: int, *, may_unmap: bool, fast_only: bool
    ) -> bool:
        # Without discard, a block device's driver writes the zeros: not quick.
        if fast_only and self._storage.fixed_size:
            return False
        for unmap in (True, False) if may_unmap else (False,):
            try:
                await self._storage.zero(offset, length, unmap=unmap)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
            else:
                return True
        return False

    async def _write_zeros(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            piece = zeros(offset, end)
            # In a thread even where writing is quick: there may be 4 GiB to come.
            await self._storage.write(offset, piece)
            offset += len(piece)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Punch a hole where the file system can; it reads as zeros then."""
        self._require_writable()
        self.require_range(offset, length)
        try:
            await self._storage.punch(offset, length)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
        if fua or self._writethrough:
            await self.flush()

    async def flush(self) -> None:
        """Make every completed change durable."""
        self._require_synced()
        if self.read_only:
            return
        try:
            await self._storage.flush()
        except OSError:
            self._sync_failed = True
            raise
        # Another sync may have got the error, which the kernel reports only once.
        self._require_synced()

    async def cache(self, offset: int, length: int) -> None:
        """Read ahead into the page cache."""
        await self._storage.prefetch(offset, length)

    async def block_status(
        self, offset: int, length: int, *, max_extents: int = 1 << 20
    ) -> list[Extent]:
        """Tell data from holes as the file system does."""
        self.require_range(offset, length)
        result: list[Extent] = []
        position = offset
        for piece, is_data in await self._storage.extents(
            offset, length, max_extents=max_extents
        ):
            result.append(
                Extent(piece, data=is_data, zero=not is_data, offset=position)
            )
            position += piece
        return result

    @property
    def broken(self) -> str | None:
        """See `BlockDevice.broken`."""
        return "an earlier sync failed" if self._sync_failed else None

    async def resize(self, size: int, *, shrink: bool = False) -> None:
        """See `BlockDevice.resize`; the size is exact to the byte."""
        self._require_writable()
        if self._storage.fixed_size:
            raise RequestError(
                errno.ENOTSUP,
                f"{self._storage.name}: a block device has the size of its device",
            )
        if size < self.size and not shrink:
            raise ConfigError(
                f"{self._storage.name}: has {self.size} bytes, so {size} would lose what"
                " lies behind: say --shrink if you mean it"
            )
        await self._storage.truncate(size)
        self.size = size
        await self.flush()

    async def preallocate(
        self, offset: int, end: int, mode: str, progress: Callable[[int], None]
    ) -> None:
        """See `BlockDevice.preallocate`."""
        self._require_writable()
        if mode == "metadata":
            raise ConfigError(
                "preallocation metadata is for qcow2: raw has no metadata"
            )
        if mode == "falloc" and end > offset:
            await self._storage.allocate(offset, end - offset)
        elif mode == "full":
            await write_zeros(self, offset, end, progress)
        await self.flush()

    async def close(self) -> None:
        """Flush if that can still succeed, and close the storage."""
        try:
            if not self._sync_failed:
                await self.flush()
        finally:
            await self._storage.close()

    def _require_writable(self) -> None:
        if self.read_only:
            raise RequestError(errno.EPERM, f"{self._storage.name}: is read-only")
        if self._sync_failed:
            self._require_synced()

    def _require_synced(self) -> None:
        """Refuse to go on after a failed sync: nobody knows what was lost."""
        if self._sync_failed:
            raise OSError(
                errno.EIO,
                f"{os.strerror(errno.EIO)}: an earlier sync failed",
                self._storage.name,
            )
