"""Exports that are opened when the first client asks for them."""

import asyncio
from contextlib import suppress

import pytest

from nbdserve.errors import ImageError
from nbdserve.exports.export import Export
from nbdserve.exports.late import LateExport
from tests.server.memory_disk import MemoryDisk


class Opening:
    """Opens a disk when `go` is set, and counts how often."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.times = 0
        self.disk = MemoryDisk(512)

    async def __call__(self) -> Export:
        self.times += 1
        await self.go.wait()
        return Export("a", self.disk)


async def give_up(export: LateExport) -> None:
    """Ask for an export, and go away while it is opened."""
    client = asyncio.create_task(export.ready())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    client.cancel()
    with suppress(asyncio.CancelledError):
        await client


async def test_who_gives_up_does_not_stop_the_opening() -> None:
    opening = Opening()
    export = LateExport("a", "", opening)
    for _ in range(3):
        await give_up(export)
    opening.go.set()
    await export.ready()
    assert (opening.times, export.size) == (1, 512)


async def test_what_is_being_opened_is_closed_too() -> None:
    opening = Opening()
    export = LateExport("a", "", opening)
    await give_up(export)
    closing = asyncio.create_task(export.close())
    await asyncio.sleep(0)
    opening.go.set()
    await closing
    assert opening.disk.closed
    await export.ready()  # of no effect any more
    assert opening.times == 1


async def test_after_a_failure_the_next_client_tries_again() -> None:
    async def broken() -> Export:
        raise ImageError("broken")

    export = LateExport("a", "", broken)
    for _ in range(2):
        with pytest.raises(ImageError, match="broken"):
            await export.ready()
