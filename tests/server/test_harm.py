"""Clients that mean harm: memory stays bounded, the others are answered."""

import asyncio
import gc
import resource
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest

from nbdserve.errors import ConfigError
from nbdserve.exports.access import Access, Client, Policy
from nbdserve.exports.export import Export
from nbdserve.server.limits import Limits, changed
from nbdserve.server.stall import PeerWatch
from nbdserve.wire.client_handshake import OptionRefused, contexts_data
from nbdserve.wire.constants import IHAVEOPT, REQUEST_MAGIC, Command, Option
from nbdserve.wire.options import OPTION
from nbdserve.wire.requests import REQUEST
from tests.helpers.nbd_client import NbdClient
from tests.helpers.servers import ROOT
from tests.server.conftest import MIB, Running, open_files, until
from tests.server.memory_disk import MemoryDisk

Logs = list[MutableMapping[str, Any]]
#: What the kernel keeps for a Unix socket whose peer does not read, and some more.
SLACK = 2 * MIB


def resident() -> int:
    """Return the bytes of memory that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def read_request(length: int) -> bytes:
    return REQUEST.pack(REQUEST_MAGIC, 0, Command.READ, 1, 0, length)


def option(number: int, data: bytes = b"") -> bytes:
    return OPTION.pack(IHAVEOPT, number, len(data)) + data


def write_request(length: int) -> bytes:
    return REQUEST.pack(REQUEST_MAGIC, 0, Command.WRITE, 1, 0, length)


async def silent(running: Running) -> NbdClient:
    """A client that has chosen the export, and reads no replies any more."""
    client = await running.client()
    assert client._receiver is not None
    client._receiver.cancel()
    await asyncio.gather(client._receiver, return_exceptions=True)
    return client


async def trickle(client: NbdClient) -> None:
    """Send some bytes now and then, for five seconds."""
    for _ in range(100):
        await client._send_raw(bytes(100))
        await asyncio.sleep(0.05)


async def others_are_answered(running: Running) -> None:
    async with asyncio.timeout(10):
        client = await running.client()
        data = bytes(range(256)) * 16
        for offset in range(0, 65536, 4096):
            await client.write(offset, data)
            assert await client.read(offset, 4096) == data
        await client.close()


class Zeros(MemoryDisk):
    """As large as it says, without the memory."""

    async def read_into(self, offset: int, buffer: memoryview) -> tuple[()]:
        there = self.data[offset : offset + len(buffer)]
        buffer[: len(there)] = there
        # every page, so that it is resident as it is with real data
        zeros = bytes(MIB)
        for start in range(len(there), len(buffer), MIB):
            piece = buffer[start : start + MIB]
            piece[:] = zeros[: len(piece)]
        return ()


@pytest.fixture
def disk() -> MemoryDisk:
    disk = Zeros(MIB)
    disk.size = 1 << 40
    return disk


@pytest.mark.parametrize(
    "limits",
    [Limits(linger_s=0.1, total_bytes_in_flight=128 * MIB, idle_buffer_bytes=0)],
)
async def test_reads_of_64_mib_whose_replies_nobody_reads(running: Running) -> None:
    before = resident()
    for _ in range(40):  # 40 * 3 * 64 MiB are asked for
        client = await silent(running)
        await client._send_raw(read_request(64 * MIB) * 3)
    await others_are_answered(running)
    grown = resident() - before
    print(f"120 unread reads of 64 MiB: {grown / MIB:.0f} MiB more")  # noqa: T201
    assert running.server._shared.budget.used <= 192 * MIB
    assert grown < 192 * MIB + 40 * SLACK
    await others_are_answered(running)


@pytest.mark.parametrize(
    "limits",
    [Limits(linger_s=0.1, total_bytes_in_flight=128 * MIB, idle_buffer_bytes=0)],
)
async def test_payloads_of_64_mib_that_never_end(running: Running) -> None:
    before = resident()
    sends = []
    most = memoryview(bytes(63 * MIB))
    for _ in range(40):
        client = await silent(running)
        await client._send_raw(write_request(64 * MIB))
        loop = asyncio.get_running_loop()
        sends.append(asyncio.create_task(loop.sock_sendall(client.sock, most)))
    await asyncio.wait(sends, timeout=1)
    await others_are_answered(running)
    grown = resident() - before - len(most)
    for send in sends:
        send.cancel()
    await asyncio.gather(*sends, return_exceptions=True)
    print(f"40 payloads of 64 MiB that never end: {grown / MIB:.0f} MiB more")  # noqa: T201
    assert running.server._shared.budget.used <= 192 * MIB
    assert grown < 192 * MIB + 40 * SLACK


@pytest.mark.parametrize("limits", [Limits(linger_s=0.1, idle_buffer_bytes=0)])
async def test_who_leaves_without_his_replies_leaves_nothing(running: Running) -> None:
    """What is in a cycle is freed only by a full garbage collection: minutes later."""
    before = resident()
    gc.disable()
    try:
        for _ in range(10):
            client = await silent(running)
            await client._send_raw(read_request(32 * MIB))
            await until(lambda: running.server._shared.budget.used > 16 * MIB)
            client.sock.close()
            await until(lambda: running.server.connections == 0)
            await until(lambda: running.server._shared.budget.used == 0)
        grown = resident() - before
    finally:
        gc.enable()
    assert grown < 64 * MIB


class Turns:
    """Counts what is done between two turns of the loop.

    Attributes:
        most: Done at once.
    """

    def __init__(self) -> None:
        self.most = self._now = 0

    def count(self) -> None:
        self._now += 1
        self.most = max(self.most, self._now)

    async def go_on(self) -> None:
        while True:
            self._now = 0
            await asyncio.sleep(0)


@pytest.mark.parametrize("asked", [
    option(Option.INFO, bytes(6)) * 2000,
    option(Option.LIST_META_CONTEXT, b"\0\0\0\4disk" + bytes(4)) * 2000,
    option(Option.LIST) * 3,
])  # fmt: skip
async def test_a_handshake_waits_for_the_others(
    running: Running, monkeypatch: pytest.MonkeyPatch, asked: bytes
) -> None:
    turns = Turns()
    access_of = Policy.access_of

    def counted(self: Policy, client: Client) -> Access:
        turns.count()
        return access_of(self, client)

    for number in range(3000):
        running.registry.add(Export(f"export {number}", MemoryDisk(512)))
    monkeypatch.setattr(Policy, "access_of", counted)
    client = await running.connect()
    counter = asyncio.create_task(turns.go_on())
    await client._send_raw(b"\0\0\0\3" + asked + option(Option.ABORT))
    loop = asyncio.get_running_loop()
    while await loop.sock_recv(client.sock, MIB):
        pass
    counter.cancel()
    assert 0 < turns.most <= 66


@pytest.mark.parametrize("limits", [Limits(linger_s=0.1, stall_timeout_s=0.2)])
@pytest.mark.parametrize("request_bytes", [
    pytest.param(write_request(MIB) + bytes(100_000), id="payload"),
    pytest.param(read_request(8 * MIB), id="reply"),
])  # fmt: skip
async def test_a_stalled_client_gives_its_memory_back(
    running: Running, logs: Logs, request_bytes: bytes
) -> None:
    idle = await running.client()
    stalled = await silent(running)
    await stalled._send_raw(request_bytes)
    await until(lambda: running.server.connections == 1)
    assert running.server._shared.budget.used == 0
    (closed,) = [log for log in logs if log["event"] == "connection closed"]
    assert closed["reason"].startswith("no progress for")
    assert closed["log_level"] == "warning"
    assert len(await idle.read(0, 10)) == 10  # who holds nothing may be silent


@pytest.mark.parametrize("limits", [Limits(linger_s=0.1, idle_timeout_s=0.4)])
async def test_idle_clients_are_let_go_if_the_operator_wants(
    running: Running, logs: Logs
) -> None:
    idle, busy = await running.client(), await running.client()
    while any(log["event"] == "connection closed" for log in logs) is False:
        await busy.read(0, 1)
        await asyncio.sleep(0.02)
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        await idle.read(0, 1)
    assert len(await busy.read(0, 1)) == 1
    (closed,) = [log for log in logs if log["event"] == "connection closed"]
    assert closed["reason"].startswith("idle for")
    assert closed["log_level"] == "info"


def test_an_idle_disk_stays_by_default() -> None:
    watch = PeerWatch(Limits(), 0)
    year_s = 365 * 86400.0
    assert watch.idleness(year_s, requests=0, in_flight=0) is None
    stalled = watch.stall(year_s, held=0, moved=0, memory_is_short=True)
    assert stalled is None


@pytest.mark.parametrize("limits", [Limits(linger_s=0.1, stall_timeout_s=0.3)])
async def test_a_slow_client_that_moves_is_left_alone(running: Running) -> None:
    client = await running.client()
    cookie = client.transmission.write(0, b"y" * 200_000)
    reply = client.reply_to(cookie)
    stream = client.transmission.data_to_send()
    for start in range(0, len(stream), 20_000):
        await client._send_raw(stream[start : start + 20_000])
        await asyncio.sleep(0.1)
    assert (await reply).error == 0


@pytest.mark.parametrize(
    "limits",
    [Limits(linger_s=0.1, stall_timeout_s=0.3, total_bytes_in_flight=MIB)],
)
async def test_a_trickle_is_not_enough_while_memory_is_short(
    running: Running,
) -> None:
    client = await silent(running)
    await client._send_raw(write_request(64 * MIB) + bytes(40_000))
    await until(lambda: running.server._shared.budget.used >= 64 * MIB)
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        await trickle(client)
    await until(lambda: running.server._shared.budget.used == 0)
    await others_are_answered(running)


@pytest.mark.parametrize("limits", [Limits(linger_s=0.1, handshake_timeout_s=0.3)])
async def test_a_slow_handshake_has_a_deadline(running: Running) -> None:
    clients = [await running.connect() for _ in range(3)]
    await clients[1]._send_raw(b"\0\0\0\3IHAVEOPT")
    await until(lambda: running.server.connections == 0)
    await others_are_answered(running)


def attack(running: Running, name: str) -> subprocess.Popen[str]:
    """Start one of the attackers of the bench, and wait until its burden is there."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests.bench.attackers",
            name,
            str(running.path),
            "disk",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("limits", [Limits(linger_s=0.1, connections=1000)])
async def test_ten_thousand_half_open_connections(running: Running) -> None:
    asyncio.get_running_loop().set_debug(False)
    client = await running.client()
    before, files = resident(), open_files()
    process = await asyncio.to_thread(attack, running, "half-open")
    try:
        await until(lambda: running.server.connections == 1000)
        await others_are_answered(running)
        assert len(await client.read(0, 4096)) == 4096
        assert open_files() - files <= 1000
        grown = resident() - before
        print(f"10,000 half-open connections: {grown / MIB:.0f} MiB more")  # noqa: T201
        assert grown < 16 * MIB
    finally:
        process.kill()
        process.communicate()
    await until(lambda: running.server.connections <= 2)


@pytest.mark.parametrize("limits", [Limits(linger_s=0.1, connections_per_export=2)])
async def test_an_export_has_room_for_so_many(running: Running) -> None:
    first = await running.client()
    await running.client()
    third = await running.connect()
    assert (await third.info("disk")).size == 1 << 40
    with pytest.raises(OptionRefused, match=r"ERR_POLICY.*2 clients"):
        await third.go("disk")
    await first.disconnect()
    await until(lambda: running.server.connections == 2)
    await third.go("disk")


@pytest.mark.parametrize("limits", [Limits(linger_s=0.1, connections=2)])
async def test_a_full_server_refuses_and_says_so_once(
    running: Running, logs: Logs
) -> None:
    for _ in range(2):
        await running.client()
    for _ in range(5):
        late = await running.connect()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            await late.list_exports()
    told = [log for log in logs if log["event"].startswith("too many clients")]
    assert len(told) == 1


@pytest.mark.parametrize("limits", [Limits(linger_s=0.1, options=5)])
async def test_options_are_counted(running: Running) -> None:
    client = await running.connect()
    for _ in range(5):
        await client.list_exports()
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        await client.list_exports()


async def test_the_largest_option_stops_nobody(running: Running) -> None:
    client = await running.connect()
    await client.option(Option.STRUCTURED_REPLY)
    data = contexts_data("disk", ["base:allocation", *["x:"] * 1000])
    outcome = await client.option(Option.SET_META_CONTEXT, data)
    assert [context.name for context in outcome.contexts] == ["base:allocation"]
    for queries in (20_000, 40_000):  # too many; more bytes than are kept as well
        data = contexts_data("disk", ["base:allocation", *["x:"] * queries])
        with pytest.raises(OptionRefused, match="TOO_BIG"):
            await client.option(Option.LIST_META_CONTEXT, data)


def test_limits_are_set_by_name() -> None:
    limits = changed(
        Limits(), [("connections", "7"), ("stall-timeout-s", "2.5"), ("turn-bytes", "2M")]
    )  # fmt: skip
    assert (limits.connections, limits.stall_timeout_s) == (7, 2.5)
    assert limits.turn_bytes == 2 * MIB


@pytest.mark.parametrize(
    ("name", "value"),
    [("connection", "7"), ("connections", "0"), ("connections", "x"),
     ("linger-s", "-1"), ("linger-s", "inf"), ("linger-s", ""), ("turn_s", "1")],
)  # fmt: skip
def test_limits_that_make_no_sense(name: str, value: str) -> None:
    with pytest.raises(ConfigError):
        changed(Limits(), [(name, value)])
