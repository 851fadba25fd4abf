"""Zeros: to fill memory with, and to write."""

from typing import Final

_ZEROS: Final = memoryview(bytes(1 << 20))


def clear(view: memoryview) -> None:
    """Make all of `view` zeros."""
    length = len(view)
    if length <= len(_ZEROS):
        view[:] = _ZEROS[:length]
        return
    for start in range(0, length, len(_ZEROS)):
        end = min(start + len(_ZEROS), length)
        view[start:end] = _ZEROS[: end - start]


def zeros(offset: int, end: int) -> memoryview:
    """Return zeros for the bytes from `offset` on: up to `end`, or to the next MiB of the disk.

    Where a long range is written in pieces, no sector is in two of them: of two requests
    for it, that are there at the same time, it is one's or the other's.
    """
    piece = len(_ZEROS) - offset % len(_ZEROS)
    return _ZEROS[: min(piece, end - offset)]
