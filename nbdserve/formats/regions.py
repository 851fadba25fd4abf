"""Walking over disks without reading what is known to be zeros.

Copying, comparing and rebasing all ask the same thing: where may any of these disks
hold something else than zeros? A disk that is shorter than another one reads as zeros
past its end.
"""

from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from nbdserve.block.device import BlockDevice

if TYPE_CHECKING:
    from nbdserve.block.extents import Extent

#: Bytes that one step of an operation handles, and that one buffer holds.
STEP: Final = 1 << 20
#: Zeros are found in blocks of this size, as by `qemu-img convert -S 4k`.
GRAIN: Final = 4096
#: Bytes and extents asked for at a time, so that a large disk needs no large list.
_ASKED_BYTES: Final = 1 << 40
_ASKED_EXTENTS: Final = 1 << 12

ZEROS: Final = memoryview(bytes(2 << 20))


class Window(NamedTuple):
    """A piece of a disk that is handled at once.

    Attributes:
        offset: Bytes, a multiple of the step.
        length: Bytes, at most a step.
        parts: Start and length of what may be more than zeros, in order, within it.
    """

    offset: int
    length: int
    parts: list[tuple[int, int]]


class _Cursor:
    """Goes over the extents of one disk, from the front to the back."""

    def __init__(self, device: BlockDevice) -> None:
        self._device = device
        self._extents: list[Extent] = []
        self._index = 0
        self._start = 0

    async def at(self, position: int) -> tuple[bool, int]:
        """Return whether zeros are known to begin at `position`, and how far it is so."""
        device = self._device
        if position >= device.size:
            return True, 1 << 63
        while True:
            while self._index < len(self._extents):
                extent = self._extents[self._index]
                if position < self._start + extent.length:
                    return extent.zero, self._start + extent.length
                self._start += extent.length
                self._index += 1
            length = min(_ASKED_BYTES, device.size - position)
            self._extents = await device.block_status(
                position, length, max_extents=_ASKED_EXTENTS
            )
            self._index, self._start = 0, position


async def nonzero_ranges(
    devices: Sequence[BlockDevice], size: int
) -> AsyncGenerator[tuple[int, int]]:
    """Yield offset and length of ranges in which some disk may hold more than zeros.

    Args:
        devices: The disks.
        size: Bytes to look at from the beginning.
    """
    cursors = [_Cursor(device) for device in devices]
    position = start = 0
    while position < size:
        seen = [await cursor.at(position) for cursor in cursors]
        end = min(size, *(stop for _, stop in seen))
        if all(zero for zero, _ in seen):
            if start < position:
                yield start, position - start
            start = end
        position = end
    if start < position:
        yield start, position - start


async def windows(
    devices: Sequence[BlockDevice], size: int, step: int = STEP
) -> AsyncGenerator[Window]:
    """Yield the steps in which some disk may hold more than zeros; others are left out."""
    index = -1
    parts: list[tuple[int, int]] = []
    async for start, length in nonzero_ranges(devices, size):
        offset, end = start, start + length
        while offset < end:
            if offset // step != index:
                if parts:
                    yield Window(index * step, min(step, size - index * step), parts)
                index, parts = offset // step, []
            stop = min(end, (index + 1) * step)
            parts.append((offset, stop - offset))
            offset = stop
    if parts:
        yield Window(index * step, min(step, size - index * step), parts)


async def read_padded(device: BlockDevice, offset: int, view: memoryview) -> None:
    """Fill `view`, which is zeros as yet; it may run past the end of the disk."""
    inside = min(len(view), device.size - offset)
    if inside > 0:
        await device.read_into(offset, view[:inside])


async def read_window(device: BlockDevice, window: Window, length: int) -> bytearray:
    """Return `length` bytes from the beginning of a window, zeros behind its end."""
    buffer = bytearray(length)
    view = memoryview(buffer)
    for start, size in window.parts:
        at = start - window.offset
        await read_padded(device, start, view[at : at + size])
    return buffer


def differing_runs(
    data: bytearray, reference: memoryview, grain: int
) -> list[tuple[int, int]]:
    """Return start and end of the runs of blocks in which two buffers differ.

    Args:
        data: One of them.
        reference: The other one, at least as long.
        grain: Bytes of a block.
    """
    runs: list[tuple[int, int]] = []
    length = len(data)
    for start in range(0, length, grain):
        end = min(start + grain, length)
        if data.startswith(reference[start:end], start):
            continue
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return runs


def nonzero_runs(data: bytearray, grain: int = GRAIN) -> list[tuple[int, int]]:
    """Return start and end of the runs of blocks that hold more than zeros."""
    return differing_runs(data, zeros(len(data)), grain)


def zeros(length: int) -> memoryview:
    """Return that many zeros, without making them anew up to 2 MiB."""
    return ZEROS[:length] if length <= len(ZEROS) else memoryview(bytes(length))
