import struct
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.errors import ProtocolError
from nbdserve.wire import options
from nbdserve.wire.constants import Option, OptionReply
from nbdserve.wire.options import InfoRequest, MetaContextRequest, OptionError

# Copied by hand from doc/proto.md: "Option types".
GO = bytes.fromhex("00000004 6469736b 0002 0003 0001")
CONTEXTS = bytes.fromhex(
    "00000004 6469736b 00000002"
    "0000000f 626173653a616c6c6f636174696f6e"
    "00000005 626173653a"
)

Parser = Callable[[bytes], object]


def export_name(data: bytes) -> object:
    return options.parse_export_name(data)


def go(data: bytes) -> object:
    return options.parse_info(Option.GO, data)


def contexts(data: bytes) -> object:
    return options.parse_meta_context(Option.SET_META_CONTEXT, data, 1000)


def refusal(parse: Parser, data: bytes) -> str:
    """Return the text with which `parse` refuses `data` as invalid."""
    with pytest.raises(OptionError) as refused:
        parse(data)
    assert refused.value.reply is OptionReply.ERR_INVALID
    return str(refused.value)


def test_an_option_header() -> None:
    data = bytes.fromhex("49484156454f5054 00000007 0000000e")
    assert options.OPTION.size == 16
    assert options.parse_option_header(data) == (Option.GO, 14)
    assert options.parse_option_header(b"xx" + data + b"yy", 2) == (Option.GO, 14)


def test_a_wrong_option_magic_ends_the_connection() -> None:
    data = bytes.fromhex("49484156454f5055 00000007 0000000e")
    with pytest.raises(ProtocolError, match="option magic is 0x49484156454f5055"):
        options.parse_option_header(data)


def test_the_data_of_options_as_bytes() -> None:
    assert go(GO) == InfoRequest("disk", (3, 1))
    assert go(bytes(6)) == InfoRequest("", ())
    expected = MetaContextRequest("disk", ("base:allocation", "base:"))
    assert contexts(CONTEXTS) == expected
    assert contexts(bytes(8)) == MetaContextRequest("", ())
    assert export_name(b"disk") == "disk"
    assert export_name(b"") == ""
    assert export_name("a/\N{SNOWMAN} b".encode()) == "a/\N{SNOWMAN} b"


@pytest.mark.parametrize(("parse", "data"), [(go, GO), (contexts, CONTEXTS)])
def test_data_cut_off_anywhere_or_too_long_is_invalid(
    parse: Parser, data: bytes
) -> None:
    for length in range(len(data)):
        refusal(parse, data[:length])
    refusal(parse, data + b"\0")
    refusal(parse, data + data)


def counted(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


@pytest.mark.parametrize(
    ("parse", "frame"),
    [
        (export_name, lambda name: name),
        (go, lambda name: counted(name) + b"\0\0"),
        (contexts, lambda name: counted(name) + bytes(4)),
        (contexts, lambda query: bytes(4) + b"\0\0\0\1" + counted(query)),
    ],
    ids=["EXPORT_NAME", "GO", "name of SET_META_CONTEXT", "query"],
)
def test_strings_are_utf_8_without_nul_and_up_to_4096_bytes(
    parse: Parser, frame: Callable[[bytes], bytes]
) -> None:
    assert parse(frame(b"x" * 4096))
    assert "4097 bytes, more than 4096" in refusal(parse, frame(b"x" * 4097))
    assert "contains a NUL byte" in refusal(parse, frame(b"di\0sk"))
    assert "not UTF-8" in refusal(parse, frame(b"di\xffsk"))
    assert "not UTF-8" in refusal(parse, frame(b"\xed\xa0\x80"))


def test_a_query_running_past_its_option_is_invalid() -> None:
    data = bytes(4) + struct.pack(">II", 1, 16) + b"base:allocation"
    assert "16 bytes, but only 15 are left" in refusal(contexts, data)


def test_a_number_of_queries_that_cannot_fit_is_invalid_at_once() -> None:
    data = bytes(4) + b"\xff\xff\xff\xff" + bytes(1000)
    assert "4294967295 queries in 1000 bytes" in refusal(contexts, data)


def test_a_name_longer_than_its_option_is_invalid() -> None:
    refusal(go, struct.pack(">I", 0xFFFFFFFF) + b"disk\0\0")
    refusal(go, struct.pack(">I", 5) + b"disk\0")


def test_options_without_data_take_none() -> None:
    options.parse_no_data(Option.LIST, b"")
    text = refusal(lambda data: options.parse_no_data(Option.LIST, data), b"abc")
    assert text == "NBD_OPT_LIST takes no data, got 3 bytes"


@given(st.binary(max_size=100))
def test_garbage_is_data_or_an_option_error(data: bytes) -> None:
    for parse in (export_name, go, contexts):
        with suppress(OptionError):
            parse(data)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (options.ack(Option.LIST), "00000003 00000001 00000000"),
        (
            options.error(99, OptionReply.ERR_UNSUP, "no"),
            "00000063 80000001 00000002 6e6f",
        ),
        (
            options.server("disk", "old"),
            "00000003 00000002 0000000b 00000004 6469736b 6f6c64",
        ),
        (
            options.info_export(Option.GO, 1000, 0x0181),
            "00000007 00000003 0000000c 0000 00000000000003e8 0181",
        ),
        (
            options.info_name(Option.INFO, "disk"),
            "00000006 00000003 00000006 0001 6469736b",
        ),
        (
            options.info_description(Option.INFO, "old"),
            "00000006 00000003 00000005 0002 6f6c64",
        ),
        (
            options.info_block_size(Option.GO, 1, 65536, 64 << 20),
            "00000007 00000003 0000000e 0003 00000001 00010000 04000000",
        ),
        (
            options.meta_context(Option.SET_META_CONTEXT, 1, "base:allocation"),
            "0000000a 00000004 00000013 00000001 626173653a616c6c6f636174696f6e",
        ),
    ],
)
def test_option_replies_as_bytes(reply: bytes, expected: str) -> None:
    assert reply == bytes.fromhex("0003e889045565a9" + expected)
