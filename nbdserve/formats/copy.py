"""Copying a disk into another one: sparse, with several requests under way."""

from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from errno import ENOTSUP, EOPNOTSUPP
from typing import Any, Final

from nbdserve.block.device import BlockDevice
from nbdserve.errors import ConfigError, RequestError
from nbdserve.formats.pipeline import in_order
from nbdserve.formats.regions import (
    GRAIN,
    Window,
    differing_runs,
    nonzero_runs,
    read_padded,
    read_window,
    windows,
)

#: Told how many bytes from the beginning of the disk are done.
Progress = Callable[[int], None]

#: Steps under way: enough to hide the latency of a network or a drive.
DEPTH: Final = 8
#: Bytes zeroed by one request where nobody knows how quick it is.
_ZERO_STEP: Final = 1 << 30


async def copy_into_new(
    source: BlockDevice,
    destination: BlockDevice,
    *,
    backing: BlockDevice | None,
    progress: Progress,
) -> None:
    """Copy into a disk that shows nothing but `backing`, or zeros without one.

    Only what differs from that is written, so the copy is as sparse as can be.

    Args:
        source: What to copy, all of it.
        destination: At least as large. What it has more shows zeros in the end.
        backing: What is seen through the destination where nothing is written.
        progress: See `Progress`.
    """
    devices = [source] if backing is None else [source, backing]
    size = source.size if backing is None else destination.size

    async def step(window: Window) -> int:
        data = await read_window(source, window, window.length)
        if backing is None:
            runs = nonzero_runs(data)
        else:
            reference = memoryview(bytearray(window.length))
            await read_padded(backing, window.offset, reference)
            runs = differing_runs(data, reference, GRAIN)
        view = memoryview(data)
        for start, end in runs:
            await destination.write(window.offset + start, view[start:end])
        return window.offset + window.length

    async def steps() -> AsyncGenerator[Coroutine[Any, Any, int]]:
        async with aclosing(windows(devices, size)) as found:
            async for window in found:
                yield step(window)

    await _run(steps(), progress)
    progress(size)


async def overwrite(
    source: BlockDevice, destination: BlockDevice, *, grain: int, progress: Progress
) -> None:
    """Copy over whatever a disk holds, and flush it.

    Args:
        source: What to copy, all of it.
        destination: At least as large; what it has more stays as it is.
        grain: Bytes that its writes have to be a multiple of.
        progress: See `Progress`.

    Raises:
        ConfigError: The destination is too small.
    """
    size = source.size
    if destination.size < size:
        raise ConfigError(
            f"the destination has {destination.size} bytes, the source {size}"
        )
    grain = max(grain, GRAIN)
    # whole blocks only: the disk has room for them, or ends here too
    end = min(-(-size // grain) * grain, destination.size)
    blank = await _zero_quickly(destination, end)
    overwriting = _Overwriting(source, destination, end, grain, blank)
    await _run(overwriting.steps(), progress)
    await destination.flush()
    progress(size)


@dataclass(frozen=True, slots=True)
class _Overwriting:
    """One disk on its way over another one.

    Attributes:
        source: What is copied.
        destination: What is written.
        end: Bytes to write from the beginning, whole blocks.
        grain: Bytes of a block.
        blank: Whether the destination is zeros by now.
    """

    source: BlockDevice
    destination: BlockDevice
    end: int
    grain: int
    blank: bool

    async def steps(self) -> AsyncGenerator[Coroutine[Any, Any, int]]:
        """Yield a job for each step; what lies between them is zeroed."""
        position, size = 0, self.source.size
        async with aclosing(windows([self.source], size)) as found:
            async for window in found:
                if position < window.offset:
                    yield self._zero(position, window.offset)
                yield self._copy(window)
                position = window.offset + window.length
        if position < size:
            yield self._zero(position, self.end)

    async def _copy(self, window: Window) -> int:
        start, stop = window.offset, window.offset + window.length
        if stop == self.source.size:
            stop = self.end
        data = await read_window(self.source, window, stop - start)
        view = memoryview(data)
        position = start
        for first, last in nonzero_runs(data, self.grain):
            await self._zero(position, start + first)
            await self.destination.write(start + first, view[first:last])
            position = start + last
        return await self._zero(position, stop)

    async def _zero(self, start: int, end: int) -> int:
        while start < end and not self.blank:
            length = min(end - start, _ZERO_STEP)
            await self.destination.write_zeroes(start, length)
            start += length
        return end


async def _run(
    steps: AsyncGenerator[Coroutine[Any, Any, int]], progress: Progress
) -> None:
    async with aclosing(steps), aclosing(in_order(steps, DEPTH)) as done:
        async for position in done:
            progress(position)


async def _zero_quickly(destination: BlockDevice, size: int) -> bool:
    """Zero the beginning of a disk if that is quick; return whether it was."""
    if not destination.can_fast_zero:
        return False
    position = 0
    while position < size:
        length = min(size - position, _ZERO_STEP)
        try:
            await destination.write_zeroes(position, length, fast_only=True)
        except (RequestError, OSError) as error:
            if error.errno not in {ENOTSUP, EOPNOTSUPP}:
                raise
            return False
        position += length
    return True
