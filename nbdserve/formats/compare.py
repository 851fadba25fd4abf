"""Comparing what two disks hold; a shorter one counts as followed by zeros."""

from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, Final

from nbdserve.block.device import BlockDevice
from nbdserve.formats.copy import Progress
from nbdserve.formats.pipeline import in_order
from nbdserve.formats.regions import (
    GRAIN,
    Window,
    differing_runs,
    read_window,
    windows,
)

#: Steps under way.
_DEPTH: Final = 4


async def first_difference(
    first: BlockDevice, second: BlockDevice, *, progress: Progress
) -> int | None:
    """Return the offset of the first byte in which two disks differ, None if none does.

    What both know to be zeros is not read.

    Raises:
        ImageError: One of them is broken.
        OSError: One of them can't be read.
    """
    size = max(first.size, second.size)

    async def step(window: Window) -> tuple[int, int | None]:
        one = await read_window(first, window, window.length)
        other = await read_window(second, window, window.length)
        end = window.offset + window.length
        found = None if one == other else window.offset + _first_byte(one, other)
        return end, found

    async def steps() -> AsyncGenerator[Coroutine[Any, Any, tuple[int, int | None]]]:
        async with aclosing(windows([first, second], size)) as found:
            async for window in found:
                yield step(window)

    async with aclosing(steps()) as jobs, aclosing(in_order(jobs, _DEPTH)) as results:
        async for end, offset in results:
            if offset is not None:
                return offset
            progress(end)
    progress(size)
    return None


def _first_byte(one: bytearray, other: bytearray) -> int:
    """Return the index of the first byte in which two different buffers differ."""
    start, _ = differing_runs(one, memoryview(other), GRAIN)[0]
    pairs = zip(one[start : start + GRAIN], other[start : start + GRAIN], strict=True)
    return start + next(index for index, (a, b) in enumerate(pairs) if a != b)
