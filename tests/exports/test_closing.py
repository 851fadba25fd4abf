"""The end of exports."""

import asyncio
import errno

from nbdserve.exports.closing import close_all
from nbdserve.exports.export import Export
from tests.server.memory_disk import MemoryDisk


class SlowDisk(MemoryDisk):
    """Takes until `go` is set to close."""

    def __init__(self, go: asyncio.Event) -> None:
        super().__init__(512)
        self.go = go
        self.begun = False

    async def close(self) -> None:
        self.begun = True
        await self.go.wait()
        await super().close()


class BrokenDisk(MemoryDisk):
    """Can't be closed."""

    async def close(self) -> None:
        raise OSError(errno.EIO, "not durable")


async def test_nobody_waits_for_the_others_and_none_is_stopped_midway() -> None:
    go = asyncio.Event()
    slow = [Export(name, SlowDisk(go)) for name in "abc"]
    broken = Export("d", BrokenDisk(512))
    quick = Export("e", MemoryDisk(512))
    failures = await close_all([*slow, broken, quick], 0.05)
    assert {export.name: str(error) for export, error in failures.items()} == {
        **{name: f"the export {name!r} was not closed within 0.05 s" for name in "abc"},
        "d": f"[Errno {errno.EIO}] not durable",
    }
    assert isinstance(quick.disk, MemoryDisk)
    assert quick.disk.closed
    disks = [disk for each in slow if isinstance(disk := each.disk, SlowDisk)]
    assert [disk.begun for disk in disks] == [True] * 3
    go.set()
    async with asyncio.timeout(10):
        while not all(disk.closed for disk in disks):  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_whoever_gives_up_does_not_stop_it_either() -> None:
    go = asyncio.Event()
    disk = SlowDisk(go)
    closing = asyncio.create_task(close_all([Export("a", disk)], 10))
    while not disk.begun:  # noqa: ASYNC110
        await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing])
    go.set()
    async with asyncio.timeout(10):
        while not disk.closed:  # noqa: ASYNC110
            await asyncio.sleep(0)
