"""The server's handshake against bytes written by hand from doc/proto.md."""

import struct
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.errors import ProtocolError
from nbdserve.wire.constants import Option, OptionReply
from nbdserve.wire.handshake import (
    ContextsAsked,
    ExportAsked,
    ExportInfo,
    ExportsAsked,
    HandshakeLimits,
    HandshakeState,
    MetaContext,
    ServerHandshake,
    TlsMode,
)

GREETING = b"NBDMAGIC" + b"IHAVEOPT" + b"\x00\x03"
FIXED = bytes.fromhex("00000003")
DISK = ExportInfo(
    "disk",
    size=1000,
    transmission_flags=0x0100,
    description="an old one",
    preferred_block=65536,
    meta_contexts=("base:allocation", "qemu:allocation-depth"),
)
SPARE = ExportInfo("spare", size=2000, transmission_flags=0)
EXPORTS = {"disk": DISK, "": DISK, "spare": SPARE}

INVALID = OptionReply.ERR_INVALID


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def counted(text: str | bytes) -> bytes:
    encoded = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(encoded)) + encoded


def go(name: str, *infos: int, number: int = Option.GO) -> bytes:
    data = counted(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)
    return option(number, data)


def contexts(number: int, name: str, *queries: str) -> bytes:
    data = counted(name) + struct.pack(">I", len(queries))
    return option(number, data + b"".join(map(counted, queries)))


def set_contexts(name: str, *queries: str) -> bytes:
    return contexts(Option.SET_META_CONTEXT, name, *queries)


def list_contexts(name: str, *queries: str) -> bytes:
    return contexts(Option.LIST_META_CONTEXT, name, *queries)


LIST = option(Option.LIST)
ABORT = option(Option.ABORT)
STARTTLS = option(Option.STARTTLS)
STRUCTURED = option(Option.STRUCTURED_REPLY)


def answer(handshake: ServerHandshake) -> None:
    """Do the caller's part for all that can be asked so far."""
    while (ask := handshake.next_ask()) is not None:
        if isinstance(ask, ExportsAsked):
            handshake.list_exports([("disk", "an old one"), ("spare", "")])
            handshake.end_list()
        elif ask.name not in EXPORTS:
            handshake.refuse(OptionReply.ERR_UNKNOWN, f"no export {ask.name!r}")
        elif isinstance(ask, ExportAsked):
            handshake.answer_export(EXPORTS[ask.name])
        else:
            handshake.answer_contexts(EXPORTS[ask.name])


def greeted(
    *,
    tls: TlsMode = TlsMode.OFF,
    flags: bytes = FIXED,
    limits: HandshakeLimits | None = None,
) -> ServerHandshake:
    """Return a handshake after the greeting and the client flags."""
    handshake = ServerHandshake(tls=tls, limits=limits)
    assert handshake.data_to_send() == GREETING
    handshake.feed(flags)
    assert handshake.next_ask() is None
    return handshake


def split(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Take option replies apart: option, reply type, data."""
    while data:
        magic, number, kind, length = struct.unpack_from(">QIII", data)
        assert magic == 0x0003E889045565A9
        assert len(data) >= 20 + length
        yield number, kind, data[20 : 20 + length]
        data = data[20 + length :]


def talk(handshake: ServerHandshake, data: bytes) -> list[tuple[int, int, bytes]]:
    """Send options; return the replies."""
    handshake.feed(data)
    answer(handshake)
    return list(split(handshake.data_to_send()))


def kinds(replies: list[tuple[int, int, bytes]]) -> list[int]:
    return [kind for _, kind, _ in replies]


def test_go_as_bytes() -> None:
    handshake = greeted()
    handshake.feed(STRUCTURED + go("disk", 1, 2) + b"request")
    answer(handshake)

    header = "0003e889045565a9 00000007 "
    assert handshake.data_to_send() == bytes.fromhex(
        "0003e889045565a9 00000008 00000001 00000000"
        + header + "00000003 0000000c 0000 00000000000003e8 0181"
        + header + "00000003 0000000e 0003 00000001 00010000 04000000"
        + header + "00000003 00000006 0001 6469736b"
        + header + "00000003 0000000c 0002 616e206f6c64206f6e65"
        + header + "00000001 00000000"
    )  # fmt: skip
    assert handshake.state is HandshakeState.TRANSMISSION
    assert handshake.leftover() == b"request"
    negotiated = handshake.negotiated
    assert negotiated is not None
    assert negotiated.export is DISK
    assert negotiated.structured
    assert negotiated.transmission_flags == 0x0181


@pytest.mark.parametrize(
    ("flags", "zeroes"), [(FIXED, 0), (b"\0\0\0\1", 124), (bytes(4), 124)]
)
def test_export_name_is_padded_unless_no_zeroes_was_agreed_on(
    flags: bytes, zeroes: int
) -> None:
    handshake = greeted(flags=flags)
    handshake.feed(option(Option.EXPORT_NAME, b"disk") + b"request")
    answer(handshake)

    assert handshake.data_to_send() == bytes.fromhex("00000000000003e8 0101") + bytes(
        zeroes
    )
    assert handshake.state is HandshakeState.TRANSMISSION
    assert handshake.leftover() == b"request"


def test_byte_by_byte_the_outcome_is_the_same() -> None:
    stream = (
        LIST + STRUCTURED + option(99, b"what") + set_contexts("disk", "base:allocation")
        + list_contexts("disk") + go("nothing") + go("disk", 3)
    )  # fmt: skip
    whole, bytewise = greeted(), greeted()
    expected = talk(whole, stream)
    replies = []
    for position in range(len(stream)):
        assert bytewise.state is HandshakeState.OPTIONS
        replies += talk(bytewise, stream[position : position + 1])

    assert replies == expected
    assert bytewise.negotiated == whole.negotiated
    assert whole.negotiated is not None
    assert whole.negotiated.meta_contexts == (MetaContext(1, "base:allocation"),)


def test_unknown_client_flags_end_the_connection() -> None:
    handshake = ServerHandshake()
    handshake.feed(bytes.fromhex("00000007"))
    with pytest.raises(ProtocolError, match="unknown client flags 0x7"):
        handshake.next_ask()


def test_without_fixed_newstyle_only_export_name_is_valid() -> None:
    handshake = greeted(flags=bytes(4))
    handshake.feed(LIST)
    with pytest.raises(ProtocolError, match="NBD_OPT_LIST from a client without fixed"):
        handshake.next_ask()


def test_a_wrong_option_magic_ends_the_connection() -> None:
    handshake = greeted()
    handshake.feed(b"IHAVEOPX" + bytes(8))
    with pytest.raises(ProtocolError, match="option magic"):
        handshake.next_ask()


@pytest.mark.parametrize("tls", TlsMode)
@pytest.mark.parametrize("data", [b"", b"ignored"])
def test_abort_is_acknowledged_also_before_tls_and_its_data_ignored(
    tls: TlsMode, data: bytes
) -> None:
    handshake = greeted(tls=tls)
    replies = talk(handshake, option(Option.ABORT, data) + LIST)
    assert replies == [(Option.ABORT, OptionReply.ACK, b"")]
    assert handshake.state is HandshakeState.CLOSED
    assert handshake.closed_because == "the client aborted the handshake"


@pytest.mark.parametrize("infos", [(), (3,), (0, 1, 2, 3, 77)])
def test_info_and_go_say_the_same(infos: tuple[int, ...]) -> None:
    handshake = greeted()
    info = talk(handshake, STRUCTURED + go("disk", *infos, number=Option.INFO))[1:]
    assert handshake.negotiated is None
    chosen = talk(handshake, go("disk", *infos))
    assert [reply[1:] for reply in info] == [reply[1:] for reply in chosen]
    assert handshake.negotiated is not None


def test_block_sizes_are_told_unasked_and_lawful() -> None:
    tiny = ExportInfo("tiny", 100, 1, preferred_block=1)
    handshake = greeted()
    handshake.feed(go("tiny"))
    handshake.next_ask()
    handshake.answer_export(tiny)
    told = [data for _, _, data in split(handshake.data_to_send())]
    assert struct.pack(">HIII", 3, 1, 512, 64 << 20) in told


def test_a_disk_of_1000_bytes_is_told_as_1000_bytes() -> None:
    for request in (go("disk"), go("disk", number=Option.INFO)):
        replies = talk(greeted(), request)
        told = [data for _, _, data in replies if data[:2] == b"\0\0"]
        assert [data[2:10] for data in told] == [bytes.fromhex("00000000000003e8")]


def test_df_is_advertised_with_structured_replies_only() -> None:
    for before, expected in ((b"", 0x0101), (STRUCTURED, 0x0181)):
        handshake = greeted()
        talk(handshake, before + go("disk"))
        assert handshake.negotiated is not None
        assert handshake.negotiated.transmission_flags == expected


def test_an_unknown_export_is_err_unknown_and_the_handshake_goes_on() -> None:
    handshake = greeted()
    replies = talk(handshake, go("nothing", number=Option.INFO) + go("nothing"))
    assert kinds(replies) == [OptionReply.ERR_UNKNOWN] * 2
    assert replies[0][2] == b"no export 'nothing'"
    assert kinds(talk(handshake, go("disk")))[-1] == OptionReply.ACK


@pytest.mark.parametrize("name", [b"nothing", b"di\0sk", b"x" * 4097, b"\xff"])
def test_export_name_that_cannot_be_satisfied_closes_without_a_word(
    name: bytes,
) -> None:
    handshake = greeted()
    assert talk(handshake, option(Option.EXPORT_NAME, name)) == []
    assert handshake.state is HandshakeState.CLOSED
    assert handshake.closed_because


def test_list_has_names_and_descriptions() -> None:
    assert talk(greeted(), LIST) == [
        (Option.LIST, OptionReply.SERVER, counted("disk") + b"an old one"),
        (Option.LIST, OptionReply.SERVER, counted("spare")),
        (Option.LIST, OptionReply.ACK, b""),
    ]


@pytest.mark.parametrize(
    "broken",
    [
        option(Option.LIST, b"x"),
        option(Option.STARTTLS, b"x"),
        option(Option.STRUCTURED_REPLY, b"x"),
        option(Option.GO, counted(b"x" * 4097) + b"\0\0"),
        option(Option.GO, counted(b"di\0sk") + b"\0\0"),
        option(Option.INFO, counted(b"di\xffsk") + b"\0\0"),
        option(Option.INFO, counted("disk") + b"\0\1"),
        option(Option.GO, counted("disk") + b"\0\0" + b"trailing"),
        option(Option.GO),
        option(
            Option.LIST_META_CONTEXT, bytes(4) + struct.pack(">II", 1, 9) + b"base:"
        ),
        option(Option.SET_META_CONTEXT, b"\xff\xff\xff\xff"),
    ],
)
@pytest.mark.parametrize("tls", [TlsMode.OFF, TlsMode.ALLOWED])
def test_what_is_malformed_is_err_invalid_and_the_stream_stays_in_step(
    broken: bytes, tls: TlsMode
) -> None:
    handshake = greeted(tls=tls)
    replies = talk(handshake, broken + STRUCTURED + broken + LIST)
    assert kinds(replies) == [
        INVALID,
        OptionReply.ACK,
        INVALID,
        OptionReply.SERVER,
        OptionReply.SERVER,
        OptionReply.ACK,
    ]
    assert all(text for _, kind, text in replies if kind == INVALID)


@pytest.mark.parametrize("number", [Option.PEEK_EXPORT, 0, 12, 0xFFFFFFFF])
def test_an_unknown_option_is_err_unsup_and_the_stream_stays_in_step(
    number: int,
) -> None:
    handshake = greeted()
    replies = talk(handshake, option(number, b"x" * 1000) + STRUCTURED)
    assert kinds(replies) == [OptionReply.ERR_UNSUP, OptionReply.ACK]
    assert replies[0][0] == number


def test_structured_replies_are_negotiated_once() -> None:
    handshake = greeted()
    replies = talk(handshake, STRUCTURED + STRUCTURED)
    assert kinds(replies) == [OptionReply.ACK, INVALID]
    assert handshake.structured


# Meta contexts


def selected(stream: bytes) -> list[str]:
    """Return which contexts are selected after these options."""
    handshake = greeted()
    handshake.feed(stream)
    answer(handshake)
    assert handshake.negotiated is not None
    return [context.name for context in handshake.negotiated.meta_contexts]


DEPTH = "qemu:allocation-depth"
ALLOCATION = "base:allocation"


def test_set_meta_context_needs_structured_replies() -> None:
    replies = talk(greeted(), set_contexts("disk", ALLOCATION))
    assert kinds(replies) == [INVALID]


def test_selected_contexts_have_ids_of_their_own() -> None:
    handshake = greeted()
    replies = talk(handshake, STRUCTURED + set_contexts("disk", DEPTH, ALLOCATION))
    told = [data for _, kind, data in replies if kind == OptionReply.META_CONTEXT]
    assert sorted(data[4:].decode() for data in told) == [ALLOCATION, DEPTH]
    assert len({data[:4] for data in told}) == 2
    assert kinds(replies)[-1] == OptionReply.ACK


def test_the_same_context_asked_twice_is_answered_once() -> None:
    handshake = greeted()
    talk(handshake, STRUCTURED)
    replies = talk(handshake, set_contexts("disk", ALLOCATION, ALLOCATION))
    assert kinds(replies) == [OptionReply.META_CONTEXT, OptionReply.ACK]


def test_set_for_one_export_then_go_on_another_selects_nothing() -> None:
    chosen = STRUCTURED + set_contexts("disk", ALLOCATION)
    assert selected(chosen + go("disk")) == [ALLOCATION]
    assert selected(chosen + go("spare")) == []
    assert selected(chosen + option(Option.EXPORT_NAME, b"disk")) == [ALLOCATION]


@pytest.mark.parametrize(
    "failing",
    [
        set_contexts("nothing", ALLOCATION),
        option(Option.SET_META_CONTEXT, b"malformed"),
        option(Option.SET_META_CONTEXT, bytes((256 << 10) + 1)),
        set_contexts("disk"),
        set_contexts("disk", "x-other:thing"),
        set_contexts("spare", ALLOCATION),
    ],
)
def test_a_failed_or_empty_set_clears_the_old_one(failing: bytes) -> None:
    chosen = STRUCTURED + set_contexts("disk", ALLOCATION)
    assert selected(chosen + failing + go("disk")) == []


@pytest.mark.parametrize(
    "query", ["base:", "base:nothing", "qemu:", "x-other:", "nocolon", "", ":"]
)
def test_set_ignores_wildcards_and_what_it_does_not_know(query: str) -> None:
    handshake = greeted()
    replies = talk(handshake, STRUCTURED + set_contexts("disk", query))
    assert kinds(replies) == [OptionReply.ACK, OptionReply.ACK]


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ((), [ALLOCATION, DEPTH]),
        (("base:",), [ALLOCATION]),
        (("base:", ALLOCATION), [ALLOCATION]),
        (("qemu:", "base:"), [ALLOCATION, DEPTH]),
        ((DEPTH,), [DEPTH]),
        (("base", "base:nothing", "x-other:", "", "qemu:allocation"), []),
    ],
)
def test_listing_contexts_takes_a_namespace_as_a_wildcard(
    queries: tuple[str, ...], expected: list[str]
) -> None:
    replies = talk(greeted(), list_contexts("disk", *queries))
    assert [data for _, _, data in replies[:-1]] == [
        bytes(4) + name.encode() for name in expected
    ]
    assert replies[-1] == (Option.LIST_META_CONTEXT, OptionReply.ACK, b"")


def test_listing_contexts_selects_nothing() -> None:
    assert selected(STRUCTURED + list_contexts("disk") + go("disk")) == []


def test_a_thousand_queries_are_served() -> None:
    queries = [f"x-other:{number}" for number in range(999)]
    replies = talk(greeted(), list_contexts("disk", *queries, ALLOCATION))
    assert kinds(replies) == [OptionReply.META_CONTEXT, OptionReply.ACK]


# TLS


def test_starttls_is_not_available() -> None:
    handshake = greeted()
    replies = talk(handshake, STARTTLS + STRUCTURED)
    assert replies == [
        (Option.STARTTLS, OptionReply.ERR_POLICY, b"TLS is not available"),
        (Option.STRUCTURED_REPLY, OptionReply.ACK, b""),
    ]


def test_starttls_forgets_everything_negotiated() -> None:
    handshake = greeted(tls=TlsMode.ALLOWED)
    talk(handshake, STRUCTURED + set_contexts("disk", ALLOCATION))
    assert kinds(talk(handshake, STARTTLS)) == [OptionReply.ACK]
    assert handshake.state is HandshakeState.STARTING_TLS
    handshake.tls_started()
    talk(handshake, go("disk"))

    assert handshake.negotiated is not None
    assert not handshake.negotiated.structured
    assert handshake.negotiated.meta_contexts == ()


def test_plaintext_buffered_behind_starttls_ends_the_connection() -> None:
    early = greeted(tls=TlsMode.ALLOWED)
    early.feed(STARTTLS + LIST)
    with pytest.raises(ProtocolError, match="plaintext"):
        early.next_ask()

    late = greeted(tls=TlsMode.REQUIRED)
    talk(late, STARTTLS)
    late.feed(LIST)
    assert late.next_ask() is None
    with pytest.raises(ProtocolError, match="plaintext"):
        late.tls_started()


def test_a_second_starttls_is_err_invalid() -> None:
    handshake = greeted(tls=TlsMode.REQUIRED)
    talk(handshake, STARTTLS)
    handshake.tls_started()
    assert kinds(talk(handshake, STARTTLS + STRUCTURED)) == [INVALID, OptionReply.ACK]


@pytest.mark.parametrize(
    "other",
    [LIST, STRUCTURED, go("disk"), go("disk", number=Option.INFO), option(99, b"x")],
)
def test_before_a_required_tls_only_starttls_and_abort_work(other: bytes) -> None:
    handshake = greeted(tls=TlsMode.REQUIRED)
    assert kinds(talk(handshake, other)) == [OptionReply.ERR_TLS_REQD]
    assert kinds(talk(handshake, STARTTLS)) == [OptionReply.ACK]
    handshake.tls_started()
    assert OptionReply.ERR_TLS_REQD not in kinds(talk(handshake, other))


def test_before_a_required_tls_export_name_closes() -> None:
    handshake = greeted(tls=TlsMode.REQUIRED)
    assert talk(handshake, option(Option.EXPORT_NAME, b"disk")) == []
    assert handshake.state is HandshakeState.CLOSED
    assert handshake.closed_because == "TLS is required"


# Limits and shutdown


def test_an_oversized_option_is_err_too_big_and_the_stream_stays_in_step() -> None:
    handshake = greeted(limits=HandshakeLimits(option_bytes=100, skipped_bytes=1000))
    replies = talk(handshake, option(Option.GO, bytes(1000)) + STRUCTURED)
    assert kinds(replies) == [OptionReply.ERR_TOO_BIG, OptionReply.ACK]


def test_abort_is_acknowledged_however_much_data_it_has() -> None:
    handshake = greeted(limits=HandshakeLimits(option_bytes=100, skipped_bytes=1000))
    replies = talk(handshake, option(Option.ABORT, bytes(1000)))
    assert kinds(replies) == [OptionReply.ACK]
    assert handshake.state is HandshakeState.CLOSED


def test_an_oversized_option_is_not_kept_in_memory() -> None:
    handshake = greeted(limits=HandshakeLimits(option_bytes=100, skipped_bytes=1000))
    handshake.feed(option(Option.GO, bytes(1000))[:-1])
    assert handshake.next_ask() is None
    assert handshake.leftover() == b""


def test_an_option_beyond_any_measure_ends_the_connection_at_its_header() -> None:
    handshake = greeted()
    handshake.feed(b"IHAVEOPT" + struct.pack(">II", Option.GO, 0xFFFFFFFF))
    with pytest.raises(ProtocolError, match="NBD_OPT_GO announces 4294967295 bytes"):
        handshake.next_ask()


def test_an_oversized_export_name_closes() -> None:
    handshake = greeted()
    talk(handshake, option(Option.EXPORT_NAME, bytes((256 << 10) + 1)))
    assert handshake.state is HandshakeState.CLOSED


def test_options_are_counted() -> None:
    handshake = greeted(limits=HandshakeLimits(options=3))
    talk(handshake, LIST + option(99) + LIST)
    handshake.feed(LIST)
    with pytest.raises(ProtocolError, match="more than 3 options"):
        handshake.next_ask()


def test_while_shutting_down_every_option_but_abort_is_err_shutdown() -> None:
    handshake = greeted()
    handshake.shut_down()
    replies = talk(handshake, LIST + STRUCTURED + STARTTLS + go("disk") + option(99))
    assert kinds(replies) == [OptionReply.ERR_SHUTDOWN] * 5
    assert kinds(talk(handshake, ABORT)) == [OptionReply.ACK]


@pytest.mark.parametrize(("count", "kind"), [
    (1024, OptionReply.ACK),
    (1025, OptionReply.ERR_TOO_BIG),
])  # fmt: skip
def test_queries_for_meta_contexts_are_bounded(count: int, kind: OptionReply) -> None:
    replies = talk(greeted(), STRUCTURED + set_contexts("disk", *["x:"] * count))
    assert kinds(replies)[-1] == kind


@pytest.mark.parametrize("ask", [LIST, go("disk"), list_contexts("disk"), go("none")])
def test_an_option_under_way_when_shutdown_begins_is_err_shutdown(ask: bytes) -> None:
    handshake = greeted()
    handshake.feed(ask)
    first = handshake.next_ask()
    handshake.shut_down()
    if isinstance(first, ExportsAsked):
        handshake.list_exports([])
        handshake.end_list()
    elif isinstance(first, ContextsAsked):
        handshake.answer_contexts(DISK)
    elif first is not None and first.name == "none":
        handshake.refuse(OptionReply.ERR_UNKNOWN, "no such export")
    else:
        handshake.answer_export(DISK)
    assert kinds(list(split(handshake.data_to_send()))) == [OptionReply.ERR_SHUTDOWN]
    assert handshake.state is HandshakeState.OPTIONS


def test_while_shutting_down_export_name_closes() -> None:
    handshake = greeted()
    handshake.shut_down()
    assert talk(handshake, option(Option.EXPORT_NAME, b"disk")) == []
    assert handshake.closed_because == "the server is shutting down"


# The caller's mistakes are told to the caller


def test_an_open_ask_has_to_be_answered_first_and_in_kind() -> None:
    handshake = greeted()
    with pytest.raises(RuntimeError, match="no option is open"):
        handshake.refuse(OptionReply.ERR_POLICY, "")
    handshake.feed(LIST)
    handshake.next_ask()
    with pytest.raises(RuntimeError, match="not answered yet"):
        handshake.next_ask()
    with pytest.raises(TypeError, match="not ExportAsked"):
        handshake.answer_export(DISK)
    with pytest.raises(RuntimeError, match="no TLS handshake was due"):
        handshake.tls_started()


OPTIONS = st.one_of(
    st.binary(max_size=40),
    st.builds(option, st.integers(0, 12), st.binary(max_size=40)),
    st.sampled_from(
        [
            LIST,
            STRUCTURED,
            STARTTLS,
            go("disk", number=Option.INFO),
            go("nothing"),
            set_contexts("disk", ALLOCATION),
            list_contexts("disk", "base:"),
        ]
    ),
)


@given(st.lists(OPTIONS, max_size=8), st.sampled_from(TlsMode))
def test_garbage_is_answered_or_a_protocol_error(
    stream: list[bytes], tls: TlsMode
) -> None:
    handshake = greeted(tls=tls)
    with suppress(ProtocolError):
        for data in stream:
            handshake.feed(data)
            answer(handshake)
    if handshake.negotiated is None:
        list(split(handshake.data_to_send()))
