"""The protocol through nbdsh: every command and flag, as libnbd's library sends them.

Each test is a script for nbdsh with the handle `h`. nbdsh runs under Debian's own
Python, which has the binding.
"""

import os
from pathlib import Path

import pytest

from tests.helpers.images import Image
from tests.helpers.servers import Server, server_under_test
from tests.helpers.tools import run

pytestmark = pytest.mark.interop

# Formats that take each command down a different way.
SOME = ["raw", "qcow", "qcow2-v2", "qcow2-v3", "qcow2-over-qcow2", "qcow2-zstd"]

# Before each script. libnbd knows errors by their names.
PRELUDE = """
def refused(code, function, *arguments, **named):
    try:
        function(*arguments, **named)
    except nbd.Error as error:
        assert error.errno == code, f"expected {code}, got {error}"
    else:
        raise AssertionError(f"{function} was not refused with {code}")
"""


def nbdsh(script: str, uri: str | None = None) -> None:
    """Run a script; an assertion in it fails the test with its traceback."""
    connect = ["-u", uri] if uri is not None else []
    environment = {**os.environ, "PATH": "/usr/bin:/bin"}
    run("nbdsh", *connect, "-c", PRELUDE + script, environment=environment)


@pytest.mark.parametrize("image", SOME, indirect=True)
def test_every_command_and_flag(image: Image, server: Server, uri: str) -> None:
    """Each command does what it says, with FUA and the other flags too."""
    nbdsh(
        """
size = h.get_size()
data = bytes(range(256)) * 1024
h.pwrite(data, 70_001)
assert h.pread(len(data), 70_001) == data
h.pwrite(b"durable" * 1000, 3, nbd.CMD_FLAG_FUA)
assert h.pread(7000, 3) == b"durable" * 1000
h.flush()
h.flush()

h.zero(5000, 70_100)
assert h.pread(5000, 70_100) == bytes(5000)
assert h.pread(99, 70_001) == data[:99]
h.zero(300_000, 1 << 20, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
assert h.pread(300_000, 1 << 20) == bytes(300_000)
h.zero(100, 100, nbd.CMD_FLAG_FUA)
assert h.pread(100, 100) == bytes(100)
h.zero(size - (2 << 20), 2 << 20)
assert h.pread(1 << 20, size - (1 << 20)) == bytes(1 << 20)

h.cache(1 << 20, 0)
h.zero(1 << 20, 4 << 20)
h.trim(1 << 20, 4 << 20)
h.trim(65536, 5 << 20, nbd.CMD_FLAG_FUA)
assert h.pread(1 << 20, 4 << 20) == bytes(1 << 20)

h.pwrite(b"last", size - 4)
assert h.pread(4, size - 4) == b"last"
""",
        uri,
    )
    server.stop()
    image.assert_clean()


@pytest.mark.parametrize("image", SOME, indirect=True)
def test_fast_zero_succeeds_or_says_no(server: Server, uri: str) -> None:
    """FAST_ZERO is done or answered ENOTSUP; either way the connection goes on."""
    nbdsh(
        """
assert h.can_fast_zero()
h.pwrite(b"x" * 65536, 0)
try:
    h.zero(65536, 0, nbd.CMD_FLAG_FAST_ZERO)
    assert h.pread(65536, 0) == bytes(65536)
except nbd.Error as error:
    assert error.errno == "ENOTSUP"
    assert h.pread(65536, 0) == b"x" * 65536
""",
        uri,
    )
    server.stop()


@pytest.mark.parametrize("image", ["raw", "qcow2-v3"], indirect=True)
def test_zero_length_requests_keep_the_connection(uri: str) -> None:
    """Nothing is asked for, so nothing is refused loudly enough to disconnect."""
    nbdsh(
        """
h.set_strict_mode(0)
for function in (
    lambda: h.pread(0, 4096),
    lambda: h.pwrite(b"", 4096),
    lambda: h.zero(0, 4096),
    lambda: h.trim(0, 4096),
    lambda: h.cache(0, 4096),
):
    try:
        function()
    except nbd.Error as error:
        assert error.errno == "EINVAL", error
    h.pwrite(b"still here", 0)
    assert h.pread(10, 0) == b"still here"
""",
        uri,
    )


@pytest.mark.parametrize("image", ["raw", "qcow2-v3"], indirect=True)
def test_what_is_refused_and_how(uri: str) -> None:
    """Beyond the end: EINVAL, and ENOSPC for writes; the connection goes on."""
    nbdsh(
        """
h.set_strict_mode(0)
size = h.get_size()
refused("EINVAL", h.pread, 512, size)
refused("EINVAL", h.pread, 512, size - 511)
refused("ENOSPC", h.pwrite, b"x" * 512, size)
refused("ENOSPC", h.pwrite, b"x" * 512, size - 511)
refused("ENOSPC", h.zero, 512, size)
refused("EINVAL", h.trim, 512, size)
refused("EINVAL", h.trim, 512, 1 << 63)
refused("EINVAL", h.block_status, 512, size, lambda *a: 0)
refused("EINVAL", h.pread, 512, 0, nbd.CMD_FLAG_FAST_ZERO)
h.pwrite(b"still here", 0)
assert h.pread(10, 0) == b"still here"
""",
        uri,
    )


@pytest.mark.parametrize("image", ["raw", "qcow2-v3"], indirect=True)
def test_a_read_only_export_refuses_with_eperm(image: Image, tmp_path: Path) -> None:
    """EPERM, as the protocol asks, and not only where the client would stop itself."""
    server = server_under_test(
        image.path,
        tmp_path / "server",
        image_format=image.format,
        transport="unix",
        options=["--read-only"],
    )
    with server:
        nbdsh(
            """
assert h.is_read_only()
assert not h.can_zero()
assert not h.can_trim()
h.set_strict_mode(0)
refused("EPERM", h.pwrite, b"x" * 512, 0)
refused("EPERM", h.zero, 512, 0)
refused("EPERM", h.trim, 512, 0)
h.flush()
h.pread(512, 0)
""",
            server.uri("unix"),
        )
    image.assert_all()


@pytest.mark.parametrize("image", SOME, indirect=True)
def test_structured_reads_have_holes(image: Image, server: Server, uri: str) -> None:
    """Holes arrive as hole chunks; with DF one chunk has it all."""
    # A raw file's holes are the file system's: asking it costs each read a call.
    translated = image.format != "raw"
    nbdsh(
        f"translated = {translated}"
        """
assert h.get_structured_replies_negotiated()
h.zero(1 << 20, 8 << 20)
h.pwrite(b"a" * 65536, 8 << 20)
h.pwrite(b"b" * 65536, (8 << 20) + (512 << 10))

def read(length, offset, flags=0):
    chunks = []
    def chunk(data, at, status, error):
        chunks.append((at, len(data), status))
    content = h.pread_structured(length, offset, chunk, flags)
    return bytes(content), sorted(chunks)

content, chunks = read(1 << 20, 8 << 20)
assert content[:65536] == b"a" * 65536
assert content[512 << 10 : (512 << 10) + 65536] == b"b" * 65536
assert content.count(0) == (1 << 20) - 131072
end = 8 << 20
for at, length, status in chunks:
    assert at == end
    end += length
assert end == 9 << 20
if translated:
    assert any(status == nbd.READ_HOLE for _, _, status in chunks), chunks

again, chunks = read(65536, (8 << 20) + 32768, nbd.CMD_FLAG_DF)
assert again == content[32768 : 32768 + 65536]
assert len(chunks) == 1, chunks
""",
        uri,
    )
    server.stop()
    image.assert_clean()


@pytest.mark.parametrize("image", ["raw", "qcow2-v3"], indirect=True)
def test_block_status_and_req_one(transport: str, server: Server) -> None:
    """Extents tell data from holes, never pass the request, and REQ_ONE gives one."""
    nbdsh(
        f"""
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri("{server.uri(transport)}")
assert h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.zero(4 << 20, 8 << 20)
h.trim(4 << 20, 8 << 20)
h.pwrite(b"d" * 65536, 10 << 20)

def status(length, offset, flags=0):
    found = []
    def extent(context, at, entries, error):
        assert context == nbd.CONTEXT_BASE_ALLOCATION
        assert at == offset
        found.extend(zip(entries[::2], entries[1::2]))
    h.block_status(length, offset, extent, flags)
    return found

hole = nbd.STATE_HOLE | nbd.STATE_ZERO
extents = status(4 << 20, 8 << 20)
assert extents == [(2 << 20, hole), (65536, 0), ((2 << 20) - 65536, hole)], extents
(first,) = status(4 << 20, 8 << 20, nbd.CMD_FLAG_REQ_ONE)
assert first == (2 << 20, hole)
(inside,) = status(1000, (10 << 20) + 5)
assert inside[1] == 0 and inside[0] == 1000
"""
    )


@pytest.mark.parametrize("image", SOME, indirect=True)
def test_pipelined_requests(image: Image, server: Server, uri: str) -> None:
    """Hundreds of requests in flight at once, answered in any order."""
    nbdsh(
        """
import random
generator = random.Random(9)
block = 24 * 1024 + 512
places = list(range(1200))
generator.shuffle(places)

def wait(cookies):
    for cookie in cookies:
        while not h.aio_command_completed(cookie):
            h.poll(-1)

def content(place):
    return bytes([place % 251 + 1]) * block

wait([h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(content(place))), place * block)
      for place in places])
generator.shuffle(places)
buffers = {place: nbd.Buffer(block) for place in places}
wait([h.aio_pread(buffers[place], place * block) for place in places])
for place, buffer in buffers.items():
    assert bytes(buffer.to_bytearray()) == content(place), place
wait([h.aio_zero(block, place * block) for place in places[:200]] + [h.aio_flush()])
for place in places[:200]:
    assert h.pread(block, place * block) == bytes(block)
""",
        uri,
    )
    server.stop()
    image.assert_clean()


@pytest.mark.parametrize(
    "image", ["raw", "qcow2-v3", "qcow2-over-qcow2"], indirect=True
)
def test_connections_see_each_other(server: Server, uri: str) -> None:
    """CAN_MULTI_CONN: what one wrote the other reads and may flush."""
    nbdsh(
        f"""
other = nbd.NBD()
other.connect_uri("{uri}")
assert h.can_multi_conn() and other.can_multi_conn()
for number in range(50):
    data = bytes([number + 1]) * 4096
    h.pwrite(data, number * 70_000)
    other.flush()
    assert other.pread(4096, number * 70_000) == data
other.shutdown()
""",
        uri,
    )
    server.stop()


def test_64_mib_in_one_request(tmp_path: Path, transport: str) -> None:
    """READ and WRITE of 64 MiB work, the most that libnbd sends."""
    path = tmp_path / "large.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "100M")
    server = server_under_test(
        path, tmp_path / "server", image_format="qcow2", transport=transport
    )
    with server:
        nbdsh(
            """
import random
data = random.Random(1).randbytes(1 << 20) * 64
h.pwrite(data, 12_345)
assert h.pread(len(data), 12_345) == data
h.pwrite(data[:49_865_728], 0)
assert h.pread(49_865_728, 0) == data[:49_865_728]
""",
            server.uri(transport),
        )
    run("qemu-img", "check", path)


@pytest.mark.parametrize("image", ["qcow2-v3"], indirect=True)
def test_older_handshakes(transport: str, server: Server) -> None:
    """EXPORT_NAME with and without its 124 zeroes, and simple replies."""
    uri = server.uri(transport)
    nbdsh(
        f"""
for flags in (0, nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE, nbd.HANDSHAKE_FLAG_NO_ZEROES):
    old = nbd.NBD()
    old.set_handshake_flags(flags)
    old.set_request_structured_replies(False)
    old.connect_uri("{uri}")
    assert not old.get_structured_replies_negotiated()
    old.pwrite(b"old" * 1000, 777)
    assert old.pread(3000, 777) == b"old" * 1000
    assert not old.can_df()
    old.shutdown()
"""
    )


@pytest.mark.parametrize("image", ["qcow2-v3"], indirect=True)
def test_option_haggling(transport: str, server: Server) -> None:
    """LIST, INFO, LIST_META_CONTEXT, a refused name, then GO, on one connection."""
    nbdsh(
        f"""
h.set_opt_mode(True)
h.set_full_info(True)
h.connect_uri("{server.uri(transport)}")
names = []
assert h.opt_list(lambda name, description: names.append(name)) == 1
assert names == ["{server.export}"]
contexts = []
h.add_meta_context("base:")
h.opt_list_meta_context(contexts.append)
assert contexts == [nbd.CONTEXT_BASE_ALLOCATION], contexts
h.clear_meta_contexts()

h.set_export_name("no such export")
refused("ENOENT", h.opt_info)
refused("ENOENT", h.opt_go)
h.set_export_name("{server.export}")
h.opt_info()
size = h.get_size()
assert h.get_block_size(nbd.SIZE_MINIMUM) == 1
h.opt_go()
assert h.get_size() == size
assert h.aio_is_ready()
h.pread(512, 0)
h.shutdown()

aborting = nbd.NBD()
aborting.set_opt_mode(True)
aborting.connect_uri("{server.uri(transport)}")
aborting.opt_abort()
"""
    )
