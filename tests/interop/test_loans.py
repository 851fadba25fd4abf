"""Large reads, which are answered from the page cache without copying."""

import asyncio
import fcntl
import random
import struct
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.images import fill_pattern
from tests.helpers.nbd_client import NbdClient
from tests.helpers.servers import Server, nbdserve
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
