"""Extended headers without a socket: bytes by hand, the judge, a strict client."""

import struct

import pytest

from nbdserve.errors import ProtocolError
from nbdserve.server.framing import EXTENDED_DATA_HEADER, frame_chunks
from nbdserve.wire.answers import answers
from nbdserve.wire.client_transmission import ClientTransmission
from nbdserve.wire.constants import (
    ChunkType,
    Command,
    CommandFlag,
    NbdError,
    TransmissionFlag,
)
from nbdserve.wire.requests import StatusPayload, parse_status_payload
from nbdserve.wire.transmission import drain_length
from nbdserve.wire.validate import ExportFacts, judge_extended

F = TransmissionFlag
TIB = 1 << 40
FACTS = ExportFacts(
    8 * TIB,
    F.HAS_FLAGS | F.SEND_TRIM | F.SEND_WRITE_ZEROES | F.SEND_CACHE | F.SEND_DF
    | F.BLOCK_STATUS_PAYLOAD,
    structured=True,
    meta_contexts=2,
    extended=True,
)  # fmt: skip
PAYLOAD_LEN = CommandFlag.PAYLOAD_LEN
COOKIE = 0x0102030405060708
HEAD = "6e8a278c {} {} 0102030405060708 0000010000000000 {}"


def chunk(flags: int, kind: int, payload: str) -> bytes:
    data = bytes.fromhex(payload)
    length = f"{len(data):016x}"
    return bytes.fromhex(HEAD.format(f"{flags:04x}", f"{kind:04x}", length)) + data


def test_answers_as_bytes() -> None:
    extended = answers(structured=True, extended=True)
    assert extended.done(COOKIE, TIB) == chunk(1, 0, "")
    assert extended.error(COOKIE, TIB, 22, "bad") == chunk(
        1, 0x8001, "00000016 0003 626164"
    )
    statuses = [(1, [(5 * TIB, 3), (512, 0)]), (2, [(TIB, 1 << 31)])]
    assert extended.statuses(COOKIE, TIB, statuses) == chunk(
        0, 6, "00000001 00000002 0000050000000000 0000000000000003"
              "0000000000000200 0000000000000000",
    ) + chunk(1, 6, "00000002 00000001 0000010000000000 0000000080000000")  # fmt: skip


def test_what_was_not_negotiated_is_not_used() -> None:
    simple = answers(structured=False, extended=False)
    structured = answers(structured=True, extended=False)
    assert simple.done(7, 1) == structured.done(7, 1)
    assert simple.error(7, 1, 5, "text")[:4] == bytes.fromhex("67446698")
    assert structured.error(7, 1, 5, "text")[:4] == bytes.fromhex("668e33ef")
    kinds = structured.statuses(7, 1, [(1, [(512, 0)]), (2, [(512, 1)])])
    assert kinds == bytes.fromhex(
        "668e33ef 0000 0005 0000000000000007 0000000c 00000001 00000200 00000000"
        "668e33ef 0001 0005 0000000000000007 0000000c 00000002 00000200 00000001"
    )
    with pytest.raises(TypeError):
        simple.statuses(7, 1, [(1, [(512, 0)])])


def test_a_read_with_a_hole_as_bytes() -> None:
    view = memoryview(bytearray(b"\xee" * 2048))
    data = EXTENDED_DATA_HEADER
    view[data : data + 1536] = b"A" * 512 + bytes(512) + b"B" * 512
    parts = frame_chunks(view, 0, COOKIE, TIB, 1536, [(512, 512)], extended=True)
    sent = b"".join(view[start:end] for start, end in parts)
    assert sent == (
        chunk(0, 1, "0000010000000000" + "41" * 512)
        + chunk(0, 2, "0000010000000200 00000200")
        + chunk(1, 1, "0000010000000400" + "42" * 512)
    )


@pytest.mark.parametrize(
    ("command", "flags", "offset", "length", "error"),
    [
        (Command.WRITE, PAYLOAD_LEN, 0, 512, None),
        (Command.WRITE, 0, 0, 512, NbdError.EINVAL),
        (Command.WRITE, 0, 0, 0, NbdError.EINVAL),
        (Command.WRITE, PAYLOAD_LEN, 8 * TIB, 512, NbdError.ENOSPC),
        (Command.READ, 0, 0, 64 << 20, None),
        (Command.READ, 0, 0, (64 << 20) + 1, NbdError.EINVAL),
        (Command.READ, PAYLOAD_LEN, 0, 512, NbdError.EINVAL),
        (Command.TRIM, 0, 0, 8 * TIB, None),
        (Command.TRIM, 0, 1, 8 * TIB, NbdError.EINVAL),
        (Command.TRIM, 0, 0, (1 << 64) - 1, NbdError.EINVAL),
        (Command.WRITE_ZEROES, 0, TIB, 7 * TIB, None),
        (Command.WRITE_ZEROES, PAYLOAD_LEN, 0, 512, NbdError.EINVAL),
        (Command.BLOCK_STATUS, 0, 0, 8 * TIB, None),
        (Command.BLOCK_STATUS, PAYLOAD_LEN, 0, 12, None),
        (Command.BLOCK_STATUS, PAYLOAD_LEN, 0, 16, None),
        (Command.BLOCK_STATUS, PAYLOAD_LEN, 0, 8, NbdError.EINVAL),
        (Command.BLOCK_STATUS, PAYLOAD_LEN, 0, 13, NbdError.EINVAL),
        (Command.BLOCK_STATUS, PAYLOAD_LEN, 0, 20, NbdError.EINVAL),
        (99, PAYLOAD_LEN, 0, 20, NbdError.EINVAL),
        (Command.DISC, 0, 0, 0, None),
    ],
)
def test_the_judge(
    command: int, flags: int, offset: int, length: int, error: NbdError | None
) -> None:
    refusal = judge_extended(FACTS, command, int(flags), offset, length)
    assert (refusal and refusal.error) == error


def test_a_read_only_export_refuses_a_write_before_its_flags() -> None:
    facts = ExportFacts(512, F.HAS_FLAGS | F.READ_ONLY, structured=True, extended=True)
    refusal = judge_extended(facts, Command.WRITE, 0, 0, 0)
    assert refusal is not None
    assert refusal.error == NbdError.EPERM


def test_the_filter_needs_its_transmission_flag() -> None:
    facts = ExportFacts(
        512, F.HAS_FLAGS, structured=True, meta_contexts=1, extended=True
    )
    refusal = judge_extended(facts, Command.BLOCK_STATUS, int(PAYLOAD_LEN), 0, 12)
    assert refusal is not None
    assert refusal.error == NbdError.EINVAL


def test_the_payload_of_block_status() -> None:
    data = bytes.fromhex("0000050000000000 00000001 80000002")
    assert parse_status_payload(data) == StatusPayload(5 * TIB, (1, 0x80000002))


def test_a_payload_is_consumed_up_to_the_maximum() -> None:
    for command in (Command.READ, Command.WRITE, 99):
        flag = int(PAYLOAD_LEN)
        assert (
            drain_length(command, flag, 1000, extended=True, max_payload=1000) == 1000
        )
        assert drain_length(command, 0, 1 << 60, extended=True, max_payload=1000) == 0
        with pytest.raises(ProtocolError, match="announces 1001 bytes"):
            drain_length(command, flag, 1001, extended=True, max_payload=1000)


def received(reply: bytes, *, length: int = 512) -> ClientTransmission:
    client = ClientTransmission(structured=True, extended=True, context_ids=[1])
    client._next_cookie = COOKIE
    client.block_status(TIB, length)
    client.feed(reply)
    return client


def test_the_client_takes_what_is_right() -> None:
    status = "00000001 00000001 0000000000000200 0000000000000003"
    reply = received(chunk(1, 6, status)).next_reply()
    assert reply is not None
    assert reply.statuses == {1: [(512, 3)]}
    assert reply.chunks == [ChunkType.BLOCK_STATUS_EXT]


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(chunk(1, 6, "00000001 00000002" + "00" * 15 + "01"), id="count"),
        pytest.param(chunk(1, 6, "00000001 00000001" + "00" * 16), id="no-length"),
        pytest.param(chunk(1, 6, "00000001 00000000"), id="no-extent"),
        pytest.param(chunk(1, 5, "00000001 00000200 00000000"), id="compact-status"),
        pytest.param(chunk(1, 0, "")[:16] + bytes(16), id="offset"),
        pytest.param(struct.pack(">IIQ", 0x67446698, 0, COOKIE), id="simple"),
        pytest.param(struct.pack(">IHHQI", 0x668E33EF, 1, 0, COOKIE, 0), id="structured"),
    ],
)  # fmt: skip
def test_the_client_refuses_what_is_wrong(reply: bytes) -> None:
    with pytest.raises(ProtocolError):
        received(reply.ljust(32, b"\0")).next_reply()
