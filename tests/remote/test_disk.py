"""A disk on another server, against servers of every kind, and none."""

import errno
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdserve.errors import ConfigError, RequestError
from nbdserve.remote.disk import connect
from nbdserve.wire.uri import NbdUri
from tests.helpers.servers import nbdserve, qemu_nbd

MIB = 1 << 20


@contextmanager
def nbdkit(folder: Path, *words: str) -> Iterator[NbdUri]:
    """Run nbdkit on a Unix socket."""
    path = folder / "nbdkit.sock"
    process = subprocess.Popen(["nbdkit", "-f", "-U", str(path), *words])
    try:
        deadline = time.monotonic() + 30
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield NbdUri("", socket_path=str(path))
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.parametrize("kind", ["nbdserve", "qemu-nbd"])
@pytest.mark.parametrize("transport", ["unix", "tcp"])
async def test_what_is_written_is_read(
    kind: str, transport: str, tmp_path: Path
) -> None:
    image = tmp_path / "disk.raw"
    image.touch()
    os.truncate(image, 8 * MIB)
    if kind == "nbdserve":
        server = nbdserve(
            image, tmp_path / "run", image_format="raw", transports=[transport]
        )
    else:
        server = qemu_nbd(
            image, tmp_path / "run", image_format="raw", transport=transport
        )
    with server:
        uri = NbdUri("disk", host="127.0.0.1", port=server.port or 0)
        if transport == "unix":
            uri = NbdUri("disk", socket_path=str(server.unix))
        async with await connect(uri, read_only=False) as disk:
            assert disk.size == 8 * MIB
            data = bytes(range(256)) * (3 * MIB // 256)
            await disk.write(MIB, data)
            await disk.write_zeroes(2 * MIB, 4096)
            await disk.flush()
            assert await disk.read(MIB, len(data)) == (
                data[:MIB] + bytes(4096) + data[MIB + 4096 :]
            )
            (hole, *_) = await disk.block_status(0, 8 * MIB)
            assert hole.zero
            assert hole.length <= MIB
    expected = bytearray(8 * MIB)
    expected[MIB : 4 * MIB] = data
    expected[2 * MIB : 2 * MIB + 4096] = bytes(4096)
    assert image.read_bytes() == expected


async def test_a_server_with_large_blocks_is_asked_for_whole_ones(
    tmp_path: Path,
) -> None:
    policy = ["--filter=blocksize-policy", "blocksize-minimum=64k"]
    policy += ["blocksize-preferred=64k", "blocksize-maximum=1M"]
    words = [*policy, "blocksize-error-policy=error"]
    with nbdkit(tmp_path, "pattern", "4M", *words) as uri:
        async with await connect(uri) as disk:
            assert disk.minimum_block == 65536
            assert sum(
                each.length for each in await disk.block_status(4097, 100_000)
            ) in range(1, 100_001)
            for offset, length in ((0, 16), (65528, 2 * MIB + 16), (4 * MIB - 8, 8)):
                data = await disk.read(offset, length)
                expected = b"".join(
                    number.to_bytes(8, "big")
                    for number in range(offset, offset + length, 8)
                )
                assert data == expected


async def test_a_server_without_extensions_is_enough(tmp_path: Path) -> None:
    words = ["--no-sr", "--filter=nozero", "--filter=noextents", "memory", "1M"]
    with nbdkit(tmp_path, *words) as uri:
        async with await connect(uri, read_only=False) as disk:
            await disk.write(0, b"x" * MIB)
            await disk.write_zeroes(512, MIB - 1024)
            assert (
                await disk.read(0, MIB) == b"x" * 512 + bytes(MIB - 1024) + b"x" * 512
            )
            (extent,) = await disk.block_status(0, MIB)
            assert extent.data
            assert not extent.zero
            with pytest.raises(RequestError) as caught:
                await disk.write_zeroes(0, 512, fast_only=True)
            assert caught.value.errno == errno.ENOTSUP


async def test_an_error_ends_one_request_only(tmp_path: Path) -> None:
    words = ["--filter=error", "memory", "1M", "error-pwrite=ENOSPC"]
    with nbdkit(tmp_path, *words, "error-pwrite-rate=100%") as uri:
        async with await connect(uri, read_only=False) as disk:
            with pytest.raises(RequestError) as caught:
                await disk.write(0, b"x")
            assert caught.value.errno == errno.ENOSPC
            assert await disk.read(0, 4) == bytes(4)


async def test_a_read_only_export_is_not_opened_for_writing(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "-r", "memory", "1M") as uri:
        with pytest.raises(ConfigError, match="read-only"):
            await connect(uri, read_only=False)
        async with await connect(uri) as disk:
            with pytest.raises(RequestError):
                await disk.write(0, b"x")


async def test_a_server_that_dies_fails_what_is_under_way(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(MIB))
    server = nbdserve(image, tmp_path / "run", image_format="raw").start()
    disk = await connect(NbdUri("disk", socket_path=str(server.unix)))
    try:
        assert await disk.read(0, 4) == bytes(4)
        server.kill()
        with pytest.raises(OSError, match="connection is lost"):
            await disk.read(0, 4)
        # and at once from then on
        with pytest.raises(OSError, match="connection is lost"):
            await disk.read(0, 4)
    finally:
        await disk.close()


async def test_what_is_no_server_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        await connect(NbdUri("", socket_path=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="TLS is not supported"):
        await connect(NbdUri("", host="127.0.0.1", tls=True))
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match="no NBD server"):
            await connect(NbdUri("", host="127.0.0.1", port=port))
        thread.join(30)


async def test_an_unknown_export_is_refused_in_the_words_of_the_server(
    tmp_path: Path,
) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(MIB))
    with (
        nbdserve(image, tmp_path / "run", image_format="raw") as server,
        pytest.raises(ConfigError, match="NBD_REP_ERR_UNKNOWN"),
    ):
        await connect(NbdUri("nothing", socket_path=str(server.unix)))
