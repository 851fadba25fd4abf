"""What clients see in the transmission phase, over a real Unix socket."""

import asyncio
import errno
import random
import socket
import struct
from pathlib import Path
from typing import cast

import pytest

from nbdserve.errors import ImageError, RequestError
from nbdserve.server.limits import Limits
from nbdserve.wire.constants import (
    REQUEST_MAGIC,
    ChunkType,
    Command,
    CommandFlag,
    NbdError,
)
from nbdserve.wire.requests import REQUEST
from tests.helpers.nbd_client import NbdClient, NbdRequestFailed
from tests.server.conftest import MIB, Running, until
from tests.server.memory_disk import MemoryDisk


def pattern(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


@pytest.mark.parametrize("structured", [True, False])
async def test_write_then_read(running: Running, structured: bool) -> None:
    client = await running.client(structured=structured)
    for offset, length in [(0, 1), (511, 4096), (4096, 65536), (1, 300_000)]:
        data = pattern(length, offset)
        await client.write(offset, data)
        assert await client.read(offset, length) == data
        assert running.disk.data[offset : offset + length] == data


@pytest.mark.parametrize("structured", [True, False])
async def test_a_batch_of_requests_in_one_segment(
    running: Running, structured: bool
) -> None:
    client = await running.client(structured=structured)
    replies = []
    for number in range(300):
        kind = number % 4
        offset = number * 4096
        transmission = client.transmission
        if kind == 0:
            cookie = transmission.write(offset, bytes([number % 256]) * 4096)
        elif kind == 1:
            cookie = transmission.read(offset - 4096, 4096)
        elif kind == 2:
            cookie = transmission.flush()
        else:
            cookie = transmission.read(4 * MIB, 1)  # past the end
        replies.append(client.reply_to(cookie))
    await client.send_queued()
    for number, reply in enumerate(await asyncio.gather(*replies)):
        assert reply.error == (NbdError.EINVAL if number % 4 == 3 else 0)
        if number % 4 == 1:
            assert reply.data == bytes([(number - 1) % 256]) * 4096


async def test_requests_that_arrive_byte_by_byte(running: Running) -> None:
    client = await running.client()
    data = pattern(700)
    replies = [
        client.reply_to(client.transmission.write(100, data)),
        client.reply_to(client.transmission.read(100, 700)),
        client.reply_to(client.transmission.request(Command.WRITE, offset=4 * MIB,
                                                    length=50, payload=bytes(50))),
        client.reply_to(client.transmission.read(0, 10)),
    ]  # fmt: skip
    stream = client.transmission.data_to_send()
    for position in range(len(stream)):
        await client._send_raw(stream[position : position + 1])
        await asyncio.sleep(0)
    written, read, refused, last = await asyncio.gather(*replies)
    assert (written.error, read.error) == (0, 0)
    assert read.data == data
    assert refused.error == NbdError.ENOSPC
    assert last.data == bytes(range(10))


@pytest.mark.parametrize("step", [1000, 33_333, 200_000])
async def test_large_writes_in_pieces(running: Running, step: int) -> None:
    client = await running.client()
    data = pattern(MIB + 77)
    replies = [
        client.reply_to(client.transmission.write(3, data)),
        client.reply_to(client.transmission.read(3, len(data))),
    ]
    stream = client.transmission.data_to_send()
    for position in range(0, len(stream), step):
        await client._send_raw(stream[position : position + step])
        await asyncio.sleep(0)
    assert (await replies[0]).error == 0
    assert (await replies[1]).data == data


async def test_64_mib_at_once_and_not_a_byte_more(running: Running) -> None:
    running.disk.data = bytearray(66 * MIB)
    running.disk.size = 66 * MIB
    client = await running.client()
    data = pattern(MIB) * 64
    await client.write(5, data)
    assert running.disk.data[5 : 5 + len(data)] == data
    assert await client.read(5, 64 * MIB) == data

    with pytest.raises(NbdRequestFailed) as refused:
        await client.read(0, 64 * MIB + 1)
    assert refused.value.error == NbdError.EINVAL
    with pytest.raises(NbdRequestFailed) as refused:
        await client.write(0, bytes(64 * MIB + 1))
    assert refused.value.error == NbdError.EINVAL
    assert await client.read(5, 10) == data[:10]


async def test_a_write_that_announces_too_much_ends_the_connection(
    running: Running,
) -> None:
    client = await running.client()
    with pytest.raises(NbdRequestFailed) as refused:
        await client.request(Command.WRITE, length=0xFFFFFFFF)
    assert refused.value.error == NbdError.EINVAL
    await client.wait_closed()
    other = await running.client()
    assert await other.read(0, 2) == b"\0\1"


async def test_a_wrong_magic_ends_the_connection(running: Running) -> None:
    client = await running.client()
    await client._send_raw(bytes(28))
    await client.wait_closed()


async def test_zero_length_requests_keep_the_connection(running: Running) -> None:
    client = await running.client()
    assert await client.read(7, 0) == b""
    await client.write(7, b"")
    await client.trim(7, 0)
    assert await client.read(7, 1) == b"\7"
    simple = await running.client(structured=False)
    assert await simple.read(7, 0) == b""


async def test_requests_that_wait_mix_with_those_that_do_not(running: Running) -> None:
    client = await running.client()
    gate = running.disk.gate = asyncio.Event()
    slow_reads = [asyncio.create_task(client.read(n * 512, 512)) for n in range(20)]
    slow_write = asyncio.create_task(client.write(MIB, pattern(4096)))
    large_write = asyncio.create_task(client.write(2 * MIB, pattern(MIB, 2)))
    large_read = asyncio.create_task(client.read(MIB // 2, MIB // 4))
    await until(lambda: running.disk.started == 23)
    running.disk.gate = None

    for number in range(50):  # would overwrite memory that is not theirs any longer
        assert await client.read(number * 256, 256) == bytes(range(256))
        await client.write(3 * MIB + number * 4096, b"\xff" * 4096)
    gate.set()

    for read in slow_reads:
        assert await read == bytes(range(256)) * 2
    assert await large_read == bytes(range(256)) * 1024
    await slow_write
    await large_write
    assert running.disk.data[MIB : MIB + 4096] == pattern(4096)
    assert running.disk.data[2 * MIB : 3 * MIB] == pattern(MIB, 2)


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (OSError(errno.EIO, "bad"), NbdError.EIO),
        (OSError(errno.ENOSPC, "full"), NbdError.ENOSPC),
        (RequestError(errno.ENOTSUP, "not so"), NbdError.ENOTSUP),
        (ImageError("gone"), NbdError.EIO),
        (asyncio.CancelledError(), NbdError.ESHUTDOWN),
        (ZeroDivisionError("a bug"), NbdError.EIO),
    ],
)
async def test_failures_answer_one_request(
    running: Running,
    structured: bool,
    waits: bool,
    failure: BaseException,
    error: NbdError,
) -> None:
    client = await running.client(structured=structured)
    disk = running.disk
    disk.failure = failure
    if waits:
        disk.gate = asyncio.Event()
        asyncio.get_running_loop().call_later(0.005, disk.gate.set)
    requests = [
        client.read(0, 4096),
        client.write(0, b"x" * 100),
        client.flush(),
        client.write_zeroes(0, 10),
        client.read(0, MIB),
    ]
    for outcome in await asyncio.gather(*requests, return_exceptions=True):
        assert isinstance(outcome, NbdRequestFailed)
        assert outcome.error == error
        assert "bug" not in outcome.text
    disk.failure = disk.gate = None
    assert await client.read(1, 1) == b"\1"


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (OSError(errno.EIO, "an earlier sync failed"), ["an earlier sync failed"]),
        (OSError(errno.ENOSPC, "No space", "disk.raw"), ["disk.raw: No space"]),
        (
            ImageError("a.qcow2: the cluster at 0x50000"),
            ["a.qcow2: the cluster at 0x50000"],
        ),
        (RequestError(errno.ENOTSUP, "not so"), []),
    ],
)
async def test_a_failing_disk_is_one_line_in_the_log(
    running: Running, logs: list[dict[str, object]], failure: Exception, told: list[str]
) -> None:
    client = await running.client()
    running.disk.failure = failure
    for _ in range(3):
        with pytest.raises(NbdRequestFailed):
            await client.write(512, b"x")
    lines = [log for log in logs if log["event"] == "the disk failed"]
    assert [log["error"] for log in lines] == told
    for line in lines:
        assert line["log_level"] == "error"
        assert line["command"] == "NBD_CMD_WRITE"
        assert line["offset"] == 512


async def test_commands_reach_the_disk_with_their_flags(running: Running) -> None:
    running.disk.size = 1 << 40
    client = await running.client()
    huge = (1 << 32) - 1
    await client.write(0, b"12", fua=True)
    await client.trim(512, huge, flags=CommandFlag.FUA)
    await client.write_zeroes(0, huge)
    await client.write_zeroes(
        8, 9, flags=CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO | CommandFlag.FUA
    )
    await client.cache(0, huge)
    await client.flush()
    assert await client.block_status(0, huge) == [(huge, 0)]
    assert running.disk.calls == [
        ("write", 0, 2, True),
        ("trim", 512, huge, True),
        ("write_zeroes", 0, huge, True, False, False),
        ("write_zeroes", 8, 9, False, True, True),
        ("cache", 0, huge),
        ("flush",),
    ]


async def test_a_read_only_export_refuses_changes(running: Running) -> None:
    running.disk.read_only = True
    client = await running.client()
    for changing in (
        client.write(0, bytes(100_000)),
        client.trim(0, 1),
        client.write_zeroes(0, 1),
    ):
        with pytest.raises(NbdRequestFailed) as refused:
            await changing
        assert refused.value.error == NbdError.EPERM
    assert await client.read(3, 1) == b"\3"


async def test_holes_are_not_sent(running: Running) -> None:
    disk = running.disk
    disk.holes = [(0, 1024), (8192, 4096), (MIB, 2 * MIB)]
    for start, length in disk.holes:
        disk.data[start : start + length] = bytes(length)
    client = await running.client()
    data, hole = ChunkType.OFFSET_DATA, ChunkType.OFFSET_HOLE
    for offset, length, chunks in [
        (0, 1024, [hole]),
        (0, 4096, [hole, data]),
        (512, 20_000, [hole, data, hole, data]),
        (4096, 8192, [data, hole]),
        (MIB - 10, MIB + 10, [data, hole]),
        (MIB + 1, 2 * MIB, [data, hole, data]),  # the hole is cut to whole sectors
        (MIB + 1, 100, [data]),
        (0, 4 * MIB, [hole, data, hole, data, hole, data]),
    ]:
        reply = await client.read_reply(offset, length)
        assert reply.data == disk.data[offset : offset + length]
        assert reply.chunks == chunks
        whole = await client.read_reply(offset, length, flags=CommandFlag.DF)
        assert whole.data == reply.data
        assert whole.chunks == [data]

    disk.gate = asyncio.Event()
    late = asyncio.create_task(client.read_reply(512, 20_000))
    await asyncio.sleep(0.01)
    disk.gate.set()
    assert (await late).data == disk.data[512:20_512]
    assert (await late).chunks == [hole, data, hole, data]

    simple = await running.client(structured=False)
    assert await simple.read(512, 20_000) == disk.data[512:20_512]


async def test_a_peer_that_does_not_read_is_not_read(running: Running) -> None:
    client = await running.client()
    client._receiver.cancel()  # type: ignore[union-attr]
    for _ in range(2000):
        client.transmission.read(0, 65536)
    stream = client.transmission.data_to_send()
    await client._send_raw(stream)
    other = await running.client()
    for _ in range(20):
        assert await other.read(5, 1) == b"\5"
        await asyncio.sleep(0.001)
    started = running.disk.started
    assert started < 200, "replies pile up in memory"

    client._receiver = asyncio.create_task(client._receive_replies())
    await until(lambda: client.transmission.in_flight == 0)


async def test_a_peer_that_does_not_read_and_goes_away(running: Running) -> None:
    client = await running.client()
    client._receiver.cancel()  # type: ignore[union-attr]
    running.disk.gate = asyncio.Event()
    for number in range(50):
        client.transmission.read(number, 65536)
    await client.send_queued()
    await until(lambda: running.disk.started == 50)
    running.disk.gate.set()
    await asyncio.sleep(0.01)
    await client.close()
    await until(lambda: running.server.connections == 0)


@pytest.mark.parametrize("limits", [Limits(requests_in_flight=4, linger_s=0.2)])
async def test_requests_in_flight_are_bounded(running: Running) -> None:
    client = await running.client()
    running.disk.gate = asyncio.Event()
    reads = [asyncio.create_task(client.read(n * 256, 256)) for n in range(40)]
    await until(lambda: running.disk.started == 4)
    await asyncio.sleep(0.01)
    assert running.disk.started == 4
    running.disk.gate.set()
    assert await asyncio.gather(*reads) == [bytes(range(256))] * 40


@pytest.mark.parametrize(
    "limits", [Limits(bytes_in_flight=MIB), Limits(total_bytes_in_flight=MIB)]
)
async def test_bytes_in_flight_are_bounded(running: Running) -> None:
    first, second = await running.client(), await running.client()
    running.disk.gate = asyncio.Event()
    data = pattern(MIB // 2)
    tasks = [
        asyncio.create_task(client.write(0, data))
        for client in (first, second)
        for _ in range(8)
    ]
    await until(lambda: running.disk.started >= 2)
    await asyncio.sleep(0.02)
    assert running.disk.started <= 6
    running.disk.gate.set()
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("count", [1, 20, 500])
async def test_a_half_closed_client_gets_its_replies(
    running: Running, count: int
) -> None:
    client = await running.client()
    replies = [
        client.reply_to(client.transmission.read(n * 4096, 4096)) for n in range(count)
    ]
    await client.send_queued()
    client.sock.shutdown(socket.SHUT_WR)
    assert all(reply.error == 0 for reply in await asyncio.gather(*replies))
    await client.wait_closed()


async def test_disconnecting_with_requests_in_flight(running: Running) -> None:
    client = await running.client()
    running.disk.gate = asyncio.Event()
    replies = [
        client.reply_to(client.transmission.read(n * 512, 512)) for n in range(50)
    ]
    client.transmission.disconnect()
    client.transmission.flush()  # behind a disconnect nothing counts
    await client.send_queued()
    await until(lambda: running.disk.started == 50)
    running.disk.gate.set()
    assert all(reply.error == 0 for reply in await asyncio.gather(*replies))
    await client.wait_closed()
    assert running.disk.started == 50


async def test_a_connection_that_breaks_leaves_the_disk_alone(
    running: Running, disk: MemoryDisk
) -> None:
    client = await running.client()
    disk.gate = asyncio.Event()
    client.transmission.write(0, b"y" * 4096)
    await client.send_queued()
    await until(lambda: disk.started == 1)
    # a reset rather than an orderly end
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await client.close()
    await asyncio.sleep(0.01)
    disk.gate.set()
    await until(lambda: running.server.connections == 0)
    assert disk.data[:4096] == b"y" * 4096


async def test_a_payload_that_never_comes(running: Running) -> None:
    client = await running.client()
    other = await running.client()
    header = REQUEST.pack(REQUEST_MAGIC, 0, Command.WRITE, 1, 0, 60 * MIB)
    await client._send_raw(header + bytes(1000))
    assert await other.read(9, 1) == b"\t"
    await client.close()
    await until(lambda: running.server.connections == 1)


async def test_busy_connections_take_turns(running: Running) -> None:
    busy = await running.client()
    for _ in range(20_000):
        busy.transmission.read(0, 1)
    sending = asyncio.create_task(busy.send_queued())
    other = await running.client()
    assert await other.read(3, 1) == b"\3"
    assert busy.transmission.in_flight > 0
    await sending
    await until(lambda: busy.transmission.in_flight == 0)


async def test_many_clients_at_once(running: Running) -> None:
    async def work(number: int) -> None:
        client: NbdClient = await running.client(structured=number % 2 == 0)
        data = pattern(10_000, number)
        await client.write(number * 10_000, data)
        assert await client.read(number * 10_000, 10_000) == data
        await client.disconnect()

    await asyncio.gather(*(work(number) for number in range(40)))


class Confused(MemoryDisk):
    """Tells of holes in a way that nobody understands."""

    async def read_into(self, offset: int, buffer: memoryview) -> tuple[()]:
        await super().read_into(offset, buffer)
        return cast("tuple[()]", ("hole",) if offset else ())


async def test_a_bug_ends_the_connection_and_sends_nothing_unfilled(
    tmp_path: Path, limits: Limits
) -> None:
    disk = Confused(MIB)
    disk.data[:65536] = b"secret!!" * 8192
    running = Running(tmp_path / "socket", disk, limits)
    running.server.start()
    other = await running.client()
    for offset in range(0, 65536, 4096):
        await other.read(offset - offset, 4096)
    client = await running.client()
    assert client._receiver is not None
    client._receiver.cancel()
    await asyncio.gather(client._receiver, return_exceptions=True)
    client.transmission.read(4096, 30_000)
    await client.send_queued()
    assert await asyncio.get_running_loop().sock_recv(client.sock, MIB) == b""
    await other.read(0, 512)
    await running.clients.aclose()
    await running.stop()
