"""The client's transmission phase against bytes by hand, and against our replies."""

import random
import struct
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.errors import ProtocolError
from nbdserve.wire import replies
from nbdserve.wire.client_transmission import ClientTransmission, Reply
from nbdserve.wire.constants import ChunkType, Command, CommandFlag, NbdError

DF = CommandFlag.DF
REQ_ONE = CommandFlag.REQ_ONE


def structured(*context_ids: int) -> ClientTransmission:
    return ClientTransmission(structured=True, context_ids=context_ids)


def received(client: ClientTransmission, *data: bytes) -> Reply:
    """Feed replies; return the one that this completes."""
    client.feed(b"".join(data))
    reply = client.next_reply()
    assert reply is not None
    assert client.next_reply() is None
    return reply


def refused(client: ClientTransmission, *data: bytes) -> str:
    """Feed replies that break the protocol; return how the client puts it."""
    client.feed(b"".join(data))
    with pytest.raises(ProtocolError) as problem:
        client.next_reply()
    return str(problem.value)


def chunk(cookie: int, kind: int, payload: bytes, *, done: bool = True) -> bytes:
    header = struct.pack(">IHHQI", 0x668E33EF, done, kind, cookie, len(payload))
    return header + payload


def data(cookie: int, offset: int, content: bytes, *, done: bool = False) -> bytes:
    return chunk(cookie, 1, struct.pack(">Q", offset) + content, done=done)


def hole(cookie: int, offset: int, length: int, *, done: bool = False) -> bytes:
    return chunk(cookie, 2, struct.pack(">QI", offset, length), done=done)


def test_requests_as_bytes() -> None:
    client = ClientTransmission()
    client.write(4096, b"data", flags=CommandFlag.FUA)
    client.read(0, 512)
    client.write_zeroes(512, 2**32 - 1, flags=CommandFlag.NO_HOLE)
    client.trim(1, 2)
    client.cache(3, 4)
    client.block_status(5, 6, flags=REQ_ONE)
    client.flush()
    client.disconnect()

    assert client.data_to_send() == bytes.fromhex(
        "25609513 0001 0001 0000000000000001 0000000000001000 00000004 64617461"
        "25609513 0000 0000 0000000000000002 0000000000000000 00000200"
        "25609513 0002 0006 0000000000000003 0000000000000200 ffffffff"
        "25609513 0000 0004 0000000000000004 0000000000000001 00000002"
        "25609513 0000 0005 0000000000000005 0000000000000003 00000004"
        "25609513 0008 0007 0000000000000006 0000000000000005 00000006"
        "25609513 0000 0003 0000000000000007 0000000000000000 00000000"
        "25609513 0000 0002 0000000000000008 0000000000000000 00000000"
    )
    assert client.data_to_send() == b""
    assert client.in_flight == 7


def test_simple_replies_come_in_any_order_and_byte_by_byte() -> None:
    client = ClientTransmission()
    first, second, third = client.read(0, 4), client.flush(), client.read(4, 4)
    stream = bytes.fromhex(
        "67446698 00000000 0000000000000003 61626364"
        "67446698 00000016 0000000000000001"
        "67446698 00000000 0000000000000002"
    )
    came = []
    for position in range(len(stream)):
        client.feed(stream[position : position + 1])
        if (reply := client.next_reply()) is not None:
            came.append((reply.request.cookie, reply.error, bytes(reply.data)))

    assert came == [(third, 0, b"abcd"), (first, 22, b""), (second, 0, b"")]
    assert client.in_flight == 0


def test_chunks_of_a_read_are_put_together_in_any_order() -> None:
    client = structured()
    cookie, other = client.read(1000, 12), client.flush()
    reply = received(
        client,
        data(cookie, 1008, b"ijkl"),
        hole(cookie, 1004, 4),
        data(cookie, 1000, b"abcd"),
        chunk(cookie, 0, b""),
    )
    assert bytes(reply.data) == b"abcd\0\0\0\0ijkl"
    assert reply.holes == [(1004, 4)]
    assert reply.chunks == [1, 2, 1, 0]
    assert received(client, chunk(other, 0, b"")).request.cookie == other


def test_chunks_come_byte_by_byte() -> None:
    client = structured()
    cookie = client.read(0, 6)
    stream = data(cookie, 0, b"ab") + hole(cookie, 2, 4) + chunk(cookie, 0, b"")
    for position in range(len(stream)):
        assert client.next_reply() is None
        client.feed(stream[position : position + 1])
    reply = client.next_reply()
    assert reply is not None
    assert bytes(reply.data) == b"ab\0\0\0\0"


def test_chunks_of_two_reads_may_alternate() -> None:
    client = structured()
    one, two = client.read(0, 2), client.read(0, 2)
    client.feed(data(one, 0, b"a") + data(two, 1, b"y") + data(one, 1, b"b", done=True))
    first = client.next_reply()
    assert first is not None
    assert bytes(first.data) == b"ab"
    assert bytes(received(client, data(two, 0, b"x", done=True)).data) == b"xy"


def test_a_read_of_nothing_is_complete_with_a_none_chunk() -> None:
    client = structured()
    assert received(client, chunk(client.read(0, 0), 0, b"")).data == b""


def test_errors_have_text_and_offset() -> None:
    client = structured()
    write, read = client.write(0, b"x"), client.read(0, 8)
    reply = received(client, replies.error_chunk(write, NbdError.ENOSPC, "full"))
    assert (reply.error, reply.text, reply.error_offset) == (28, "full", None)
    reply = received(
        client, data(read, 0, b"ab"), replies.error_chunk(read, 5, "torn", offset=2)
    )
    assert (reply.error, reply.text, reply.error_offset) == (5, "torn", 2)
    assert reply.chunks == [ChunkType.OFFSET_DATA, ChunkType.ERROR_OFFSET]


def test_an_error_chunk_of_unknown_type_is_an_error_all_the_same() -> None:
    client = structured()
    payload = struct.pack(">IH", 5, 2) + b"hmmore"
    assert received(client, chunk(client.flush(), 0x8777, payload)).text == "hm"


def test_block_status_of_several_contexts() -> None:
    client = structured(1, 2)
    cookie = client.block_status(0, 1000)
    reply = received(
        client,
        replies.block_status_chunk(cookie, 2, [(4096, 1)], done=False),
        replies.block_status_chunk(cookie, 1, [(512, 0), (488, 3)], done=True),
    )
    assert reply.statuses == {1: [(512, 0), (488, 3)], 2: [(4096, 1)]}


def test_with_structured_replies_a_read_never_gets_a_simple_reply() -> None:
    for error in (0, NbdError.EINVAL):
        client = structured()
        simple = replies.simple_reply(client.read(0, 4), error)
        assert "a structured one is due" in refused(client, simple)
    client = structured()
    assert received(client, replies.simple_reply(client.flush())).error == 0


def test_without_structured_replies_a_chunk_is_refused() -> None:
    client = ClientTransmission()
    assert "0x668e33ef" in refused(client, chunk(client.flush(), 0, b""))


@pytest.mark.parametrize(
    "chunks",
    [
        [(1, struct.pack(">Q", 100))],
        [(1, b"short")],
        [(1, struct.pack(">Q", 99) + b"a")],
        [(1, struct.pack(">Q", 104) + b"abcde")],
        [(1, struct.pack(">Q", 2**64 - 1) + b"a")],
        [(2, struct.pack(">QI", 100, 0))],
        [(2, struct.pack(">QI", 100, 9))],
        [(2, struct.pack(">QIB", 100, 4, 0))],
        [(1, struct.pack(">Q", 102) + b"abc"), (1, struct.pack(">Q", 100) + b"abc")],
        [(1, struct.pack(">Q", 100) + b"abc"), (2, struct.pack(">QI", 102, 4))],
        [(1, struct.pack(">Q", 100) + b"abc"), (0, b"")],
        [(0, b"x")],
        [(5, struct.pack(">III", 1, 8, 0))],
        [(3, b"")],
        [(0x8001, struct.pack(">IH", 0, 0))],
        [(0x8001, struct.pack(">IH", 5, 1))],
        [(0x8001, struct.pack(">IH", 5, 0) + b"x")],
        [(0x8001, b"\0")],
        [(0x8001, struct.pack(">IH", 5, 4097) + bytes(4097))],
        [(0x8002, struct.pack(">IHI", 5, 0, 100))],
        [],
    ],
)
def test_a_reply_to_a_read_that_breaks_the_protocol_is_refused(
    chunks: list[tuple[int, bytes]],
) -> None:
    client = structured()
    cookie = client.read(100, 8)
    stream = [
        chunk(cookie, kind, payload, done=kind == 0 or (kind, payload) == chunks[-1])
        for kind, payload in chunks
    ]
    refused(client, *(stream or [chunk(cookie, 0, b"")]))


def test_with_df_there_is_one_content_chunk() -> None:
    client = structured()
    cookie = client.read(0, 2, flags=DF)
    assert "DF" in refused(client, data(cookie, 0, b"a"), data(cookie, 1, b"b"))


@pytest.mark.parametrize(
    ("flags", "payload"),
    [
        (0, struct.pack(">I", 1)),
        (0, struct.pack(">IIII", 1, 8, 0, 8)),
        (0, struct.pack(">III", 7, 1000, 0)),
        (0, struct.pack(">III", 1, 0, 0)),
        (0, struct.pack(">IIIII", 1, 1000, 0, 1, 0)),
        (REQ_ONE, struct.pack(">IIIII", 1, 500, 0, 500, 1)),
        (REQ_ONE, struct.pack(">III", 1, 1001, 0)),
    ],
)
def test_a_status_that_breaks_the_protocol_is_refused(
    flags: int, payload: bytes
) -> None:
    client = structured(1)
    cookie = client.block_status(0, 1000, flags=flags)
    refused(client, chunk(cookie, 5, payload))


def test_a_status_has_each_context_exactly_once() -> None:
    missing, twice = structured(1, 2), structured(1)
    status = struct.pack(">III", 1, 1000, 0)
    refused(missing, chunk(missing.block_status(0, 1000), 5, status))
    cookie = twice.block_status(0, 1000)
    refused(twice, chunk(cookie, 5, status, done=False), chunk(cookie, 5, status))
    none = structured(1)
    refused(none, replies.simple_reply(none.block_status(0, 1000)))


def test_strange_magics_cookies_and_lengths_are_refused() -> None:
    assert "reply magic" in refused(structured(), b"HTTP/1.1 400")
    assert "unknown cookie" in refused(structured(), replies.simple_reply(77))
    assert "unknown cookie" in refused(structured(), chunk(77, 0, b""))
    client = structured()
    endless = struct.pack(">IHHQI", 0x668E33EF, 1, 1, client.read(0, 8), 0xFFFFFFFF)
    assert "announces 4294967295 bytes" in refused(client, endless)
    open_end = structured()
    assert "NONE" in refused(open_end, chunk(open_end.flush(), 0, b"", done=False))


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.builds(
                chunk,
                st.integers(1, 3),
                st.sampled_from([0, 1, 2, 5, 0x8001, 0x8002]),
                st.binary(max_size=24),
                done=st.booleans(),
            ),
        ),
        max_size=6,
    )
)
def test_garbage_is_a_reply_or_a_protocol_error(stream: list[bytes]) -> None:
    client = structured(1)
    client.read(0, 8)
    client.block_status(0, 8)
    client.flush()
    with suppress(ProtocolError):
        for piece in stream:
            client.feed(piece)
            while client.next_reply() is not None:
                pass


@given(
    st.binary(min_size=1, max_size=200),
    st.integers(0, 2**63),
    st.sets(st.integers(1, 199)),
    st.randoms(use_true_random=False),
)
def test_any_split_of_a_read_gives_the_same_bytes(
    content: bytes, offset: int, cuts: set[int], order: random.Random
) -> None:
    client = structured()
    cookie = client.read(offset, len(content))
    edges = sorted({0, len(content)} | {cut for cut in cuts if cut < len(content)})
    pieces = list(pairwise(edges))
    order.shuffle(pieces)
    stream = bytearray()
    for start, end in pieces:
        part = content[start:end]
        if any(part):
            stream += replies.data_header(
                cookie, offset + start, end - start, done=False
            )
            stream += part
        else:
            stream += replies.hole_chunk(
                cookie, offset + start, end - start, done=False
            )
    reply = received(client, bytes(stream), replies.done_chunk(cookie))
    assert bytes(reply.data) == content
    assert reply.request.command == Command.READ
