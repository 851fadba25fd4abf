"""Mappings of a part of a file, through which nothing is ever read or written.

They are for what the kernel does to pages by their address: mmap.flush() of the standard library
keeps the GIL, and its mappings have no address for madvise.
"""

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

#: asm-generic/mman.h, asm-generic/mman-common.h
_MS_SYNC: Final = 4
_MADV_COLD: Final = 20

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap64 if hasattr(_libc, "mmap64") else _libc.mmap
_mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_mmap.restype = ctypes.c_void_p
_libc.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED: Final = ctypes.c_void_p(-1).value


class NotMappableError(Exception):
    """The file can't be mapped."""


@contextmanager
def _mapped(fd: int, offset: int, length: int, flags: int) -> Iterator[tuple[int, int]]:
    """Map the pages of a range; yields their address and length."""
    start = offset & -mmap.PAGESIZE
    length += offset - start
    address = _mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED | flags, fd, start)
    if address == _FAILED:
        raise NotMappableError
    try:
        yield address, length
    finally:
        _libc.munmap(address, length)


def sync(fd: int, offset: int, length: int) -> None:
    """Write a range back, and wait for it (MS_SYNC).

    Raises:
        NotMappableError: The file can't be mapped.
        OSError: It could not be written back.
    """
    with _mapped(fd, offset, length, 0) as place:
        if _libc.msync(*place, _MS_SYNC) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def cool(fd: int, offset: int) -> None:
    """Tell the kernel that the page at `offset`, which is cached, is not needed soon.

    It splits a large folio for that, if nobody else maps it and it is clean (mm/madvise.c).

    Raises:
        NotMappableError: The file can't be mapped.
    """
    with _mapped(fd, offset, 1, mmap.MAP_POPULATE) as place:
        _libc.madvise(*place, _MADV_COLD)
