"""Another disk for an export, while its clients stay."""

import asyncio
import errno
from collections.abc import Awaitable, Callable

import pytest

from nbdserve.block.device import BlockDevice
from nbdserve.block.dirty_bitmap import DirtyBitmap
from nbdserve.errors import ConfigError, RequestError
from tests.helpers.nbd_client import NbdRequestFailed, error_name
from tests.server.conftest import MIB, Running, until
from tests.server.memory_disk import MemoryDisk

Opened = tuple[BlockDevice, list[DirtyBitmap]]


def opens(disk: BlockDevice) -> Callable[[], Awaitable[Opened]]:
    async def open_disk() -> Opened:
        await asyncio.sleep(0.01)
        return disk, []

    return open_disk


async def test_clients_stay_and_wait(running: Running) -> None:
    export = running.registry.get("disk")
    assert export is not None
    client, other = await running.client(), await running.client()
    old, new = running.disk, MemoryDisk(4 * MIB)
    new.data[:512] = b"n" * 512
    old.failure = OSError(errno.EIO, "the disk is broken")
    with pytest.raises(NbdRequestFailed):
        await client.flush()
    old.gate = asyncio.Event()
    late = asyncio.create_task(client.read(0, 512))
    await until(lambda: old.started == 2)
    exchange = asyncio.create_task(running.server.exchange_disk(export, opens(new)))
    await asyncio.sleep(0)
    # one that comes meanwhile waits, and the one before is answered by the old disk
    read = asyncio.create_task(other.read(0, 512))
    write = asyncio.create_task(other.write(1024, b"w" * 512))
    await asyncio.sleep(0.02)
    assert (old.closed, exchange.done()) == (False, False)
    old.gate.set()
    with pytest.raises(NbdRequestFailed):
        await late
    await exchange
    assert old.closed
    assert await read == b"n" * 512
    await write
    assert new.data[1024:1536] == b"w" * 512
    assert await client.read(0, 512) == b"n" * 512
    assert (await client.block_status(0, 512))[0][0] == 512
    await client.flush()
    assert ("flush",) in new.calls


async def test_a_disk_that_does_not_open_is_tried_again(running: Running) -> None:
    export = running.registry.get("disk")
    assert export is not None
    client = await running.client()

    async def fail() -> Opened:
        raise ConfigError("there is no image")

    with pytest.raises(ConfigError):
        await running.server.exchange_disk(export, fail)
    with pytest.raises(NbdRequestFailed) as caught:
        await client.read(0, 512)
    assert error_name(caught.value) == "EIO"
    assert export.device.broken == "could not be opened anew: there is no image"
    new = MemoryDisk(4 * MIB)
    await running.server.exchange_disk(export, opens(new))
    assert await client.read(0, 512) == bytes(512)
    assert export.device.broken is None


async def test_requests_that_never_end_keep_their_disk(running: Running) -> None:
    running.server._limits = running.server._limits.__class__(drain_timeout_s=0.05)
    export = running.registry.get("disk")
    assert export is not None
    client = await running.client()
    running.disk.gate = asyncio.Event()
    read = asyncio.create_task(client.read(0, 512))
    await until(lambda: running.disk.started == 1)
    with pytest.raises(RequestError, match="stays open"):
        await running.server.exchange_disk(export, opens(MemoryDisk(MIB)))
    assert export.device is running.disk
    running.disk.gate.set()
    assert len(await read) == 512
    assert len(await client.read(512, 512)) == 512
