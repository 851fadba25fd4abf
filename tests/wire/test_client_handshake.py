"""The client's handshake against bytes by hand, and against our own server's."""

import struct
from collections.abc import Iterable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.errors import ProtocolError
from nbdserve.wire import client_handshake
from nbdserve.wire.client_handshake import (
    ClientHandshake,
    ExportDetails,
    OptionRefused,
    Outcome,
    contexts_data,
    info_data,
    reply_name,
)
from nbdserve.wire.constants import Info, Option, OptionReply
from nbdserve.wire.handshake import (
    ContextsAsked,
    ExportInfo,
    ExportsAsked,
    HandshakeState,
    MetaContext,
    ServerHandshake,
    TlsMode,
)

GREETING = b"NBDMAGICIHAVEOPT\x00\x03"
NAME = "a/b \N{SNOWMAN}"
DISK = ExportInfo(
    NAME,
    size=1000,
    transmission_flags=0x0101,
    description="an \N{SNOWMAN} disk",
    preferred_block=65536,
    meta_contexts=("base:allocation", "qemu:allocation-depth"),
)


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x0003E889045565A9, option, kind, len(data)) + data


def greeted(*, no_zeroes: bool = True) -> ClientHandshake:
    client = ClientHandshake(no_zeroes=no_zeroes)
    client.feed(GREETING)
    assert client.data_to_send() == bytes([0, 0, 0, 3 if no_zeroes else 1])
    return client


def asked(option: int, *replies: bytes) -> Outcome | None:
    client = greeted()
    client.ask(option)
    client.feed(b"".join(replies))
    return client.outcome()


# Against bytes


def test_go_as_bytes() -> None:
    client = greeted()
    client.ask(Option.GO, info_data("disk", [Info.BLOCK_SIZE]))
    assert client.data_to_send() == bytes.fromhex(
        "49484156454f5054 00000007 0000000c 00000004 6469736b 0001 0003"
    )
    header = "0003e889045565a9 00000007 "
    replies = bytes.fromhex(
        header + "00000003 0000000c 0000 00000000000003e8 0181"
        + header + "00000003 00000003 9999 00"
        + header + "00000003 0000000e 0003 00000001 00010000 04000000"
        + header + "00000001 00000000"
    )  # fmt: skip
    for position in range(len(replies)):
        assert client.outcome() is None
        client.feed(replies[position : position + 1])
    client.feed(b"behind")

    outcome = client.outcome()
    assert outcome is not None
    assert outcome.details == ExportDetails(
        1000,
        0x0181,
        minimum_block=1,
        preferred_block=65536,
        maximum_payload=64 << 20,
    )
    assert client.finished
    assert client.leftover() == b"behind"


def test_contexts_data_as_bytes() -> None:
    assert contexts_data("disk", ["base:"]) == bytes.fromhex(
        "00000004 6469736b 00000001 00000005 626173653a"
    )


def test_an_option_asked_before_the_greeting_goes_out_behind_the_flags() -> None:
    client = ClientHandshake()
    client.ask(Option.ABORT)
    client.feed(GREETING[:10])
    assert client.outcome() is None
    assert client.data_to_send() == b""
    client.feed(GREETING[10:])
    assert client.data_to_send()[:12] == b"\0\0\0\3IHAVEOPT"


def test_no_zeroes_is_not_asked_of_a_server_without_it() -> None:
    client = ClientHandshake()
    client.feed(b"NBDMAGICIHAVEOPT\x00\x01")
    assert client.data_to_send() == b"\0\0\0\1"


@pytest.mark.parametrize(
    ("greeting", "message"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1 Debian", "no NBD server"),
        (b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53" + bytes(10), "fixed newstyle"),
        (b"NBDMAGICIHAVEOPT\x00\x00", "fixed newstyle"),
    ],
    ids=["ssh", "oldstyle", "newstyle that isn't fixed"],
)
def test_what_is_no_fixed_newstyle_server_is_refused(
    greeting: bytes, message: str
) -> None:
    with pytest.raises(ProtocolError, match=message):
        ClientHandshake().feed(greeting)


def test_an_error_has_a_name_and_the_servers_text() -> None:
    with pytest.raises(OptionRefused) as refused:
        asked(Option.GO, reply(Option.GO, OptionReply.ERR_UNKNOWN, b"no such disk"))
    assert refused.value.reply == OptionReply.ERR_UNKNOWN
    assert refused.value.text == "no such disk"
    assert str(refused.value) == "NBD_OPT_GO: NBD_REP_ERR_UNKNOWN: no such disk"
    assert reply_name((1 << 31) + 99) == "reply 0x80000063"


@pytest.mark.parametrize(
    ("option", "broken"),
    [
        (Option.LIST, b"x" * 20),
        (Option.LIST, reply(Option.GO, OptionReply.ACK)),
        (Option.LIST, reply(Option.LIST, 99)),
        (Option.LIST, reply(Option.LIST, OptionReply.INFO, bytes(12))),
        (Option.LIST, reply(Option.LIST, OptionReply.SERVER, b"\0\0\0\5disk")),
        (Option.LIST, reply(Option.LIST, OptionReply.SERVER, b"\0\0\0")),
        (Option.LIST, reply(Option.LIST, OptionReply.SERVER, b"\0\0\0\1\xff")),
        (Option.LIST, struct.pack(">QIII", 0x0003E889045565A9, 3, 2, 1 << 31)),
        (Option.GO, reply(Option.GO, OptionReply.ACK)),
        (Option.GO, reply(Option.GO, OptionReply.INFO, b"\0")),
        (
            Option.GO,
            reply(Option.GO, OptionReply.INFO, bytes(12))
            + reply(Option.GO, OptionReply.INFO, b"\0\3" + bytes(11))
            + reply(Option.GO, OptionReply.ACK),
        ),
        (Option.SET_META_CONTEXT, reply(10, OptionReply.META_CONTEXT, b"\0")),
        (
            Option.SET_META_CONTEXT,
            reply(10, OptionReply.META_CONTEXT, bytes(4) + b"base:a") * 2
            + reply(10, OptionReply.ACK),
        ),
        (Option.STARTTLS, reply(Option.STARTTLS, OptionReply.ACK) + b"x"),
    ],
)
def test_a_server_that_breaks_the_protocol_is_left(option: int, broken: bytes) -> None:
    with pytest.raises(ProtocolError):
        asked(option, broken)


def test_padding_that_is_not_zero_is_refused() -> None:
    client = greeted(no_zeroes=False)
    client.ask(Option.EXPORT_NAME, b"disk")
    client.feed(bytes(10) + bytes(123))
    assert client.outcome() is None
    client.feed(b"x")
    with pytest.raises(ProtocolError, match="padding"):
        client.outcome()


def test_starttls_forgets_what_was_negotiated() -> None:
    client = greeted()
    client.ask(Option.STRUCTURED_REPLY)
    client.feed(reply(Option.STRUCTURED_REPLY, OptionReply.ACK))
    assert client.outcome() is not None
    assert client.structured
    client.ask(Option.STARTTLS)
    client.feed(reply(Option.STARTTLS, OptionReply.ACK))
    assert client.outcome() is not None
    assert not client.structured


def test_extended_headers_imply_structured_replies() -> None:
    client = greeted()
    client.ask(Option.EXTENDED_HEADERS)
    client.feed(reply(Option.EXTENDED_HEADERS, OptionReply.ACK))
    assert client.outcome() is not None
    assert client.extended
    assert client.structured


def test_a_reply_cut_off_anywhere_is_no_outcome_yet() -> None:
    client = greeted()
    client.ask(Option.LIST)
    name = reply(Option.LIST, OptionReply.SERVER, b"\0\0\0\4disk")
    for position in range(len(name)):
        client.feed(name[position : position + 1])
        assert client.outcome() is None
    client.feed(reply(Option.LIST, OptionReply.ACK))
    outcome = client.outcome()
    assert outcome is not None
    assert outcome.exports == [("disk", "")]


def test_replies_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_handshake, "_MAX_REPLIES", 3)
    name = reply(Option.LIST, OptionReply.SERVER, b"\0\0\0\4disk")
    with pytest.raises(ProtocolError, match="more than 3 replies"):
        asked(Option.LIST, name * 4)


def test_one_option_at_a_time() -> None:
    client = greeted()
    client.ask(Option.LIST)
    with pytest.raises(RuntimeError):
        client.ask(Option.LIST)


@given(
    st.integers(1, 11),
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.builds(
                reply, st.integers(1, 11), st.integers(1, 5), st.binary(max_size=20)
            ),
        ),
        max_size=5,
    ),
)
def test_garbage_is_an_outcome_or_one_of_two_errors(
    option: int, stream: list[bytes]
) -> None:
    client = greeted()
    client.ask(option)
    with suppress(ProtocolError, OptionRefused):
        for data in stream:
            client.feed(data)
            client.outcome()


@given(st.binary(max_size=40))
def test_a_garbled_greeting_is_a_protocol_error(data: bytes) -> None:
    with suppress(ProtocolError):
        ClientHandshake().feed(data)


# Against our own server


class Conversation:
    """A client and a server that talk in memory, a few bytes at a time."""

    def __init__(
        self,
        *,
        tls: TlsMode = TlsMode.OFF,
        no_zeroes: bool = True,
        at_once: int = 1 << 20,
    ) -> None:
        self.server = ServerHandshake(tls=tls)
        self.client = ClientHandshake(no_zeroes=no_zeroes)
        self._at_once = at_once

    def ask(self, option: int, data: bytes = b"") -> Outcome | None:
        """Ask for an option, and carry bytes to and fro until nothing moves."""
        self.client.ask(option, data)
        moved = True
        while moved:
            moved = False
            for piece in self._pieces(self.server.data_to_send()):
                self.client.feed(piece)
                moved = True
                outcome = self.client.outcome()
                if outcome is not None:
                    return outcome
            for piece in self._pieces(self.client.data_to_send()):
                self.server.feed(piece)
                self._serve()
                moved = True
        return None

    def _pieces(self, data: bytes) -> Iterable[bytes]:
        step = self._at_once
        return [data[start : start + step] for start in range(0, len(data), step)]

    def _serve(self) -> None:
        while (ask := self.server.next_ask()) is not None:
            if isinstance(ask, ExportsAsked):
                self.server.list_exports([(NAME, DISK.description)])
                self.server.end_list()
            elif ask.name not in {NAME, ""}:
                self.server.refuse(OptionReply.ERR_UNKNOWN, "no such export")
            elif isinstance(ask, ContextsAsked):
                self.server.answer_contexts(DISK)
            else:
                self.server.answer_export(DISK)


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("at_once", [1, 7, 1 << 20])
def test_both_roles_understand_each_other(at_once: int, extended: bool) -> None:
    talk = Conversation(at_once=at_once)

    listed = talk.ask(Option.LIST)
    assert listed is not None
    assert listed.exports == [(NAME, DISK.description)]

    with pytest.raises(OptionRefused, match="NBD_REP_ERR_INVALID"):
        talk.ask(Option.SET_META_CONTEXT, contexts_data(NAME, ["base:allocation"]))
    wanted = Option.EXTENDED_HEADERS if extended else Option.STRUCTURED_REPLY
    assert talk.ask(wanted) is not None
    with pytest.raises(OptionRefused, match="TLS is not available"):
        talk.ask(Option.STARTTLS)

    available = talk.ask(Option.LIST_META_CONTEXT, contexts_data(NAME, []))
    assert available is not None
    assert [context.name for context in available.contexts] == [
        "base:allocation",
        "qemu:allocation-depth",
    ]
    chosen = talk.ask(
        Option.SET_META_CONTEXT, contexts_data(NAME, ["qemu:allocation-depth"])
    )
    assert chosen is not None
    assert chosen.contexts == [MetaContext(1, "qemu:allocation-depth")]

    flags = 0x1181 if extended else 0x0181
    expected = ExportDetails(1000, flags, NAME, DISK.description, 1, 65536, 64 << 20)
    data = info_data(NAME, [Info.NAME, Info.DESCRIPTION])
    for option in (Option.INFO, Option.GO):
        outcome = talk.ask(option, data)
        assert outcome is not None
        assert outcome.details == expected

    negotiated = talk.server.negotiated
    assert negotiated is not None
    assert negotiated.requested_name == NAME
    assert negotiated.structured == talk.client.structured
    assert negotiated.extended == talk.client.extended == extended
    assert list(negotiated.meta_contexts) == talk.client.contexts
    assert talk.client.finished


@pytest.mark.parametrize("no_zeroes", [False, True])
def test_both_roles_agree_on_export_name(no_zeroes: bool) -> None:
    talk = Conversation(no_zeroes=no_zeroes, at_once=9)
    outcome = talk.ask(Option.EXPORT_NAME, NAME.encode())
    assert outcome is not None
    assert outcome.details == ExportDetails(1000, 0x0101)
    assert talk.client.leftover() == b""


def test_both_roles_agree_on_abort() -> None:
    talk = Conversation()
    assert talk.ask(Option.ABORT) is not None
    assert talk.server.state is HandshakeState.CLOSED


def test_a_closed_door_is_no_outcome() -> None:
    talk = Conversation()
    assert talk.ask(Option.EXPORT_NAME, b"nothing") is None
    assert talk.server.closed_because == "no such export"


def test_both_roles_agree_on_tls() -> None:
    talk = Conversation(tls=TlsMode.REQUIRED)
    with pytest.raises(OptionRefused, match="NBD_REP_ERR_TLS_REQD"):
        talk.ask(Option.GO, info_data(NAME))
    assert talk.ask(Option.STARTTLS) is not None
    talk.server.tls_started()
    outcome = talk.ask(Option.GO, info_data(NAME))
    assert outcome is not None
    assert outcome.details is not None
