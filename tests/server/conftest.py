"""A running server for tests of the server."""

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Iterator, MutableMapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import structlog.testing

from nbdserve.exports.export import Export
from nbdserve.exports.registry import Registry
from nbdserve.server.limits import Limits
from nbdserve.server.listeners import listen_unix
from nbdserve.server.server import Server
from tests.helpers.nbd_client import NbdClient
from tests.server.memory_disk import MemoryDisk

MIB = 1 << 20


class Running:
    """A server with one export, and clients of it."""

    def __init__(self, path: Path, disk: MemoryDisk, limits: Limits) -> None:
        self.path = path
        self.disk = disk
        self.registry = Registry()
        self.registry.add(Export("disk", disk, "a disk"))
        self.server = Server(self.registry, [listen_unix(str(path))], limits)
        self.clients = AsyncExitStack()

    async def connect(self) -> NbdClient:
        """Return a client that has not begun its handshake."""
        return await self.clients.enter_async_context(
            await NbdClient.connect_unix(self.path)
        )

    async def client(self, *, structured: bool = True) -> NbdClient:
        client = await self.connect()
        await client.go("disk", structured=structured)
        return client

    async def stop(self) -> None:
        await self.server.shut_down()


async def until(condition: object, what: str = "the condition") -> None:
    """Wait until a callable is true, at most ten seconds."""
    assert callable(condition)
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[MutableMapping[str, Any]]]:
    """What was logged."""
    with structlog.testing.capture_logs() as captured:
        yield captured


@pytest.fixture
def limits() -> Limits:
    return Limits(linger_s=0.2, drain_timeout_s=5)


@pytest.fixture
def disk() -> MemoryDisk:
    disk = MemoryDisk(4 * MIB)
    disk.data[:] = bytes(range(256)) * (4 * MIB // 256)
    return disk


@pytest.fixture
async def running(
    tmp_path: Path, disk: MemoryDisk, limits: Limits
) -> AsyncIterator[Running]:
    """Run a server; in the end nothing may be left of it."""
    files = open_files()
    tasks = asyncio.all_tasks()
    running = Running(tmp_path / "socket", disk, limits)
    running.server.start()
    try:
        yield running
    finally:
        if disk.gate is not None:
            disk.gate.set()
        await running.clients.aclose()
        await running.stop()
    assert disk.closed
    assert not (tmp_path / "socket").exists()
    assert running.server.connections == 0
    # large reads that the server gave up on end piece by piece
    await until(lambda: running.server._pool.lent == 0, "the last buffer's return")
    assert running.server._shared.budget.used == 0, "the budget leaks"
    await asyncio.sleep(0)
    left = asyncio.all_tasks() - tasks - {asyncio.current_task()}
    assert not left, "tasks are leaked"
    assert open_files() <= files, "file descriptors are leaked"
