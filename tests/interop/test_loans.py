"""Large reads, which are answered from the page cache without copying."""

import asyncio
import contextlib
import fcntl
import os
import random
import socket
import struct
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdserve.wire.constants import REQUEST_MAGIC, Command
from nbdserve.wire.requests import REQUEST
from tests.helpers.images import fill_pattern
from tests.helpers.nbd_client import NbdClient
from tests.helpers.servers import NBDSERVE, Server, nbdserve
from tests.helpers.tools import run

MIB = 1 << 20
#: Two of these fit into a Unix socket.
HALF = MIB // 2
SIZE = 160 * MIB
#: What a test looks at; the rest is room for others to write to.
SHOWN = 8 * MIB


def _raw(folder: Path, source: Path) -> Path:
    return source


def _qcow2(folder: Path, source: Path) -> Path:
    target = folder / "disk.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", source, target)
    return target


def _small_clusters(folder: Path, source: Path) -> Path:
    target = folder / "small.qcow2"
    options = ("-O", "qcow2", "-o", "cluster_size=4k")
    run("qemu-img", "convert", "-f", "raw", *options, source, target)
    return target


def _overlay(folder: Path, source: Path) -> Path:
    base = _qcow2(folder, source)
    target = folder / "overlay.qcow2"
    run("qemu-img", "create", "-f", "qcow2", "-b", base, "-F", "qcow2", target)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 300k", target)
    return target


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "disk.raw"
    fill_pattern(path, SHOWN, seed=11)
    with path.open("r+b") as file:
        file.truncate(SIZE)
    return path


@pytest.mark.parametrize(
    ("make", "transport", "options"),
    [
        (_raw, "unix", ()),
        (_raw, "tcp", ()),
        (_qcow2, "unix", ()),
        (_qcow2, "tcp", ("--read-only",)),
        (_small_clusters, "unix", ()),
        (_overlay, "unix", ()),
        (_overlay, "tcp", ("--read-only",)),
    ],
)
async def test_large_reads_are_right(
    make: Callable[[Path, Path], Path],
    transport: str,
    options: tuple[str, ...],
    source: Path,
    tmp_path: Path,
) -> None:
    image = make(tmp_path, source)
    expected = bytearray(source.read_bytes()[: SHOWN + MIB])
    if make is _overlay:
        expected[MIB : MIB + 300 * 1024] = b"\7" * 300 * 1024
    chance = random.Random(5)
    kind = "raw" if make is _raw else "qcow2"
    with nbdserve(image, tmp_path, image_format=kind, options=options) as server:
        for structured in (False, True):
            client = await _connected(server, transport)
            await client.go("disk", structured=structured)
            ranges = []
            for _ in range(20):
                length = chance.choice((65536, 65537, 200_000, MIB, 4 * MIB))
                ranges.append((chance.randrange(len(expected) - length), length))
            found = await asyncio.gather(*(client.read(*each) for each in ranges))
            for (offset, length), data in zip(ranges, found, strict=True):
                assert data == expected[offset : offset + length]
            await client.close()


async def _connected(server: Server, transport: str) -> NbdClient:
    if transport == "unix":
        assert server.unix is not None
        return await NbdClient.connect_unix(server.unix)
    assert server.port is not None
    return await NbdClient.connect_tcp("127.0.0.1", server.port)


@pytest.mark.parametrize("make", [_qcow2, _small_clusters])
async def test_what_a_client_has_not_read_yet_is_never_overwritten_with_other_data(
    make: Callable[[Path, Path], Path], source: Path, tmp_path: Path
) -> None:
    image = make(tmp_path, source)
    expected = source.read_bytes()[:SHOWN]
    with nbdserve(image, tmp_path) as server:
        reader = await _connected(server, "unix")
        await reader.go("disk", structured=False)
        assert reader._receiver is not None
        reader._receiver.cancel()
        await asyncio.wait([reader._receiver])
        writer = await _connected(server, "unix")
        await writer.go("disk")
        requests = b"".join(
            struct.pack(">IHHQQI", 0x25609513, 0, 0, number, number * MIB, HALF)
            for number in range(2)
        )
        await reader._send_raw(requests)
        for _ in range(1000):
            await asyncio.sleep(0.01)
            if _unread(reader) == 2 * (HALF + 16):
                break
        assert _unread(reader) == 2 * (HALF + 16)
        # Free what it has asked for, then use more than what is reserved.
        await writer.trim(0, SHOWN)
        await writer.flush()
        for offset in range(SHOWN, SIZE - 4 * MIB, 4 * MIB):
            await writer.write(offset, b"Y" * 4 * MIB)
            await writer.flush()
        for number in range(2):
            reply = await _exactly(reader, 16 + HALF)
            assert struct.unpack(">IIQ", reply[:16]) == (0x67446698, 0, number)
            wanted = expected[number * MIB : number * MIB + HALF]
            for start in range(0, HALF, 512):
                sector = reply[16 + start : 16 + start + 512]
                assert sector in {wanted[start : start + 512], bytes(512)}
        reader.sock.close()
        await writer.close()
    run("qemu-img", "check", image)


@pytest.mark.parametrize(("transport", "then"), [
    ("unix", "waits"),
    ("unix", "says goodbye"),
    ("unix", "half-closes"),
    ("unix", "splices"),
    ("unix", "is served anew"),
    ("unix", "is compacted"),
    ("tcp", "waits"),
    ("tcp", "splices"),
])  # fmt: skip
async def test_a_reply_that_is_read_late_has_no_other_data(
    transport: str, then: str, tmp_path: Path
) -> None:
    """Half of what it has is discarded while its neighbours are written, and used again.

    The kernel can't take those pages out of a large folio of the page cache that is dirty
    and to which the socket refers, so what is written there next would be in the reply.
    """
    image = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1G")
    control = tmp_path / "control"
    ctl: list[str | Path] = [*NBDSERVE, "ctl", "--control", control]
    with nbdserve(image, tmp_path, options=("--control", str(control))) as server:
        writer, hammer = [await _connected(server, "unix") for _ in range(2)]
        for client in (writer, hammer):
            await client.go("disk")
        for offset in range(0, 8 * MIB, MIB):
            await writer.write(offset, b"A" * MIB)
        await writer.flush()
        reply = await _Late.ask(await _connected(server, transport))
        if then == "is served anew":
            run(*ctl, "reopen", "disk")
        await reply.treat(then)

        async def write_beside() -> None:
            while True:
                for cluster in range(1, 16, 2):
                    await hammer.write(cluster << 16, b"A" * 4096)

        beside = asyncio.create_task(write_beside())
        await asyncio.sleep(0.1)
        for cluster in range(0, 16, 2):
            await writer.trim(cluster << 16, 1 << 16)
        await writer.flush()
        if then == "is compacted":
            run(*ctl, "compact", "disk")
        await asyncio.sleep(0.2)
        await writer.flush()
        beside.cancel()
        await asyncio.wait([beside])
        for offset in range(64 * MIB, 140 * MIB, MIB):
            await writer.write(offset, b"B" * MIB)
        data = await reply.rest()
        assert data.count(b"A") + data.count(0) == MIB
        assert data.count(b"A") >= HALF, "what was not discarded is still there"
        await writer.close()
        await hammer.close()
    run("qemu-img", "check", image)


def _request(command: Command, length: int) -> bytes:
    return REQUEST.pack(REQUEST_MAGIC, 0, command, 7, 0, length)


class _Late:
    """The reply to a read of 1 MiB, which is not read for a while."""

    def __init__(self, client: NbdClient) -> None:
        self._client = client
        self._pipe: tuple[int, int] | None = None
        self._spliced = 0

    @classmethod
    async def ask(cls, client: NbdClient) -> "_Late":
        """Ask for it, and wait until the client's socket has some of it."""
        await client.go("disk", structured=False)
        assert client._receiver is not None
        client._receiver.cancel()
        await asyncio.wait([client._receiver])
        await client._send_raw(_request(Command.READ, MIB))
        for _ in range(1000):
            if _unread(client) > 60_000:
                break
            await asyncio.sleep(0.01)
        return cls(client)

    async def treat(self, then: str) -> None:
        if then == "says goodbye":
            await self._client._send_raw(_request(Command.DISC, 0))
        elif then == "half-closes":
            self._client.sock.shutdown(socket.SHUT_WR)
        elif then == "splices":
            self._splice()

    def _splice(self) -> None:
        """Let a pipe have what the socket has, as some proxies do."""
        self._pipe = os.pipe()
        fcntl.fcntl(self._pipe[1], fcntl.F_SETPIPE_SZ, MIB)
        source, target = self._client.sock.fileno(), self._pipe[1]
        flags = os.SPLICE_F_NONBLOCK
        with contextlib.suppress(BlockingIOError):
            while moved := os.splice(source, target, MIB, flags=flags):
                self._spliced += moved
        assert self._spliced

    async def rest(self) -> bytes:
        """Read it, and close the connection."""
        reply = b""
        if self._pipe is not None:
            while len(reply) < self._spliced:
                reply += os.read(self._pipe[0], self._spliced)
            for end in self._pipe:
                os.close(end)
        reply += await _exactly(self._client, 16 + MIB - len(reply))
        self._client.sock.close()
        return reply[16:]


def _unread(client: NbdClient) -> int:
    answer = fcntl.ioctl(client.sock.fileno(), termios.FIONREAD, bytes(4))
    return int(struct.unpack("=i", answer)[0])


async def _exactly(client: NbdClient, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = await asyncio.get_running_loop().sock_recv(
            client.sock, length - len(data)
        )
        assert piece
        data += piece
    return data
