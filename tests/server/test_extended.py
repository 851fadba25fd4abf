"""Extended headers, seen on the wire: bytes by hand, and our own client role."""

import asyncio
import struct

import pytest

from nbdserve.block.extents import Extent
from nbdserve.exports.export import Export
from nbdserve.wire.client_handshake import OptionRefused, info_data
from nbdserve.wire.constants import (
    BASE_ALLOCATION,
    ChunkType,
    Command,
    CommandFlag,
    NbdError,
    Option,
    TransmissionFlag,
)
from tests.helpers.nbd_client import NbdClient, NbdRequestFailed
from tests.server.conftest import MIB, Running
from tests.server.memory_disk import MemoryDisk

DEPTH = "qemu:allocation-depth"
BITMAP = "qemu:dirty-bitmap:b0"
ALL = (BASE_ALLOCATION, DEPTH, BITMAP)
TIB = 1 << 40


@pytest.fixture
def big(running: Running) -> MemoryDisk:
    """A second export, larger than 32 bits can say."""
    disk = MemoryDisk(MIB)
    disk.size = 8 * TIB
    disk.extents = [
        Extent(5 * TIB, data=False, zero=True, present=False),
        Extent(3 * TIB, data=True, zero=False, depth=1),
    ]
    running.registry.add(
        Export("big", disk, allocation_depth=True, bitmaps=["b0", "b1"])
    )
    return disk


async def exactly(client: NbdClient, length: int) -> bytes:
    data = b""
    async with asyncio.timeout(10):
        while len(data) < length:
            piece = await asyncio.get_running_loop().sock_recv(
                client.sock, length - len(data)
            )
            assert piece, f"closed after {data.hex()}"
            data += piece
    return data


async def raw(running: Running, name: str) -> NbdClient:
    """A client in the transmission phase that nothing reads replies for."""
    client = await running.connect()
    await client.option(Option.EXTENDED_HEADERS)
    client.handshake.ask(Option.GO, info_data(name))
    await client._send_raw(client.handshake.data_to_send())
    while client.handshake.outcome() is None:
        client.handshake.feed(await client._receive_raw())
    return client


def header(flags: int, command: int, cookie: int, offset: int, length: int) -> str:
    numbers = struct.pack(">HHQQQ", flags, command, cookie, offset, length)
    return "21e41c71" + numbers.hex()


async def test_the_bytes_of_the_specification(running: Running) -> None:
    client = await raw(running, "disk")
    conversation = [
        # WRITE with PAYLOAD_LEN | FUA, 4 bytes at 0x10
        (
            "21e41c71 0021 0001 00000000000000aa 0000000000000010 0000000000000004 deadbeef",
            # NONE, DONE, cookie, the request's offset, no payload
            "6e8a278c 0001 0000 00000000000000aa 0000000000000010 0000000000000000",
        ),
        # READ, 4 bytes at 0x10
        (
            "21e41c71 0000 0000 00000000000000ab 0000000000000010 0000000000000004",
            # OFFSET_DATA, DONE, 12 bytes: the data's offset, the data
            "6e8a278c 0001 0001 00000000000000ab 0000000000000010 000000000000000c 0000000000000010 deadbeef",
        ),
        # FLUSH
        (
            "21e41c71 0000 0003 00000000000000ac 0000000000000000 0000000000000000",
            "6e8a278c 0001 0000 00000000000000ac 0000000000000000 0000000000000000",
        ),
    ]
    for request, reply in conversation:
        await client._send_raw(bytes.fromhex(request))
        expected = bytes.fromhex(reply)
        assert (await exactly(client, len(expected))).hex() == expected.hex()
    assert running.disk.calls[0] == ("write", 0x10, 4, True)


@pytest.mark.parametrize(
    ("request_hex", "payload"),
    [
        pytest.param(header(0, Command.WRITE, 7, 0, 0), b"", id="write-without-flag"),
        pytest.param(header(32, Command.READ, 7, 0, 9), b"x" * 9, id="read"),
        pytest.param(header(32, Command.FLUSH, 7, 0, 9), b"x" * 9, id="flush"),
        pytest.param(header(32, Command.TRIM, 7, 0, 70000), b"x" * 70000, id="trim"),
        pytest.param(header(32, 99, 7, 0, 500), b"x" * 500, id="unknown"),
        pytest.param(header(0, 99, 7, 0, 2**63), b"", id="unknown-without"),
        pytest.param(header(32, Command.BLOCK_STATUS, 7, 0, 12), b"x" * 12, id="status"),
        pytest.param(header(0, Command.READ, 7, 0, 2**63), b"", id="huge-read"),
    ],
)  # fmt: skip
async def test_payloads_are_consumed_and_the_stream_stays_in_step(
    running: Running, request_hex: str, payload: bytes
) -> None:
    client = await raw(running, "disk")
    await client._send_raw(bytes.fromhex(request_hex) + payload)
    reply = await exactly(client, 32)
    magic, flags, kind, cookie, offset, length = struct.unpack(">IHHQQQ", reply)
    assert (magic, flags, kind, cookie, offset) == (
        0x6E8A278C, 1, ChunkType.ERROR, 7, 0,
    )  # fmt: skip
    error, text_length = struct.unpack_from(">IH", await exactly(client, length))
    assert (error, length) == (NbdError.EINVAL, 6 + text_length)
    await client._send_raw(bytes.fromhex(header(0, Command.READ, 8, 5, 3)))
    assert (await exactly(client, 43))[-3:] == bytes(running.disk.data[5:8])


async def test_a_payload_larger_than_the_maximum_ends_the_connection(
    running: Running,
) -> None:
    client = await raw(running, "disk")
    await client._send_raw(bytes.fromhex(header(32, 99, 7, 0, 64 * MIB + 1)))
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(10):
        while await loop.sock_recv(client.sock, 65536):
            pass


async def test_lengths_of_64_bits(running: Running, big: MemoryDisk) -> None:
    client = await running.connect()
    await client.go("big", extended=True)
    await client.trim(TIB, 6 * TIB)
    await client.write_zeroes(0, 8 * TIB, flags=CommandFlag.NO_HOLE)
    await client.cache(1, 5 * TIB)
    assert big.calls == [
        ("trim", TIB, 6 * TIB, False),
        ("write_zeroes", 0, 8 * TIB, False, False, False),
        ("cache", 1, 5 * TIB),
    ]
    assert await client.block_status(0, 8 * TIB) == [(5 * TIB, 3), (3 * TIB, 0)]
    with pytest.raises(NbdRequestFailed) as refused:
        await client.trim(1, 8 * TIB)
    assert refused.value.error == NbdError.EINVAL


async def test_several_contexts_and_a_payload_that_filters_them(
    running: Running, big: MemoryDisk
) -> None:
    client = await running.connect()
    details = await client.go("big", extended=True, contexts=ALL)
    assert details.transmission_flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD
    await client.write_zeroes(65536, 1)
    allocation = [(5 * TIB, 3), (3 * TIB, 0)]
    depth = [(5 * TIB, 0), (3 * TIB, 2)]
    dirty = [(65536, 0), (65536, 1), (8 * TIB - 131072, 0)]
    everything = dict(zip(ALL, [allocation, depth, dirty], strict=True))
    assert await client.block_statuses(0, 8 * TIB) == everything
    for wanted in ([DEPTH], [BITMAP, BASE_ALLOCATION], list(ALL)):
        expected = {name: everything[name] for name in ALL if name in wanted}
        assert await client.block_statuses(0, 8 * TIB, contexts=wanted) == expected
    one = CommandFlag.REQ_ONE
    assert await client.block_statuses(
        65536, TIB, flags=one, contexts=[BITMAP, DEPTH]
    ) == {BITMAP: [(65536, 1)], DEPTH: [(TIB, 0)]}


@pytest.mark.parametrize(
    "ids", [[], [1, 1], [1, 2, 9], [1, 2, 3, 1]], ids=["none", "twice", "9", "many"]
)
async def test_a_wrong_filter_is_consumed_and_refused(
    running: Running, big: MemoryDisk, ids: list[int]
) -> None:
    client = await running.connect()
    await client.go("big", extended=True, contexts=ALL)
    cookie = client.transmission.block_status(0, 4096, context_ids=ids)
    reply = client.reply_to(cookie)
    await client.send_queued()
    assert (await reply).error == NbdError.EINVAL
    assert await client.block_status(0, 10) == [(10, 3)]


@pytest.mark.parametrize("waiting", [False, True])
async def test_reads_with_holes_and_without(running: Running, waiting: bool) -> None:
    disk = running.disk
    disk.holes = [(4096, 8192), (20480, 512)]
    for start, length in disk.holes:
        disk.data[start : start + length] = bytes(length)
    client = await running.connect()
    await client.go("disk", extended=True)
    if waiting:
        disk.gate = asyncio.Event()
        asyncio.get_running_loop().call_later(0.01, disk.gate.set)
    whole = await client.read_reply(0, 65536)
    assert whole.data == disk.data[:65536]
    assert whole.holes == disk.holes
    hole = await client.read_reply(4096, 8192)
    assert hole.chunks == [ChunkType.OFFSET_HOLE]
    assert hole.data == bytes(8192)
    piece = await client.read_reply(0, 65536, flags=CommandFlag.DF)
    assert piece.chunks == [ChunkType.OFFSET_DATA]
    assert piece.data == whole.data
    nothing = await client.read_reply(77, 0)
    assert nothing.chunks == [ChunkType.NONE]
    assert nothing.data == b""
    large = await client.read_reply(3, 3 * MIB)
    assert large.data == disk.data[3 : 3 + 3 * MIB]
    disk.holes = []
    data = bytes(reversed(range(256))) * 2000
    await client.write(11, data)
    assert await client.read(11, len(data)) == data


async def test_errors_echo_the_offset(running: Running) -> None:
    running.disk.failure = OSError(28, "No space left on device")
    client = await running.connect()
    await client.go("disk", extended=True)  # the client role checks every offset
    cookies = [
        client.transmission.write(4096, b"x"),
        client.transmission.read(8192, 10),
        client.transmission.flush(),
        client.transmission.block_status(512, 10),
    ]
    replies = [client.reply_to(cookie) for cookie in cookies]
    await client.send_queued()
    for reply in await asyncio.gather(*replies):
        assert reply.error == NbdError.ENOSPC


async def test_which_options_exclude_each_other(running: Running) -> None:
    client = await running.connect()
    with pytest.raises(OptionRefused, match="INVALID"):
        await client.option(Option.EXTENDED_HEADERS, b"x")
    await client.option(
        Option.STRUCTURED_REPLY
    )  # "MAY request structured replies first"
    await client.option(Option.EXTENDED_HEADERS)
    with pytest.raises(OptionRefused, match="INVALID"):
        await client.option(Option.EXTENDED_HEADERS)
    with pytest.raises(OptionRefused, match="EXT_HEADER_REQD"):
        await client.option(Option.STRUCTURED_REPLY)
    with pytest.raises(ConnectionResetError):
        await client.option(Option.EXPORT_NAME, b"disk")


async def test_the_filter_is_advertised_only_with_contexts(running: Running) -> None:
    payload = TransmissionFlag.BLOCK_STATUS_PAYLOAD
    client = await running.connect()
    assert not (await client.info("disk")).transmission_flags & payload
    details = await client.go("disk", extended=True, contexts=())
    assert not details.transmission_flags & payload
    assert details.transmission_flags & TransmissionFlag.SEND_DF
    compact = await running.client()
    assert not compact.details.transmission_flags & payload
