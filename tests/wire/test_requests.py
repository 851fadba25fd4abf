from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.errors import ProtocolError
from nbdserve.wire.constants import Command, CommandFlag
from nbdserve.wire.requests import (
    REQUEST,
    Request,
    bad_magic,
    header_size,
    parse_request,
    payload_length,
)
from nbdserve.wire.transmission import drain_length

# Copied by hand from doc/proto.md, and not built with the code under test.
COMPACT = bytes.fromhex("25609513 0001 0001 0102030405060708 0000000000001000 00000200")
EXTENDED = bytes.fromhex(
    "21e41c71 0000 0007 ffffffffffffffff 0000000000000000 0000000100000000"
)
WRITE = Request(Command.WRITE, 1, 0x0102030405060708, 4096, 512)


@pytest.mark.parametrize(
    ("data", "extended", "expected"),
    [
        (COMPACT, False, WRITE),
        (EXTENDED, True, Request(Command.BLOCK_STATUS, 0, 2**64 - 1, 0, 2**32)),
    ],
    ids=["compact write with FUA", "extended block status of 4 GiB"],
)
def test_a_header_is_the_same_request_wherever_it_stands(
    data: bytes, extended: bool, expected: Request
) -> None:
    assert len(data) == header_size(extended=extended)

    assert parse_request(data, extended=extended) == expected
    assert parse_request(data + b"trailing", extended=extended) == expected
    assert parse_request(b"front" + data, 5, extended=extended) == expected
    buffer = memoryview(bytearray(b"xyz" + data + b"behind"))
    assert parse_request(buffer, 3, extended=extended) == expected


def test_a_batch_is_parsed_by_the_layout_itself() -> None:
    assert REQUEST.size == 28
    assert REQUEST.unpack_from(COMPACT * 2, 28) == (
        0x25609513, 1, 1, 0x0102030405060708, 4096, 512,
    )  # fmt: skip


@pytest.mark.parametrize("extended", [False, True])
def test_the_other_layout_ends_the_connection(extended: bool) -> None:
    data = (COMPACT if extended else EXTENDED).ljust(32, b"\0")
    with pytest.raises(ProtocolError, match="request magic is 0x"):
        parse_request(data, extended=extended)


def test_a_wrong_magic_is_named() -> None:
    assert str(bad_magic(0x12560953)) == "request magic is 0x12560953, not 0x25609513"


@given(st.binary(min_size=32, max_size=32), st.booleans())
def test_garbage_is_a_request_or_a_protocol_error(data: bytes, extended: bool) -> None:
    with suppress(ProtocolError):
        parse_request(data, extended=extended)


@pytest.mark.parametrize(
    ("command", "flags", "extended", "expected"),
    [
        (Command.WRITE, 0, False, 512),
        (Command.WRITE, 0xFFFF, False, 512),
        (Command.READ, 0, False, 0),
        (Command.READ, CommandFlag.PAYLOAD_LEN, False, 0),
        (99, 0, False, 0),
        (Command.WRITE, CommandFlag.PAYLOAD_LEN, True, 512),
        (Command.WRITE, 0, True, 0),
        (99, CommandFlag.PAYLOAD_LEN, True, 512),
    ],
)
def test_only_a_write_has_a_payload_unless_headers_are_extended(
    command: int, flags: int, extended: bool, expected: int
) -> None:
    assert payload_length(command, flags, 512, extended=extended) == expected


def test_the_payload_of_a_refused_write_is_drained_up_to_a_limit() -> None:
    assert drain_length(Command.WRITE, 0, 128 << 20) == 128 << 20
    assert drain_length(Command.WRITE_ZEROES, 0, 2**32 - 1) == 0
    with pytest.raises(ProtocolError, match="NBD_CMD_WRITE announces 134217729 bytes"):
        drain_length(Command.WRITE, 0, (128 << 20) + 1)
