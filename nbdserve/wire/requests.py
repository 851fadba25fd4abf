"""Parse the header of one request of the transmission phase.

The two layouts are "Request message" and "Extended request message" of
doc/proto.md. The payload of NBD_CMD_WRITE is not read here: `payload_length` says
how much follows, and the caller knows where it wants those bytes.

A server that parses a whole receive buffer at a time may use `REQUEST` itself:
`REQUEST.unpack_from(view, position)` gives the fields in the order of the wire
and creates no object per request.
"""

import struct
from dataclasses import dataclass
from typing import Final

from nbdserve.errors import ProtocolError
from nbdserve.wire.constants import (
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    Command,
    CommandFlag,
)

#: magic, command flags, command, cookie, offset, length
REQUEST: Final = struct.Struct(">IHHQQI")
EXTENDED_REQUEST: Final = struct.Struct(">IHHQQQ")

_WRITE: Final = int(Command.WRITE)
_PAYLOAD_LEN: Final = int(CommandFlag.PAYLOAD_LEN)


@dataclass(slots=True)
class Request:
    """One request as the client sent it: parsed, not yet judged.

    `command` and `flags` stay plain numbers, for the protocol wants an unknown
    one answered with NBD_EINVAL, and not the connection closed.
    """

    command: int
    flags: int
    cookie: int
    offset: int
    length: int


def header_size(*, extended: bool) -> int:
    """Return how many bytes one request header takes."""
    return EXTENDED_REQUEST.size if extended else REQUEST.size


def parse_request(
    data: bytes | bytearray | memoryview, position: int = 0, *, extended: bool = False
) -> Request:
    """Parse the request header at `position` of `data`, without copying.

    Args:
        data: At least `header_size()` bytes from `position` on.
        position: Where the header starts.
        extended: Whether NBD_OPT_EXTENDED_HEADERS was negotiated.

    Raises:
        ProtocolError: The magic is wrong. The stream can't be resynchronised,
            so the connection has to end.
    """
    layout, expected = (
        (EXTENDED_REQUEST, EXTENDED_REQUEST_MAGIC)
        if extended
        else (REQUEST, REQUEST_MAGIC)
    )
    magic, flags, command, cookie, offset, length = layout.unpack_from(data, position)
    if magic != expected:
        raise bad_magic(magic, extended=extended)
    return Request(command, flags, cookie, offset, length)


def bad_magic(magic: int, *, extended: bool = False) -> ProtocolError:
    """Return the error for a header that does not start as a request does."""
    expected = EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC
    return ProtocolError(f"request magic is {magic:#010x}, not {expected:#010x}")


def payload_length(
    command: int, flags: int, length: int, *, extended: bool = False
) -> int:
    """Return how many bytes of payload follow a request header.

    With compact headers only NBD_CMD_WRITE has a payload, whatever its flags. With
    extended headers the flag NBD_CMD_FLAG_PAYLOAD_LEN alone decides, also for
    commands that the server does not know.
    """
    has_payload = flags & _PAYLOAD_LEN if extended else command == _WRITE
    return length if has_payload else 0


@dataclass(frozen=True, slots=True)
class StatusPayload:
    """The payload of NBD_CMD_BLOCK_STATUS: what to describe, and in which contexts."""

    length: int
    context_ids: tuple[int, ...]


def parse_status_payload(data: bytes | bytearray | memoryview) -> StatusPayload:
    """Parse the payload of NBD_CMD_BLOCK_STATUS ("extended headers").

    Args:
        data: 8 bytes and 4 for each context.
    """
    length, *context_ids = struct.unpack(f">Q{len(data) // 4 - 2}I", data)
    return StatusPayload(length, tuple(context_ids))
