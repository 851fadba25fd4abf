"""The numbers of the NBD protocol, under the names that doc/proto.md gives them.

Names drop what the class already says: `NBD_CMD_READ` is `Command.READ`. Values of
the extension-ext-header branch are marked "extended headers".
"""

from enum import IntEnum, IntFlag
from typing import Final

# "Newstyle negotiation" and "Fixed newstyle negotiation"
NBDMAGIC: Final = 0x4E42444D41474943
IHAVEOPT: Final = 0x49484156454F5054
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9

# "Request message", "Simple reply message", "Structured reply chunk message"
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
# extended headers: "Extended request message", "Extended reply chunk message"
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

#: Bytes of a string on the wire: "Values", "strings"; longer is a protocol violation.
MAX_STRING: Final = 4096
MAX_NAME: Final = MAX_STRING
#: Bytes of one READ or WRITE. nbdkit has the same limit, qemu stops at half of it;
#: a public trace of real traffic contains requests of 49,865,728 bytes.
MAX_PAYLOAD: Final = 64 << 20
#: Bytes of a refused WRITE that are read and thrown away so that the connection
#: survives. nbdkit drains as much; a length beyond it is taken as an attack.
MAX_DRAIN: Final = 2 * MAX_PAYLOAD
#: What a compact request can express: "Request message" has a length of 32 bits.
MAX_COMPACT_LENGTH: Final = 0xFFFFFFFF
#: "Metadata querying" and NBD_REPLY_TYPE_BLOCK_STATUS: extents in one chunk.
MAX_EXTENTS: Final = 1 << 20
#: NBD_CMD_FLAG_DF: a server must be able to return this much in one chunk.
MIN_UNFRAGMENTED: Final = 65536
#: "Size constraints": the largest minimum block size, the least preferred one.
MAX_MINIMUM_BLOCK: Final = 65536
MIN_PREFERRED_BLOCK: Final = 512
#: NBD_OPT_EXPORT_NAME: zeros behind the flags unless NO_ZEROES was agreed on.
EXPORT_NAME_ZEROES: Final = 124


class HandshakeFlag(IntFlag):
    """Section "Handshake flags": what the server offers, 16 bits."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlag(IntFlag):
    """Section "Client flags": what the client answers, 32 bits."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlag(IntFlag):
    """Section "Transmission flags": what an export can do, 16 bits."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12  # extended headers


class Option(IntEnum):
    """Section "Option types"."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4  # withdrawn
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11  # extended headers


class OptionReply(IntEnum):
    """Section "Option reply types"; bit 31 marks an error."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_INVALID = (1 << 31) + 3
    ERR_PLATFORM = (1 << 31) + 4
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_SHUTDOWN = (1 << 31) + 7
    ERR_BLOCK_SIZE_REQD = (1 << 31) + 8
    ERR_TOO_BIG = (1 << 31) + 9
    ERR_EXT_HEADER_REQD = (1 << 31) + 10  # extended headers


#: Set in every `OptionReply` that is an error.
OPTION_ERROR_BIT: Final = 1 << 31


class Info(IntEnum):
    """NBD_INFO_*, in section "Option types" under NBD_OPT_INFO and NBD_OPT_GO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Command(IntEnum):
    """Section "Request types"."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8  # extension-resize


class CommandFlag(IntFlag):
    """Section "Command flags", 16 bits."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5  # extended headers


class ChunkFlag(IntFlag):
    """Section "Structured reply flags", 16 bits."""

    DONE = 1 << 0


class ChunkType(IntEnum):
    """Section "Structured reply types"; bit 15 marks an error."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6  # extended headers
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


#: Set in every `ChunkType` that is an error.
CHUNK_ERROR_BIT: Final = 1 << 15


class NbdError(IntEnum):
    """Section "Error values". They happen to be Linux's numbers."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class State(IntFlag):
    """Section "`base:allocation` metadata context"."""

    HOLE = 1 << 0
    ZERO = 1 << 1


#: The meta context that proto.md itself defines.
BASE_ALLOCATION: Final = "base:allocation"
