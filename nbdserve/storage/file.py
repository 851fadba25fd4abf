"""Regular files and block devices: where the bytes of almost every image are.

Reads go through `preadv2(RWF_NOWAIT)`: 0.5 us for 4 KiB that are cached, and an
EAGAIN instead of a wait where they are not: then io_uring reads (see `uring`). Writes
are buffered and run on the loop while they are quick (see `pace`). Everything else that
may wait for a device runs in a thread.
"""

import asyncio
import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable
from time import perf_counter
from typing import Any, TypeVar, TypeVarTuple

from nbdserve.storage import locks, mapped, uring
from nbdserve.storage.base import Buffer, Storage
from nbdserve.storage.descriptors import open_descriptor
from nbdserve.storage.executor import Call, run
from nbdserve.storage.folios import SLOW_S, SMALL, Folios
from nbdserve.storage.lent import Lent, can_recall
from nbdserve.storage.names import shown
from nbdserve.storage.pace import STALL_S, Pace
from nbdserve.storage.residency import Residency

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

#: Larger transfers go to a thread: copying 4 MiB takes about 1 ms, in which
#: no other connection is served.
INLINE_LIMIT = 4 << 20

#: After so many misses in a row reads are no longer tried on the loop first. A try that
#: misses already starts the transfer, one at a time (45 us with a virtual drive, which has to
#: be told each time); what io_uring takes starts together. It tells what was cached
#: after all: up to so many in a row, and reads are tried again.
MISSES_SEEN = 8

#: Larger punches go to a thread: freeing 64 KiB on ext4 takes 0.13 ms, 1 MiB 0.6 ms.
INLINE_ZERO_LIMIT = 1 << 20

#: After this many lseek calls (0.4 us each) `extents` lets others run.
SEEKS_PER_TURN = 256

#: How often an extent is looked at that another thread punches and writes meanwhile.
_LOOKS = 8

#: A kernel reads from a device in pieces of about 1 MiB at most, or 128 KiB when it reads
#: ahead: looking at the last byte of so many, 0.5 us each, tells whether any is under way.
_TRANSFER = 256 << 10

#: linux/falloc.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

#: linux/fs.h; the size of a logical sector of a block device.
BLKSSZGET = 0x1268

_NO_QUICK_WAY = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV})

_libc = ctypes.CDLL(None, use_errno=True)
_libc_fallocate = (
    _libc.fallocate64 if hasattr(_libc, "fallocate64") else _libc.fallocate
)
_libc_fallocate.argtypes = [
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_int64,
]
_libc_fallocate.restype = ctypes.c_int


class FileStorage(Storage):
    """A regular file or block device.

    Reads, writes and closing may be called while others are under way. A descriptor
    is not closed before the last call has finished with it: its number might
    already be another file's.

    Attributes:
        path: As it was given.
        identity: Device and inode number, which tell whether two names are one file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        lock: bool = True,
    ) -> None:
        """Open an existing file.

        Args:
            path: A regular file or block device, by any name.
            read_only: Whether to refuse changes.
            lock: Whether to take the locks that exclude other writers, and fail if
                another process holds them. Without, what is read may change meanwhile.

        Raises:
            ConfigError: There is no such file, it is something else, or no permission.
            ImageInUseError: Another process has it open in a way that excludes ours.
        """
        flags = os.O_RDONLY if read_only else os.O_RDWR
        self.path = path
        self.name = shown(path)
        self.read_only = read_only
        fd = open_descriptor(path, flags)
        try:
            status = os.fstat(fd)
            if lock:
                locks.take(fd, self.name, write=not read_only)
            self.identity = (status.st_dev, status.st_ino)
            self.fixed_size = stat.S_ISBLK(status.st_mode)
            self.zeroes_on_extend = not self.fixed_size
            # A block device has no st_size.
            self._size = os.lseek(fd, 0, os.SEEK_END)
            self._sector = _logical_sector(fd) if self.fixed_size else 1
            self._can_nowait = _supports_nowait(fd)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self._read_pace = Pace()
        self._write_pace = Pace()
        self._zero_pace = Pace()
        self._misses = 0  # of the page cache, less the hits that io_uring tells of
        self._in_threads: set[Call[Any]] = set()
        self._in_ring = 0
        self._ring_left: asyncio.Future[None] | None = None  # when closing waits for it
        self._refused_modes: set[int] = set()
        self._can_map = self._can_splice = True
        self._residency = Residency()
        self._lent = Lent(self.identity)
        self._folios = Folios(self._residency)

    @property
    def size(self) -> int:
        """The length in bytes, as far as we changed it ourselves."""
        return self._size

    # ---------------------------------------------------------------- reading

    def try_read(  # noqa: PLR0911 -- the hot path
        self, offset: int, view: memoryview
    ) -> bool:
        """Fill `view` from the page cache, or say False."""
        wanted = len(view)
        if wanted > INLINE_LIMIT:
            return False
        if not self._can_nowait:
            return self._try_read_timed(offset, view)
        misses = self._misses
        if misses > MISSES_SEEN and self._skip_probe(wanted):
            return False
        try:
            count = os.preadv(self._fd, (view,), offset, os.RWF_NOWAIT)
        except BlockingIOError:
            self._misses += 1
            return False
        if misses:
            self._misses = 0
        if count == wanted:
            return True
        # Either the end of the file, or the end of what is cached.
        if offset + count < self._size:
            return False
        view[count:] = bytes(wanted - count)
        return True

    @staticmethod
    def _skip_probe(wanted: int) -> bool:
        """Tell whether to leave a read that will miss the cache to io_uring at once."""
        return wanted <= uring.LIMIT and uring.available()

    def _count_miss(self, *, cached: bool) -> None:
        """Note whether a read had to wait that io_uring did."""
        if not cached:
            self._misses = min(self._misses + 1, 2 * MISSES_SEEN)
        elif self._misses:
            self._misses -= 1

    def _try_read_timed(self, offset: int, view: memoryview) -> bool:
        """Read where RWF_NOWAIT is unknown: tmpfs is always quick, FUSE is not."""
        start_s = perf_counter()
        if start_s < self._read_pace.resume_at_s:
            return False
        _pread_all(self._fd, offset, view)
        end_s = perf_counter()
        if end_s - start_s > STALL_S:
            self._read_pace.stalled(start_s, end_s)
        return True

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill `view`: short ones by io_uring where there is one, others in a thread."""
        done = 0
        if self._can_nowait and 0 < len(view) <= uring.LIMIT:
            ring = uring.ring(asyncio.get_running_loop())
            if ring is not None and not ring.busy:
                call = ring.read(self._require_open(), offset, view)
                self._in_ring += 1
                try:
                    done = max(0, await call)
                    self._count_miss(cached=call.cached)
                finally:
                    self._in_ring -= 1
                    if self._ring_left is not None and not self._in_ring:
                        self._ring_left.set_result(None)
        if done < len(view):  # all of it, the end of the file, or an error to be raised
            await self._in_thread(_pread_all, self._fd, offset + done, view[done:])

    def is_cached(self, offset: int, length: int) -> bool:
        """Ask the kernel; block devices and what lies past the end are not lent.

        Pages count as cached while the kernel still reads ahead into them, and sending those
        was seen to wait for 37 ms. A read of a byte that must not wait tells them.
        """
        end = offset + length
        if (
            self.fixed_size
            or end > self._size
            or not self._residency.is_cached(self._fd, offset, length)
        ):
            return False
        if self._can_nowait:
            last = bytearray(1)
            try:
                for stop in range(end, offset, -_TRANSFER):
                    os.preadv(self._fd, (last,), stop - 1, os.RWF_NOWAIT)
            except BlockingIOError:
                return False
        return True

    def send(self, socket_fd: int, offset: int, length: int) -> int:
        """Hand cached bytes to a socket by sendfile."""
        self._lent.add(offset, length)
        return os.sendfile(socket_fd, self._fd, offset, length)

    def lent(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Return what this process has sent of that file, ever."""
        return self._lent.within(offset, length)

    async def recall(self, offset: int, length: int) -> None:
        """Ask by posix_fadvise, which leaves pages that somebody refers to."""
        await self._in_thread(
            os.posix_fadvise, self._fd, offset, length, os.POSIX_FADV_DONTNEED
        )
        if not self.any_cached(offset, length):
            self._lent.settle(offset)

    def any_cached(self, offset: int, length: int) -> bool:
        """Ask the kernel."""
        return self._residency.pages_cached(self._fd, offset, length) != 0

    @property
    def can_recall(self) -> bool:
        """Whether the file is on a disk, and not in the page cache alone."""
        return can_recall(self._fd)

    def read_now(self, offset: int, view: memoryview) -> None:
        """Fill `view` on the loop."""
        _pread_all(self._fd, offset, view)

    # ---------------------------------------------------------------- writing

    def try_write(self, offset: int, data: Buffer) -> bool:
        """Write to the page cache if that has been quick lately, or say False."""
        length = len(data)
        start_s = perf_counter()
        if length > INLINE_LIMIT or start_s < self._write_pace.resume_at_s:
            return False
        if self._folios.wanted and length <= SMALL:
            self._folios.split(self._fd, offset)
        count = os.pwrite(self._fd, data, offset)
        if count != length:
            _pwrite_all(self._fd, offset + count, memoryview(data)[count:], 0)
        self._size = max(self._size, offset + length)
        end_s = perf_counter()
        if end_s - start_s > SLOW_S:
            if end_s - start_s > STALL_S:
                self._write_pace.stalled(start_s, end_s)
            elif length <= SMALL:
                self._folios.slow(offset, end_s)
        return True

    def takes_pipes(self) -> bool:
        """Regular files do, while writing is quick."""
        return (
            not self.fixed_size
            and not self.read_only
            and perf_counter() >= self._write_pace.resume_at_s
        )

    def write_piped(self, offset: int, pipe_fd: int, length: int) -> None:
        """Write by splice(2), which copies from the pages in the pipe to the page cache."""
        start_s = perf_counter()
        done = 0
        while done < length:
            done += self._splice(pipe_fd, offset + done, length - done)
        self._size = max(self._size, offset + length)
        end_s = perf_counter()
        if end_s - start_s > STALL_S:
            self._write_pace.stalled(start_s, end_s)

    def _splice(self, pipe_fd: int, offset: int, length: int) -> int:
        """Write some of what is in a pipe; return how many bytes."""
        if self._can_splice:
            try:
                count = os.splice(pipe_fd, self._fd, length, offset_dst=offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._can_splice = False  # not on this file system: nothing was taken
            else:
                if not count:
                    raise OSError(errno.EIO, "the kernel wrote nothing")
                return count
        data = os.read(pipe_fd, length)
        _pwrite_all(self._fd, offset, memoryview(data), 0)
        return len(data)

    async def write(self, offset: int, data: Buffer, *, durable: bool = False) -> None:
        """Write all of `data` in a thread."""
        flags = os.RWF_DSYNC if durable else 0
        await self._in_thread(_pwrite_all, self._fd, offset, memoryview(data), flags)
        self._size = max(self._size, offset + len(data))

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make a range read as zeros by fallocate."""
        if length <= 0:
            return
        # The kernel refuses ranges that are not whole sectors of a block device.
        start = -(-offset // self._sector) * self._sector
        end = (offset + length) // self._sector * self._sector
        if start >= end:
            await self.write(offset, bytes(length))
            return
        mode = FALLOC_FL_PUNCH_HOLE if unmap else FALLOC_FL_ZERO_RANGE
        await self._fallocate(mode | FALLOC_FL_KEEP_SIZE, start, end - start)
        if start > offset:
            await self.write(offset, bytes(start - offset))
        if offset + length > end:
            await self.write(end, bytes(offset + length - end))

    async def _fallocate(self, mode: int, offset: int, length: int) -> None:
        if mode in self._refused_modes:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), self.name)
        try:
            start_s = perf_counter()
            if length > INLINE_ZERO_LIMIT or start_s < self._zero_pace.resume_at_s:
                await self._in_thread(_fallocate, self._fd, mode, offset, length)
                return
            _fallocate(self._fd, mode, offset, length)
            end_s = perf_counter()
            if end_s - start_s > STALL_S:
                self._zero_pace.stalled(start_s, end_s)
        except OSError as error:
            if error.errno in _NO_QUICK_WAY:
                self._refused_modes.add(mode)
                error.errno = errno.EOPNOTSUPP
            raise

    async def truncate(self, size: int) -> None:
        """Set the length; only making it shorter takes long enough for a thread."""
        if self.read_only or self._fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), self.name)
        if self.fixed_size:
            raise OSError(errno.EINVAL, "a block device has a fixed size", self.name)
        if size >= self._size:
            os.ftruncate(self._fd, size)
        else:
            await self._in_thread(os.ftruncate, self._fd, size)
        self._size = size

    async def flush(self) -> None:
        """Make every completed change durable (fdatasync in a thread)."""
        await self._in_thread(os.fdatasync, self._fd)

    async def flush_range(self, offset: int, length: int) -> None:
        """Make a range durable by msync, which is an fdatasync of some pages (mm/msync.c).

        Nothing is ever read through the mapping. sync_file_range(2) would not do: it
        leaves out the file's length and the caches of the device.
        """
        if self.fixed_size or not self._can_map:
            await self.flush()
            return
        try:
            await self._in_thread(mapped.sync, self._fd, offset, length)
        except mapped.NotMappableError:
            self._can_map = False
            await self.flush()

    # ---------------------------------------------------------------- the rest

    async def extents(
        self, offset: int, length: int, *, max_extents: int = 1 << 20
    ) -> list[tuple[int, bool]]:
        """Tell data from holes by SEEK_DATA and SEEK_HOLE; block devices are all data."""
        if length <= 0:
            return []
        if self.fixed_size:
            return [(length, True)]
        result: list[tuple[int, bool]] = []
        position = offset
        end = offset + length
        while position < end and len(result) < max_extents:
            if len(result) % SEEKS_PER_TURN == SEEKS_PER_TURN - 1:
                await asyncio.sleep(0)
            stop, is_data = _next_extent(self._fd, position, end)
            result.append((stop - position, is_data))
            position = stop
        return result

    async def allocate(self, offset: int, length: int) -> None:
        """Take the space of a range by posix_fallocate in a thread."""
        await self._in_thread(os.posix_fallocate, self._fd, offset, length)
        self._size = max(self._size, offset + length)

    def is_sparse(self, cluster_size: int) -> bool:
        """Compare space and length (1 us), by qemu's measure of a tenth."""
        if self.fixed_size:
            return False
        taken = -(-os.fstat(self._fd).st_blocks * 512 // cluster_size)
        return -(-self._size // cluster_size) >= max(taken * 10 // 9, taken + 2)

    def hole_at(self, offset: int, length: int) -> int:
        """Ask SEEK_DATA (0.3 us); SEEK_HOLE would walk over all extents of a full file."""
        if self.fixed_size:
            return 0
        try:
            return min(os.lseek(self._fd, offset, os.SEEK_DATA) - offset, length)
        except OSError as error:
            return length if error.errno == errno.ENXIO else 0

    async def call(self, function: Callable[[int], Result]) -> Result:
        """Call `function` with the descriptor in a thread; it may change the file."""
        result = await self._in_thread(function, self._fd)
        self._size = os.lseek(self._fd, 0, os.SEEK_END)
        return result

    async def prefetch(self, offset: int, length: int) -> None:
        """Ask the kernel to read a range into the page cache."""
        await self._in_thread(
            os.posix_fadvise, self._fd, offset, length, os.POSIX_FADV_WILLNEED
        )

    async def close(self) -> None:
        """Wait for what is in flight, then close; calls from now on get EBADF."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        if self._in_ring:
            self._ring_left = asyncio.get_running_loop().create_future()
            await self._ring_left
        if self._in_threads:
            await asyncio.wait(self._in_threads)
        os.close(fd)

    def _in_thread(
        self, function: Callable[[*Arguments], Result], *arguments: *Arguments
    ) -> Call[Result]:
        self._require_open()
        call = run(function, *arguments)
        self._in_threads.add(call)
        call.add_done_callback(self._in_threads.discard)
        return call

    def _require_open(self) -> int:
        if self._fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), self.name)
        return self._fd


def _logical_sector(fd: int) -> int:
    buffer = bytearray(4)
    fcntl.ioctl(fd, BLKSSZGET, buffer)
    return int(struct.unpack("i", buffer)[0])


def _supports_nowait(fd: int) -> bool:
    """Whether reads can be asked not to wait (ext4, xfs, btrfs yes; tmpfs no)."""
    try:
        os.preadv(fd, (bytearray(1),), 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError as error:
        # Anything else (a bad sector) each read will say itself.
        return error.errno not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
    return True


def _pread_all(fd: int, offset: int, view: memoryview) -> None:
    """Fill `view`, with zeros past the end."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, (view[done:],), offset + done)
        if count == 0:
            view[done:] = bytes(len(view) - done)
            return
        done += count


def _pwrite_all(fd: int, offset: int, view: memoryview, flags: int) -> None:
    """Write all of `view`, going on after short writes."""
    done = 0
    while done < len(view):
        count = os.pwritev(fd, (view[done:],), offset + done, flags)
        if count == 0:
            raise OSError(errno.EIO, "the kernel wrote nothing")
        done += count


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    while _libc_fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def _next_extent(fd: int, position: int, end: int) -> tuple[int, bool]:
    """Return where the extent at `position` ends (at most `end`), and whether it is data."""
    try:
        for _ in range(_LOOKS):
            data = os.lseek(fd, position, os.SEEK_DATA)
            if data > position:
                return min(data, end), False
            hole = os.lseek(fd, position, os.SEEK_HOLE)
            if hole > position:
                return min(hole, end), True
            # punched in between
    except OSError as error:
        if error.errno == errno.ENXIO:  # no data up to the end of the file
            return end, False
        if error.errno != errno.EINVAL:  # a file system that can't tell
            raise
    return end, True
