"""Wait until a socket can be read or written, whatever lies on top of it."""

import asyncio
from collections.abc import Callable


async def readable(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    """Wait until something has arrived."""
    await _ready(loop, fd, loop.add_reader, loop.remove_reader)


async def writable(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    """Wait until something can be sent."""
    await _ready(loop, fd, loop.add_writer, loop.remove_writer)


async def _ready(
    loop: asyncio.AbstractEventLoop,
    fd: int,
    add: Callable[[int, Callable[[], None]], object],
    remove: Callable[[int], object],
) -> None:
    future: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    add(fd, wake)
    try:
        await future
    finally:
        remove(fd)
