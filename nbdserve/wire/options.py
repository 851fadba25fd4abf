"""Parse the options of the handshake, and build the replies to them.

Layouts: "Fixed newstyle negotiation", "Option types" and "Option reply types" of
doc/proto.md. A parser gets the whole data of one option, whose length its header told,
so that whatever is wrong in there leaves the stream in step: it raises
`OptionError`, the reply to that one option.
"""

import struct
from dataclasses import dataclass
from typing import Final

from nbdserve.errors import NbdserveError, ProtocolError
from nbdserve.wire.constants import (
    IHAVEOPT,
    MAX_NAME,
    MAX_STRING,
    OPTION_REPLY_MAGIC,
    Info,
    Option,
    OptionReply,
)
from nbdserve.wire.replies import clipped

#: magic, option, length of the data
OPTION: Final = struct.Struct(">QII")
#: magic, option, reply type, length of the data
OPTION_REPLY: Final = struct.Struct(">QIII")
_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
_INFO_EXPORT: Final = struct.Struct(">HQH")
_INFO_BLOCK_SIZE: Final = struct.Struct(">HIII")


class OptionError(NbdserveError):
    """One option is refused; the handshake goes on.

    Attributes:
        reply: The NBD_REP_ERR_* that says why.
    """

    def __init__(self, reply: OptionReply, message: str) -> None:
        """Keep `reply` beside the text."""
        super().__init__(message)
        self.reply = reply


@dataclass(frozen=True, slots=True)
class InfoRequest:
    """The data of NBD_OPT_INFO or NBD_OPT_GO.

    Attributes:
        name: Of the export; "" is the default export.
        infos: The NBD_INFO_* that the client asks for, as they came.
    """

    name: str
    infos: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MetaContextRequest:
    """The data of NBD_OPT_LIST_META_CONTEXT or NBD_OPT_SET_META_CONTEXT.

    Attributes:
        name: Of the export; "" is the default export.
        queries: As they came. None at all means every context when listing.
    """

    name: str
    queries: tuple[str, ...]


def parse_option_header(
    data: bytes | bytearray | memoryview, position: int = 0
) -> tuple[int, int]:
    """Parse the 16 bytes that start an option.

    Returns:
        The option and the length of its data, both not yet judged.

    Raises:
        ProtocolError: The magic is wrong, so the stream is out of step.
    """
    magic, option, length = OPTION.unpack_from(data, position)
    if magic != IHAVEOPT:
        raise ProtocolError(f"option magic is {magic:#018x}, not {IHAVEOPT:#018x}")
    return option, length


def option_name(option: int) -> str:
    """Return an option as a person reads it: `NBD_OPT_GO`, `option 99`."""
    try:
        return f"NBD_OPT_{Option(option).name}"
    except ValueError:
        return f"option {option}"


def parse_no_data(option: int, data: bytes) -> None:
    """Refuse data in an option that has none (LIST, STARTTLS, STRUCTURED_REPLY...)."""
    if data:
        raise _invalid(f"{option_name(option)} takes no data, got {len(data)} bytes")


def parse_export_name(data: bytes) -> str:
    """Parse the data of NBD_OPT_EXPORT_NAME: nothing but the name."""
    return _string(data, "export name")


def parse_info(option: int, data: bytes) -> InfoRequest:
    """Parse the data of NBD_OPT_INFO and NBD_OPT_GO."""
    name, position = _counted(data, 0, f"{option_name(option)}: export name")
    if len(data) < position + 2:
        raise _invalid(
            f"{option_name(option)}: the number of information requests is cut off"
        )
    (count,) = _U16.unpack_from(data, position)
    position += 2
    if len(data) != position + 2 * count:
        raise _invalid(
            f"{option_name(option)}: {count} information requests "
            f"do not fill the {len(data) - position} bytes left"
        )
    return InfoRequest(name, struct.unpack_from(f">{count}H", data, position))


def parse_meta_context(
    option: int, data: bytes, most_queries: int
) -> MetaContextRequest:
    """Parse the data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT."""
    name, position = _counted(data, 0, f"{option_name(option)}: export name")
    if len(data) < position + 4:
        raise _invalid(f"{option_name(option)}: the number of queries is cut off")
    (count,) = _U32.unpack_from(data, position)
    position += 4
    if count * 4 > len(data) - position:
        raise _invalid(
            f"{option_name(option)}: {count} queries in {len(data) - position} bytes"
        )
    if count > most_queries:
        raise OptionError(
            OptionReply.ERR_TOO_BIG,
            f"{option_name(option)}: {count} queries, more than {most_queries}",
        )
    queries = []
    for _ in range(count):
        query, position = _counted(data, position, f"{option_name(option)}: query")
        queries.append(query)
    if position != len(data):
        raise _invalid(
            f"{option_name(option)}: {len(data) - position} bytes behind the last query"
        )
    return MetaContextRequest(name, tuple(queries))


def option_reply(option: int, reply: int, data: bytes = b"") -> bytes:
    """Return one whole option reply."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def ack(option: int) -> bytes:
    """Return NBD_REP_ACK."""
    return option_reply(option, OptionReply.ACK)


def error(option: int, reply: OptionReply, text: str = "") -> bytes:
    """Return an error reply with a text for a person."""
    return option_reply(option, reply, clipped(text))


def server(name: str, description: str = "") -> bytes:
    """Return NBD_REP_SERVER: one export in the reply to NBD_OPT_LIST.

    The description goes where the specification puts "details": "server-specific",
    human-readable, until the end of the reply.
    """
    encoded = name.encode()
    data = _U32.pack(len(encoded)) + encoded + clipped(description)
    return option_reply(Option.LIST, OptionReply.SERVER, data)


def info_export(option: int, size: int, transmission_flags: int) -> bytes:
    """Return NBD_REP_INFO with NBD_INFO_EXPORT."""
    data = _INFO_EXPORT.pack(Info.EXPORT, size, transmission_flags)
    return option_reply(option, OptionReply.INFO, data)


def info_name(option: int, name: str) -> bytes:
    """Return NBD_REP_INFO with NBD_INFO_NAME."""
    return option_reply(option, OptionReply.INFO, _U16.pack(Info.NAME) + name.encode())


def info_description(option: int, description: str) -> bytes:
    """Return NBD_REP_INFO with NBD_INFO_DESCRIPTION."""
    data = _U16.pack(Info.DESCRIPTION) + clipped(description)
    return option_reply(option, OptionReply.INFO, data)


def info_block_size(option: int, minimum: int, preferred: int, maximum: int) -> bytes:
    """Return NBD_REP_INFO with NBD_INFO_BLOCK_SIZE, all in bytes."""
    data = _INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, minimum, preferred, maximum)
    return option_reply(option, OptionReply.INFO, data)


def meta_context(option: int, context_id: int, name: str) -> bytes:
    """Return NBD_REP_META_CONTEXT; the id is 0 when only listing."""
    data = _U32.pack(context_id) + name.encode()
    return option_reply(option, OptionReply.META_CONTEXT, data)


def _invalid(text: str) -> OptionError:
    return OptionError(OptionReply.ERR_INVALID, text)


def _counted(data: bytes, position: int, what: str) -> tuple[str, int]:
    """Parse a string behind its 32-bit length; return it and where it ends."""
    if len(data) < position + 4:
        raise _invalid(f"{what}: its length is cut off")
    (length,) = _U32.unpack_from(data, position)
    position += 4
    if length > len(data) - position:
        raise _invalid(
            f"{what}: {length} bytes, but only {len(data) - position} are left"
        )
    end = position + length
    return _string(data[position:end], what), end


def _string(data: bytes, what: str) -> str:
    """Parse a string as "Values" restricts it: UTF-8, at most 4096 bytes, no NUL."""
    if len(data) > MAX_STRING:
        raise _invalid(f"{what}: {len(data)} bytes, more than {MAX_NAME}")
    if b"\0" in data:
        raise _invalid(f"{what}: contains a NUL byte")
    try:
        return data.decode()
    except UnicodeDecodeError as problem:
        raise _invalid(f"{what}: not UTF-8: {problem.reason}") from problem
