"""Taking space before it is needed: in a file, by blocking calls, or through a disk."""

import asyncio
import errno
import os
from collections.abc import Callable
from typing import Final

from nbdserve.block.device import BlockDevice

#: metadata gives each cluster its place, falloc takes the space as well, full
#: writes zeros there too.
MODES: Final = ("off", "metadata", "falloc", "full")

_ZEROS: Final = bytes(4 << 20)
#: Bytes written between two barriers of our own: else one at the end waits for all of it.
_SYNC: Final = 256 << 20


def take_space(
    fd: int, offset: int, length: int, mode: str, progress: Callable[[int], None]
) -> None:
    """Take the space of a range of a file, which reads as zeros, as `mode` says.

    Args:
        fd: Open for writing.
        offset: Bytes.
        length: Bytes; the file is extended where needed.
        mode: One of `MODES`; off and metadata take nothing.
        progress: Told how many bytes of the range are done.

    Raises:
        OSError: There is no room, or the file can't be written.
    """
    if not length:
        return
    if mode == "falloc":
        os.posix_fallocate(fd, offset, length)
    elif mode == "full":
        _write_zeros(fd, offset, length, progress)


async def write_zeros(
    device: BlockDevice, offset: int, end: int, progress: Callable[[int], None]
) -> None:
    """Write zeros as data to a range of a disk, and flush it now and then.

    Args:
        device: The disk.
        offset: Bytes.
        end: Bytes.
        progress: Told how many bytes of the range are done.
    """
    view, position = memoryview(_ZEROS), offset
    while position < end:
        piece = view[: end - position]
        await device.write(position, piece)
        position += len(piece)
        if not (position - offset) % _SYNC:
            await device.flush()
        progress(position - offset)
        await asyncio.sleep(0)


def _write_zeros(
    fd: int, offset: int, length: int, progress: Callable[[int], None]
) -> None:
    view = memoryview(_ZEROS)
    done = 0
    while done < length:
        written = os.pwrite(fd, view[: length - done], offset + done)
        if not written:
            raise OSError(errno.EIO, "a write made no progress")
        if (done + written) // _SYNC != done // _SYNC:
            os.fdatasync(fd)
        done += written
        progress(done)
