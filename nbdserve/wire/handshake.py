"""The server's side of the handshake, as a state machine without I/O.

Bytes from the client go in with `feed`. `next_ask` answers whatever needs no knowledge
of the exports by itself and returns the first option that does; the caller looks
the export up, for as long as that takes, and calls the `answer_*` method for it or
`refuse`. What is to be sent collects in `data_to_send`. So:

    handshake.feed(data)
    while (ask := handshake.next_ask()) is not None:
        ...                                   # look up, then answer or refuse
    send(handshake.data_to_send())

until `state` is no longer `OPTIONS`. Sections of doc/proto.md: "Newstyle negotiation",
"Fixed newstyle negotiation", "TLS support", "Option types".
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeVar

from nbdserve.errors import ProtocolError
from nbdserve.wire import options
from nbdserve.wire.constants import (
    EXPORT_NAME_ZEROES,
    IHAVEOPT,
    MAX_PAYLOAD,
    MIN_PREFERRED_BLOCK,
    NBDMAGIC,
    ClientFlag,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)
from nbdserve.wire.options import OptionError

_GREETING: Final = struct.Struct(">QQH")
_CLIENT_FLAGS: Final = struct.Struct(">I")
_EXPORT_NAME_REPLY: Final = struct.Struct(">QH")
_KNOWN_CLIENT_FLAGS: Final = int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES)
_HANDLED: Final = frozenset(Option) - {Option.PEEK_EXPORT}
#: What a server says first: "Newstyle negotiation".
GREETING: Final = _GREETING.pack(
    NBDMAGIC, IHAVEOPT, HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
)


@dataclass(frozen=True, slots=True)
class HandshakeLimits:
    """What one connection may ask of the server before it has chosen an export.

    Attributes:
        options: How many. qemu was seen taking 5000, nbdkit stops at 32; a client that
            describes every export of a list needs two for each.
        option_bytes: The data of one option that is kept in memory.
        queries: For meta contexts, in one option. qemu and nbdkit were seen to accept 1000.
        skipped_bytes: The data of one option that is read past, so that it can be
            refused by a reply. qemu closes at the same length.
    """

    options: int = 4096
    option_bytes: int = 128 << 10
    queries: int = 1024
    skipped_bytes: int = 32 << 20


class TlsMode(Enum):
    """Section "TLS support": NOTLS, SELECTIVETLS and FORCEDTLS."""

    OFF = "off"
    ALLOWED = "allowed"
    REQUIRED = "required"


class HandshakeState(Enum):
    """How far a handshake has come."""

    CLIENT_FLAGS = "client flags"
    OPTIONS = "options"
    STARTING_TLS = "starting TLS"
    TRANSMISSION = "transmission"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a client is told about an export.

    Attributes:
        name: The canonical one, without NUL, at most 4096 bytes in UTF-8.
        size: Bytes.
        transmission_flags: What the export can do. SEND_DF is not for the export to
            say: the handshake sets it where structured replies were negotiated.
        description: For a person; may be empty.
        minimum_block: Bytes, a power of two up to 65536.
        only_whole_blocks: Whether anything smaller is refused.
        preferred_block: Bytes, a power of two.
        maximum_payload: Bytes of one READ or WRITE.
        meta_contexts: The names of all that a client can select.
    """

    name: str
    size: int
    transmission_flags: int
    description: str = ""
    minimum_block: int = 1
    only_whole_blocks: bool = True
    preferred_block: int = 4096
    maximum_payload: int = MAX_PAYLOAD
    meta_contexts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MetaContext:
    """A selected meta context: its name, and the id that stands for it in replies."""

    context_id: int
    name: str


@dataclass(frozen=True, slots=True)
class Negotiated:
    """The outcome of a handshake that led to an export.

    Attributes:
        requested_name: As the client put it; "" is the default export.
        export: What the client was told.
        transmission_flags: As sent to this client.
        structured: Whether structured replies were negotiated, or extended headers.
        extended: Whether extended headers were.
        meta_contexts: The selected ones, in the order of their ids.
    """

    requested_name: str
    export: ExportInfo
    transmission_flags: int
    structured: bool
    extended: bool
    meta_contexts: tuple[MetaContext, ...]


@dataclass(frozen=True, slots=True)
class ExportsAsked:
    """NBD_OPT_LIST: to be answered by `list_exports` and `end_list`."""

    option: int


@dataclass(frozen=True, slots=True)
class ExportAsked:
    """INFO, GO or EXPORT_NAME: to be answered by `answer_export`.

    Attributes:
        option: Which of the three; INFO does not choose the export.
        name: Of the export; "" is the default export.
        infos: The NBD_INFO_* asked for; none with EXPORT_NAME.
    """

    option: int
    name: str
    infos: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ContextsAsked:
    """LIST_META_CONTEXT or SET_META_CONTEXT: to be answered by `answer_contexts`."""

    option: int
    name: str
    queries: tuple[str, ...]


Ask = ExportsAsked | ExportAsked | ContextsAsked
_AskT = TypeVar("_AskT", ExportsAsked, ExportAsked, ContextsAsked)


class ServerHandshake:
    """One connection's handshake.

    Attributes:
        state: How far it has come.
        negotiated: The outcome, once `state` is TRANSMISSION.
        closed_because: One line, once `state` is CLOSED: the connection is to be
            closed after sending what there is to send. Nobody broke the protocol.
        structured: Whether structured replies, or extended headers, are negotiated so far.
        extended: Whether extended headers are.
        tls_active: Whether TLS runs.
    """

    def __init__(
        self,
        *,
        tls: TlsMode = TlsMode.OFF,
        limits: HandshakeLimits | None = None,
        tls_active: bool = False,
        greeted: bool = False,
    ) -> None:
        """Begin with the greeting, unless it was sent already."""
        self.state = HandshakeState.CLIENT_FLAGS
        self.negotiated: Negotiated | None = None
        self.closed_because: str | None = None
        self.structured = False
        self.extended = False
        self.tls_active = tls_active
        self._tls = tls
        self._limits = limits or HandshakeLimits()
        self._incoming = bytearray()
        self._outgoing = bytearray() if greeted else bytearray(GREETING)
        self._fixed = False
        self._no_zeroes = False
        self._shutting_down = False
        self._options_left = self._limits.options
        self._skip: tuple[int, int] | None = None  # option, bytes still to come
        self._ask: Ask | None = None
        self._contexts: tuple[MetaContext, ...] = ()
        self._contexts_of = ""

    # What the connection does

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes from the client. While an ask is open, better leave them unread."""
        self._incoming += data

    def data_to_send(self) -> bytes:
        """Return, once, what is to be sent; at first that is the greeting."""
        data = bytes(self._outgoing)
        self._outgoing.clear()
        return data

    def leftover(self) -> bytes:
        """Return, once, what came behind the option that ended the handshake."""
        data = bytes(self._incoming)
        self._incoming.clear()
        return data

    def next_ask(self) -> Ask | None:
        """Go through what has come until an option needs an answer.

        Returns:
            That option, or None if more bytes are needed or the handshake is over.

        Raises:
            ProtocolError: The connection has to end.
        """
        ask = self._ask
        if ask is not None:
            raise RuntimeError(f"not answered yet: {ask}")
        while ask is None and self._step():
            ask = self._open_ask()
        return ask

    @property
    def tls_would_help(self) -> bool:
        """Whether the client may encrypt, and has not done so."""
        return self._tls is TlsMode.ALLOWED and not self.tls_active

    def shut_down(self) -> None:
        """From now on answer ERR_SHUTDOWN to every option but ABORT."""
        self._shutting_down = True

    def tls_started(self) -> None:
        """Go on after the TLS handshake that followed STARTTLS.

        Raises:
            ProtocolError: Plaintext was sent behind STARTTLS. To use it would be to
                trust bytes that anyone on the way could have put there.
        """
        if self.state is not HandshakeState.STARTING_TLS:
            raise RuntimeError(f"no TLS handshake was due in state {self.state.value}")
        if self._incoming:
            raise ProtocolError("plaintext was sent behind NBD_OPT_STARTTLS")
        self.tls_active = True
        self.state = HandshakeState.OPTIONS

    # Answers

    def list_exports(self, exports: Iterable[tuple[str, str]]) -> None:
        """Answer NBD_OPT_LIST with names and descriptions; others may follow."""
        if not isinstance(self._ask, ExportsAsked):
            raise TypeError(f"the open option is {self._ask}, not NBD_OPT_LIST")
        for name, description in exports:
            self._outgoing += options.server(name, description)

    def end_list(self) -> None:
        """Answer NBD_OPT_LIST: these were all."""
        ask = self._take(ExportsAsked)
        if not self._refused_for_shutdown(ask.option):
            self._outgoing += options.ack(ask.option)

    def answer_export(self, export: ExportInfo) -> None:
        """Answer INFO, GO or EXPORT_NAME; the latter two end the handshake."""
        ask = self._take(ExportAsked)
        if self._refused_for_shutdown(ask.option):
            return
        same_name = ask.name == self._contexts_of
        contexts = self._contexts if same_name else ()
        flags = self._flags_of(export, contexts)
        if ask.option == Option.EXPORT_NAME:
            self._outgoing += _EXPORT_NAME_REPLY.pack(export.size, flags)
            if not self._no_zeroes:
                self._outgoing += bytes(EXPORT_NAME_ZEROES)
        elif (
            export.minimum_block > 1
            and export.only_whole_blocks
            and Info.BLOCK_SIZE not in ask.infos
        ):
            # "SHOULD ensure it first sends an NBD_INFO_BLOCK_SIZE information reply"
            self._outgoing += _block_sizes(ask, export)
            text = f"requests have to be aligned to {export.minimum_block} bytes"
            self._error(ask.option, OptionReply.ERR_BLOCK_SIZE_REQD, text)
            return
        else:
            self._outgoing += _info_replies(ask, export, flags)
        if ask.option != Option.INFO:
            self.negotiated = Negotiated(
                requested_name=ask.name,
                export=export,
                transmission_flags=flags,
                structured=self.structured,
                extended=self.extended,
                meta_contexts=contexts,
            )
            self.state = HandshakeState.TRANSMISSION

    def answer_contexts(self, export: ExportInfo) -> None:
        """Answer LIST_META_CONTEXT or SET_META_CONTEXT."""
        ask = self._take(ContextsAsked)
        if self._refused_for_shutdown(ask.option):
            return
        if ask.option == Option.SET_META_CONTEXT:
            names = [name for name in export.meta_contexts if name in ask.queries]
            self._contexts_of = ask.name
            self._contexts = tuple(
                MetaContext(number, name) for number, name in enumerate(names, 1)
            )
            listed = self._contexts
        else:
            # "The metadata context ID in these replies is reserved and SHOULD be zero"
            listed = tuple(
                MetaContext(0, name)
                for name in export.meta_contexts
                if not ask.queries or any(_matches(name, q) for q in ask.queries)
            )
        for context in listed:
            self._outgoing += options.meta_context(
                ask.option, context.context_id, context.name
            )
        self._outgoing += options.ack(ask.option)

    def refuse(self, reply: OptionReply, text: str) -> None:
        """Answer the open ask with an error: ERR_UNKNOWN, ERR_POLICY, ERR_TLS_REQD..."""
        if self._ask is None:
            raise RuntimeError("no option is open")
        option = self._ask.option
        self._ask = None
        if not self._refused_for_shutdown(option):
            self._error(option, reply, text)

    # The machine

    def _step(self) -> bool:
        """Consume one thing from the buffer; return whether there may be another."""
        if self.state is HandshakeState.CLIENT_FLAGS:
            return self._take_client_flags()
        if self.state is not HandshakeState.OPTIONS:
            return False
        if self._skip is not None:
            return self._skip_data(*self._skip)
        return self._take_option()

    def _take_client_flags(self) -> bool:
        if len(self._incoming) < 4:
            return False
        (flags,) = _CLIENT_FLAGS.unpack_from(self._incoming)
        del self._incoming[:4]
        if flags & ~_KNOWN_CLIENT_FLAGS:
            raise ProtocolError(f"unknown client flags {flags:#x}")
        self._fixed = bool(flags & ClientFlag.FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & ClientFlag.NO_ZEROES)
        self.state = HandshakeState.OPTIONS
        return True

    def _take_option(self) -> bool:
        if len(self._incoming) < options.OPTION.size:
            return False
        option, length = options.parse_option_header(self._incoming)
        self._check_header(option, length)
        end = options.OPTION.size + length
        if length > self._limits.option_bytes or option not in _HANDLED:
            del self._incoming[: options.OPTION.size]
            self._count_option()
            self._skip = (option, length)
            return True
        if len(self._incoming) < end:
            return False
        data = bytes(self._incoming[options.OPTION.size : end])
        del self._incoming[:end]
        self._count_option()
        try:
            self._handle(option, data)
        except OptionError as problem:
            self._error(option, problem.reply, str(problem))
        return True

    def _check_header(self, option: int, length: int) -> None:
        """End the connection over what no reply could put right."""
        if not self._fixed and option != Option.EXPORT_NAME:
            # "This is the only valid option in nonfixed newstyle negotiation", and
            # such a client would not understand an option reply.
            raise ProtocolError(
                f"{options.option_name(option)} from a client without fixed newstyle"
            )
        if length > self._limits.skipped_bytes:
            raise ProtocolError(
                f"{options.option_name(option)} announces {length} bytes of data, "
                f"more than {self._limits.skipped_bytes}"
            )

    def _count_option(self) -> None:
        if self._options_left == 0:
            raise ProtocolError(f"more than {self._limits.options} options")
        self._options_left -= 1

    def _skip_data(self, option: int, left: int) -> bool:
        """Read past the data of an option that can't or won't be kept."""
        taken = min(left, len(self._incoming))
        del self._incoming[:taken]
        if taken < left:
            self._skip = (option, left - taken)
            return False
        self._skip = None
        if self._refused_for_state(option):
            return True
        if option == Option.ABORT:
            self._abort()
        elif option in _HANDLED:
            if option == Option.SET_META_CONTEXT:
                self._forget_contexts()
            self._error(
                option,
                OptionReply.ERR_TOO_BIG,
                f"more than {self._limits.option_bytes} bytes of data",
            )
        else:
            self._error(
                option,
                OptionReply.ERR_UNSUP,
                f"{options.option_name(option)} is not supported",
            )
        return True

    def _handle(self, option: int, data: bytes) -> None:
        """Carry out an option, or leave it as an ask."""
        if self._refused_for_state(option):
            return
        match option:
            case Option.ABORT:
                self._abort()  # "a server SHOULD ignore any data"
            case Option.STARTTLS:
                self._start_tls(data)
            case Option.STRUCTURED_REPLY:
                options.parse_no_data(option, data)
                self._start_structured_replies()
            case Option.EXTENDED_HEADERS:
                options.parse_no_data(option, data)
                self._start_extended_headers()
            case Option.LIST:
                options.parse_no_data(option, data)
                self._ask = ExportsAsked(option)
            case Option.INFO | Option.GO:
                info = options.parse_info(option, data)
                self._ask = ExportAsked(option, info.name, info.infos)
            case Option.EXPORT_NAME:
                if self.extended:
                    # "a client MUST NOT use NBD_OPT_EXPORT_NAME"
                    raise OptionError(
                        OptionReply.ERR_INVALID, "extended headers need NBD_OPT_GO"
                    )
                self._ask = ExportAsked(option, options.parse_export_name(data), ())
            case _:
                self._handle_contexts(option, data)

    def _start_structured_replies(self) -> None:
        if self.extended:
            raise OptionError(
                OptionReply.ERR_EXT_HEADER_REQD, "extended headers are negotiated"
            )
        if self.structured:
            raise OptionError(
                OptionReply.ERR_INVALID, "structured replies are negotiated"
            )
        self.structured = True
        self._outgoing += options.ack(Option.STRUCTURED_REPLY)

    def _start_extended_headers(self) -> None:
        if self.extended:
            raise OptionError(
                OptionReply.ERR_INVALID, "extended headers are negotiated"
            )
        self.structured = self.extended = True
        self._outgoing += options.ack(Option.EXTENDED_HEADERS)

    def _handle_contexts(self, option: int, data: bytes) -> None:
        if option == Option.SET_META_CONTEXT:
            # "replaces all previously-set metadata contexts (including when this
            # command fails)"
            self._forget_contexts()
            if not self.structured:
                raise OptionError(
                    OptionReply.ERR_INVALID,
                    "structured replies or extended headers have to come first",
                )
        wanted = options.parse_meta_context(option, data, self._limits.queries)
        self._ask = ContextsAsked(option, wanted.name, wanted.queries)

    def _start_tls(self, data: bytes) -> None:
        options.parse_no_data(Option.STARTTLS, data)
        if self.tls_active:
            raise OptionError(OptionReply.ERR_INVALID, "TLS is active already")
        if self._tls is TlsMode.OFF:
            raise OptionError(OptionReply.ERR_POLICY, "TLS is not available")
        if self._incoming:
            raise ProtocolError("plaintext was sent behind NBD_OPT_STARTTLS")
        # "the server MUST NOT preserve any negotiation state"
        self.structured = self.extended = False
        self._forget_contexts()
        self._outgoing += options.ack(Option.STARTTLS)
        self.state = HandshakeState.STARTING_TLS

    def _abort(self) -> None:
        self._outgoing += options.ack(Option.ABORT)
        self._close("the client aborted the handshake")

    def _refused_for_state(self, option: int) -> bool:
        """Refuse what can't be answered before TLS or while shutting down."""
        if option == Option.ABORT:
            return False
        if self._refused_for_shutdown(option):
            return True
        missing_tls = self._tls is TlsMode.REQUIRED and not self.tls_active
        if missing_tls and option != Option.STARTTLS:
            self._error(option, OptionReply.ERR_TLS_REQD, "TLS is required")
            return True
        return False

    def _refused_for_shutdown(self, option: int) -> bool:
        if self._shutting_down:
            self._error(option, OptionReply.ERR_SHUTDOWN, "the server is shutting down")
        return self._shutting_down

    def _error(self, option: int, reply: OptionReply, text: str) -> None:
        """Send an error; EXPORT_NAME has no room for one, so the connection ends."""
        if option == Option.EXPORT_NAME:
            self._close(text)
        else:
            self._outgoing += options.error(option, reply, text)

    def _close(self, reason: str) -> None:
        self.state = HandshakeState.CLOSED
        self.closed_because = reason

    def _forget_contexts(self) -> None:
        self._contexts = ()
        self._contexts_of = ""

    def _flags_of(self, export: ExportInfo, contexts: tuple[MetaContext, ...]) -> int:
        """Return the transmission flags that are true for this client."""
        # what depends on the client is not for the export to say
        flags = int(export.transmission_flags | TransmissionFlag.HAS_FLAGS)
        flags &= ~int(TransmissionFlag.SEND_DF | TransmissionFlag.BLOCK_STATUS_PAYLOAD)
        if self.structured:
            flags |= TransmissionFlag.SEND_DF
        if self.extended and contexts:
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        return int(flags)

    def _open_ask(self) -> Ask | None:
        return self._ask

    def _take(self, kind: type[_AskT]) -> _AskT:
        ask = self._ask
        if not isinstance(ask, kind):
            raise TypeError(f"the open option is {ask}, not {kind.__name__}")
        self._ask = None
        return ask


def _info_replies(ask: ExportAsked, export: ExportInfo, flags: int) -> bytes:
    """Return the whole answer to INFO, which is the answer to GO as well."""
    replies = [
        options.info_export(ask.option, export.size, flags),
        _block_sizes(ask, export),
    ]
    if Info.NAME in ask.infos:
        replies.append(options.info_name(ask.option, export.name))
    if Info.DESCRIPTION in ask.infos and export.description:
        replies.append(options.info_description(ask.option, export.description))
    return b"".join(replies) + options.ack(ask.option)


def _block_sizes(ask: ExportAsked, export: ExportInfo) -> bytes:
    preferred = max(export.preferred_block, export.minimum_block, MIN_PREFERRED_BLOCK)
    return options.info_block_size(
        ask.option, export.minimum_block, preferred, export.maximum_payload
    )


def _matches(name: str, query: str) -> bool:
    """Tell whether a query of LIST_META_CONTEXT finds a context.

    "`base:` ... MUST support this as a wildcard", and "the empty leaf-name makes
    sense as a wildcard" elsewhere, so a query that ends with a colon is one.
    """
    return name == query or (query.endswith(":") and name.startswith(query))
