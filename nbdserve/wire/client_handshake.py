"""The client's side of the handshake, as a state machine without I/O.

One option is under way at a time: `ask` starts it, and `outcome` has all of the
server's replies to it once the last one came. Sections of doc/proto.md: "Fixed
newstyle negotiation", "Option types", "Option reply types".
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from nbdserve.errors import NbdserveError, ProtocolError
from nbdserve.wire.constants import (
    EXPORT_NAME_ZEROES,
    IHAVEOPT,
    NBDMAGIC,
    OPTION_ERROR_BIT,
    OPTION_REPLY_MAGIC,
    ClientFlag,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
)
from nbdserve.wire.handshake import MetaContext
from nbdserve.wire.options import OPTION, OPTION_REPLY, option_name

_GREETING: Final = struct.Struct(">QQH")
_SIZE_AND_FLAGS: Final = struct.Struct(">QH")
_BLOCK_SIZES: Final = struct.Struct(">III")
#: Bytes of one reply; two strings of 4096 bytes are the most that one can hold, and an
#: error text is as short. What is larger is no reply.
_MAX_REPLY: Final = 64 << 10
#: Replies to one option: a server with more exports than this is out of its mind.
_MAX_REPLIES: Final = 1 << 20


class OptionRefused(NbdserveError):  # noqa: N818 -- the server's right, not a failure
    """The server answered an option with an error.

    Attributes:
        option: The option.
        reply: Its NBD_REP_ERR_*, perhaps one that we don't know.
        text: What the server said, perhaps nothing.
    """

    def __init__(self, option: int, reply: int, text: str) -> None:
        """Keep the parts beside the text."""
        super().__init__(f"{option_name(option)}: {reply_name(reply)}: {text}")
        self.option = option
        self.reply = reply
        self.text = text


@dataclass(frozen=True, slots=True)
class ExportDetails:
    """What the server tells about an export; None is what it did not tell.

    Attributes:
        size: Bytes.
        transmission_flags: See `TransmissionFlag`.
        name: The canonical one.
        description: For a person.
        minimum_block: Bytes.
        preferred_block: Bytes.
        maximum_payload: Bytes.
    """

    size: int
    transmission_flags: int
    name: str | None = None
    description: str | None = None
    minimum_block: int | None = None
    preferred_block: int | None = None
    maximum_payload: int | None = None


@dataclass(slots=True)
class Outcome:
    """All that the server replied to one option that it accepted.

    Attributes:
        option: The option.
        exports: With LIST: names and descriptions.
        details: With INFO, GO and EXPORT_NAME.
        contexts: With LIST_META_CONTEXT and SET_META_CONTEXT.
    """

    option: int
    exports: list[tuple[str, str]] = field(default_factory=list)
    details: ExportDetails | None = None
    contexts: list[MetaContext] = field(default_factory=list)


class ClientHandshake:
    """One connection's handshake, seen from the client.

    Attributes:
        greeted: Whether the server's greeting has come.
        structured: Whether structured replies were negotiated.
        extended: Whether extended headers were.
        contexts: The meta contexts that are set.
        finished: Whether the transmission phase has begun.
    """

    def __init__(self, *, no_zeroes: bool = True, fixed: bool = True) -> None:
        self.greeted = False
        self.structured = False
        self.extended = False
        self.contexts: list[MetaContext] = []
        self.finished = False
        self._flags = (ClientFlag.NO_ZEROES if no_zeroes else 0) | (
            ClientFlag.FIXED_NEWSTYLE if fixed else 0
        )
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._under_way: Outcome | None = None
        self._info: dict[int, bytes] = {}
        self._replies = 0

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes from the server.

        Raises:
            ProtocolError: It is no server of newstyle NBD.
        """
        self._incoming += data
        if not self.greeted:
            self._take_greeting()

    def data_to_send(self) -> bytes:
        """Return, once, what is to be sent: nothing before the server's greeting."""
        if not self.greeted:
            return b""
        data = bytes(self._outgoing)
        self._outgoing.clear()
        return data

    def leftover(self) -> bytes:
        """Return, once, what came behind the end of the handshake."""
        data = bytes(self._incoming)
        self._incoming.clear()
        return data

    def ask(self, option: int, data: bytes = b"") -> None:
        """Send one option. The `*_data` functions make the data of those that have any."""
        if self._under_way is not None or self.finished:
            raise RuntimeError("an option is under way, or the handshake is over")
        self._under_way = Outcome(option)
        self._info.clear()
        self._replies = 0
        self._outgoing += OPTION.pack(IHAVEOPT, option, len(data)) + data
        if option == Option.SET_META_CONTEXT:
            self.contexts = []

    def outcome(self) -> Outcome | None:
        """Return what came of the option under way, once it is complete.

        Raises:
            OptionRefused: The server answered with an error.
            ProtocolError: The server broke the protocol.
        """
        outcome = self._under_way
        if outcome is None or not self.greeted:
            return None
        if outcome.option == Option.EXPORT_NAME:
            return self._take_export_name(outcome)
        while (reply := self._take_reply(outcome.option)) is not None:
            kind, data = reply
            if kind & OPTION_ERROR_BIT:
                self._under_way = None
                raise OptionRefused(outcome.option, kind, data.decode(errors="replace"))
            if kind == OptionReply.ACK:
                self._under_way = None
                self._accept(outcome)
                return outcome
            self._gather(outcome, kind, data)
        return None

    def _take_greeting(self) -> None:
        if len(self._incoming) < _GREETING.size:
            return
        magic, kind, flags = _GREETING.unpack_from(self._incoming)
        if magic != NBDMAGIC:
            raise ProtocolError("this is no NBD server")
        if kind != IHAVEOPT or not flags & HandshakeFlag.FIXED_NEWSTYLE:
            raise ProtocolError("the server does not speak fixed newstyle NBD")
        if not flags & HandshakeFlag.NO_ZEROES:
            self._flags &= ~ClientFlag.NO_ZEROES
        del self._incoming[: _GREETING.size]
        # the flags precede any option that was asked before the greeting came
        self._outgoing[:0] = struct.pack(">I", self._flags)
        self.greeted = True

    def _take_export_name(self, outcome: Outcome) -> Outcome | None:
        """Take the one reply without a header."""
        zeroes = 0 if self._flags & ClientFlag.NO_ZEROES else EXPORT_NAME_ZEROES
        end = _SIZE_AND_FLAGS.size + zeroes
        if len(self._incoming) < end:
            return None
        outcome.details = ExportDetails(*_SIZE_AND_FLAGS.unpack_from(self._incoming))
        if any(self._incoming[_SIZE_AND_FLAGS.size : end]):
            raise ProtocolError("NBD_OPT_EXPORT_NAME: the padding is not zero")
        del self._incoming[:end]
        self._under_way = None
        self.finished = True
        return outcome

    def _take_reply(self, option: int) -> tuple[int, bytes] | None:
        if len(self._incoming) < OPTION_REPLY.size:
            return None
        magic, replied, kind, length = OPTION_REPLY.unpack_from(self._incoming)
        if magic != OPTION_REPLY_MAGIC:
            raise ProtocolError(f"option reply magic is {magic:#x}")
        if replied != option:
            raise ProtocolError(f"reply to option {replied}, not {option}")
        if length > _MAX_REPLY:
            raise ProtocolError(f"option reply of {length} bytes")
        end = OPTION_REPLY.size + length
        if len(self._incoming) < end:
            return None
        self._replies += 1
        if self._replies > _MAX_REPLIES:
            raise ProtocolError(f"more than {_MAX_REPLIES} replies to one option")
        data = bytes(self._incoming[OPTION_REPLY.size : end])
        del self._incoming[:end]
        return kind, data

    def _gather(self, outcome: Outcome, kind: int, data: bytes) -> None:
        """Keep one reply that is not the last."""
        option = outcome.option
        if kind == OptionReply.SERVER and option == Option.LIST:
            outcome.exports.append(_parse_server(data))
        elif kind == OptionReply.INFO and option in {Option.INFO, Option.GO}:
            if len(data) < 2:
                raise ProtocolError(f"NBD_REP_INFO of {len(data)} bytes")
            self._info[int.from_bytes(data[:2], "big")] = data[2:]
        elif kind == OptionReply.META_CONTEXT and option in {
            Option.LIST_META_CONTEXT,
            Option.SET_META_CONTEXT,
        }:
            if len(data) < 4:
                raise ProtocolError(f"NBD_REP_META_CONTEXT of {len(data)} bytes")
            context_id = int.from_bytes(data[:4], "big")
            outcome.contexts.append(MetaContext(context_id, _text(data[4:])))
        else:
            raise ProtocolError(f"{option_name(option)}: reply type {kind}")

    def _accept(self, outcome: Outcome) -> None:
        """Draw the consequences of NBD_REP_ACK."""
        match outcome.option:
            case Option.INFO | Option.GO:
                outcome.details = _parse_details(self._info)
                self.finished = outcome.option == Option.GO
            case Option.STRUCTURED_REPLY:
                self.structured = True
            case Option.EXTENDED_HEADERS:
                self.extended = self.structured = True
            case Option.SET_META_CONTEXT:
                ids = {context.context_id for context in outcome.contexts}
                if len(ids) != len(outcome.contexts):
                    raise ProtocolError("two meta contexts have the same id")
                self.contexts = outcome.contexts
            case Option.STARTTLS:
                if self._incoming:
                    raise ProtocolError("plaintext behind the reply to STARTTLS")
                self.structured = self.extended = False
                self.contexts = []
            case _:
                pass


def info_data(name: str, infos: Iterable[int] = ()) -> bytes:
    """Return the data of NBD_OPT_INFO and NBD_OPT_GO."""
    numbers = list(infos)
    return _counted(name) + struct.pack(f">H{len(numbers)}H", len(numbers), *numbers)


def contexts_data(name: str, queries: Iterable[str]) -> bytes:
    """Return the data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT."""
    encoded = [_counted(query) for query in queries]
    return _counted(name) + struct.pack(">I", len(encoded)) + b"".join(encoded)


def reply_name(reply: int) -> str:
    """Return an option reply as a person reads it: `NBD_REP_ERR_UNKNOWN`."""
    try:
        return f"NBD_REP_{OptionReply(reply).name}"
    except ValueError:
        return f"reply {reply:#x}"


def _counted(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack(">I", len(encoded)) + encoded


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as problem:
        raise ProtocolError(f"a string is not UTF-8: {problem.reason}") from problem


def _parse_server(data: bytes) -> tuple[str, str]:
    """Parse NBD_REP_SERVER: a counted name, and a description up to the end."""
    length = int.from_bytes(data[:4], "big")
    if len(data) < 4 + length:
        raise ProtocolError("NBD_REP_SERVER: the name runs past the reply")
    return _text(data[4 : 4 + length]), data[4 + length :].decode(errors="replace")


def _parse_details(info: dict[int, bytes]) -> ExportDetails:
    """Parse the NBD_INFO_* that came; those we don't know are ignored."""
    export = info.get(Info.EXPORT)
    if export is None or len(export) != _SIZE_AND_FLAGS.size:
        raise ProtocolError("NBD_INFO_EXPORT is missing, or has a wrong size")
    details = ExportDetails(*_SIZE_AND_FLAGS.unpack(export))
    if (name := info.get(Info.NAME)) is not None:
        details = replace(details, name=_text(name))
    if (description := info.get(Info.DESCRIPTION)) is not None:
        details = replace(details, description=_text(description))
    if (sizes := info.get(Info.BLOCK_SIZE)) is not None:
        if len(sizes) != _BLOCK_SIZES.size:
            raise ProtocolError(f"NBD_INFO_BLOCK_SIZE of {len(sizes) + 2} bytes")
        minimum, preferred, maximum = _BLOCK_SIZES.unpack(sizes)
        details = replace(
            details,
            minimum_block=minimum,
            preferred_block=preferred,
            maximum_payload=maximum,
        )
    return details
