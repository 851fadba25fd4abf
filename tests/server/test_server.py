"""How clients come and go, and how the server ends."""

import asyncio
import errno
import socket
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest

from nbdserve.exports.export import Export
from nbdserve.exports.registry import Registry
from nbdserve.server.limits import Limits
from nbdserve.server.listeners import TcpEndpoint, listen_tcp
from nbdserve.server.server import Server
from nbdserve.wire.client_handshake import OptionRefused
from nbdserve.wire.constants import (
    BASE_ALLOCATION,
    NbdError,
    Option,
    OptionReply,
    TransmissionFlag,
)
from tests.helpers.nbd_client import NbdClient, NbdRequestFailed
from tests.server.conftest import Running, until
from tests.server.memory_disk import MemoryDisk

Logs = list[MutableMapping[str, Any]]


async def test_the_handshake_tells_about_exports(running: Running) -> None:
    client = await running.connect()
    assert await client.list_exports() == [("disk", "a disk")]
    info = await client.info("disk")
    assert (info.size, info.name, info.description) == (4 << 20, "disk", "a disk")
    assert (info.minimum_block, info.preferred_block) == (1, 4096)
    assert info.maximum_payload == 64 << 20
    assert info.transmission_flags & TransmissionFlag.CAN_MULTI_CONN
    assert (await client.info("")).name == "disk"
    with pytest.raises(OptionRefused, match="no export 'other'"):
        await client.info("other")
    listed = await client.option(
        Option.LIST_META_CONTEXT, b"\0\0\0\4disk" + b"\0\0\0\0"
    )
    assert [context.name for context in listed.contexts] == [BASE_ALLOCATION]
    await client.go("disk")
    assert await client.read(0, 3) == b"\0\1\2"


async def test_one_story_per_connection(running: Running, logs: Logs) -> None:
    client = await running.client()
    await client.write(0, bytes(1000))
    await client.read(0, 4096)
    with pytest.raises(NbdRequestFailed):
        await client.read(1 << 40, 1)
    await client.disconnect()
    await until(lambda: running.server.connections == 0)
    opened, *_requests, closed = logs
    assert opened["event"] == "connection opened"
    assert opened["export"] == "disk"
    assert opened["peer"].startswith("unix:pid=")
    assert closed["event"] == "connection closed"
    assert closed["reason"] == "disconnected"
    assert (closed["requests"], closed["errors"]) == (3, 1)
    assert (closed["bytes_read"], closed["bytes_written"]) == (4096, 1000)


async def test_every_request_is_logged_for_debugging(
    running: Running, logs: Logs
) -> None:
    client = await running.client()
    await client.write(0, bytes(1000))
    with pytest.raises(NbdRequestFailed):
        await client.read(1 << 40, 1)
    told = [
        (log["command"], log["length"], log["refused"] is not None)
        for log in logs
        if log["event"] == "request"
    ]
    assert told == [("NBD_CMD_WRITE", 1000, False), ("NBD_CMD_READ", 1, True)]


async def test_requests_right_behind_the_handshake(running: Running) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, str(running.path))
        await loop.sock_sendall(
            sock,
            b"\0\0\0\3IHAVEOPT\0\0\0\7\0\0\0\6" + bytes(6)
            + b"\x25\x60\x95\x13\0\0\0\0cookie01" + bytes(11) + b"\5"
            + b"\x25\x60\x95\x13\0\0\0\2cookie02" + bytes(12),
        )  # fmt: skip
        received = b""
        while part := await loop.sock_recv(sock, 4096):
            received += part
        assert received.endswith(b"\x67\x44\x66\x98\0\0\0\0cookie01\0\1\2\3\4")


@pytest.mark.parametrize("sent", [b"", b"\0\0\0\3", b"\0\0\0\3IHAVEOPT\0\0"])
async def test_vanishing_in_the_handshake_is_no_error(
    running: Running, logs: Logs, sent: bytes
) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(running.path))
        sock.sendall(sent)
    await until(lambda: running.server.connections == 0)
    assert {log["log_level"] for log in logs} <= {"debug"}


@pytest.mark.parametrize("limits", [Limits(handshake_timeout_s=0.05)])
async def test_a_silent_client_is_let_go_and_disturbs_nobody(running: Running) -> None:
    silent = await running.connect()
    client = await running.client()
    assert await client.read(1, 1) == b"\1"
    await until(lambda: running.server.connections == 1)
    greeting = await silent._receive_raw()
    assert greeting.startswith(b"NBDMAGIC")
    with pytest.raises(ConnectionResetError):
        await silent._receive_raw()
    assert await client.read(2, 1) == b"\2"


@pytest.mark.parametrize("limits", [Limits(connections=2)])
async def test_too_many_clients(running: Running) -> None:
    first, _second = await running.client(), await running.client()
    with pytest.raises(ConnectionError):
        await running.client()
    await first.disconnect()
    await until(lambda: running.server.connections == 1)
    assert await (await running.client()).read(1, 1) == b"\1"


async def test_shutdown_answers_what_is_in_flight(running: Running) -> None:
    client, idle = await running.client(), await running.client()
    disk = running.disk
    disk.gate = asyncio.Event()
    read = asyncio.create_task(client.read(1, 512))
    write = asyncio.create_task(client.write(0, b"z" * 512))
    await until(lambda: disk.started == 2)

    stopping = asyncio.create_task(running.stop())
    await idle.wait_closed()
    with pytest.raises(NbdRequestFailed) as refused:
        await client.flush()
    assert refused.value.error == NbdError.ESHUTDOWN
    assert not disk.closed
    disk.gate.set()

    assert len(await read) == 512
    await write
    assert disk.data[:512] == b"z" * 512
    await client.wait_closed()
    await stopping
    assert disk.closed


async def test_shutdown_refuses_options(running: Running) -> None:
    client = await running.connect()
    await client.list_exports()
    stopping = asyncio.create_task(running.stop())
    await asyncio.sleep(0.01)
    with pytest.raises(OptionRefused) as refused:
        await client.go("disk")
    assert refused.value.reply == OptionReply.ERR_SHUTDOWN
    with pytest.raises(FileNotFoundError):
        await NbdClient.connect_unix(running.path)
    await stopping


@pytest.mark.parametrize("limits", [Limits(drain_timeout_s=0.05, linger_s=0.05)])
async def test_shutdown_does_not_wait_for_ever(running: Running, logs: Logs) -> None:
    stuck, deaf, halfway = [await running.client() for _ in range(3)]
    await halfway._send_raw(bytes.fromhex("2560951300000001") + bytes(17) + b"\1\0\0")
    deaf._receiver.cancel()  # type: ignore[union-attr]
    for _ in range(100):
        deaf.transmission.read(0, 1 << 20)
    await deaf.send_queued()
    running.disk.gate = asyncio.Event()
    lost = asyncio.create_task(stuck.read(0, 512))
    await asyncio.sleep(0.02)
    await running.stop()
    with pytest.raises(ConnectionError):
        await lost
    assert running.disk.closed
    assert "gave up on requests in flight" in [log["event"] for log in logs]


async def test_a_disk_that_cannot_be_closed_does_not_hide_the_others(
    tmp_path: Path, logs: Logs
) -> None:
    class Failing(MemoryDisk):
        async def close(self) -> None:
            raise OSError(errno.EIO, "not durable")

    registry = Registry()
    good = MemoryDisk(512)
    registry.add(Export("bad", Failing(512)))
    registry.add(Export("good", good))
    server = Server(registry, [])
    server.start()
    stop = asyncio.Event()
    stop.set()
    with pytest.raises(OSError, match="not durable"):
        await server.serve_until(stop)
    assert good.closed
    assert logs[-1]["export"] == "bad"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_tcp(host: str) -> None:
    registry = Registry()
    registry.add(Export("disk", MemoryDisk(1 << 20)))
    server = Server(registry, listen_tcp(host, 0))
    server.start()
    (endpoint,) = server.endpoints
    assert isinstance(endpoint, TcpEndpoint)
    assert endpoint.port
    async with await NbdClient.connect_tcp(host, endpoint.port) as client:
        await client.go()
        await client.write(1000, b"over tcp")
        assert await client.read(1000, 8) == b"over tcp"
        await client.disconnect()
    await server.shut_down()
