"""Build the replies of the transmission phase, and map errors to the wire.

The layouts are "Simple reply message", "Structured reply chunk message" and "Extended
reply chunk message" of doc/proto.md. The `put_*` functions write at a position of a
buffer that collects the replies of a batch; the others return bytes and are for what is
rare. `wire/answers.py` chooses between the three layouts.
"""

import errno as os_errno
import struct
from collections.abc import Sequence
from typing import Final

from nbdserve.wire.constants import (
    EXTENDED_REPLY_MAGIC,
    MAX_STRING,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    ChunkFlag,
    ChunkType,
    NbdError,
)

#: magic, error, cookie
SIMPLE_REPLY: Final = struct.Struct(">IIQ")
#: magic, flags, type, cookie, length of the payload
CHUNK: Final = struct.Struct(">IHHQI")
#: A chunk header and the offset of the data behind it.
DATA_CHUNK: Final = struct.Struct(">IHHQIQ")
#: A whole hole chunk: a chunk header, offset, length of the hole.
HOLE_CHUNK: Final = struct.Struct(">IHHQIQI")
#: magic, flags, type, cookie, offset of the request, length of the payload
EXTENDED_CHUNK: Final = struct.Struct(">IHHQQQ")
#: An extended chunk header and the offset of the data behind it.
EXTENDED_DATA_CHUNK: Final = struct.Struct(">IHHQQQQ")
#: A whole extended hole chunk: a chunk header, offset, length of the hole.
EXTENDED_HOLE_CHUNK: Final = struct.Struct(">IHHQQQQI")
_ERROR: Final = struct.Struct(">IH")
_OFFSET: Final = struct.Struct(">Q")

_DONE: Final = int(ChunkFlag.DONE)
_NONE: Final = int(ChunkType.NONE)
_OFFSET_DATA: Final = int(ChunkType.OFFSET_DATA)
_OFFSET_HOLE: Final = int(ChunkType.OFFSET_HOLE)

# "Error values", and its paragraph about EDQUOT and EFBIG. What isn't here is EIO.
_FROM_ERRNO: Final = {
    os_errno.EPERM: NbdError.EPERM,
    os_errno.EACCES: NbdError.EPERM,
    os_errno.EROFS: NbdError.EPERM,
    os_errno.EIO: NbdError.EIO,
    os_errno.ENOMEM: NbdError.ENOMEM,
    os_errno.EINVAL: NbdError.EINVAL,
    os_errno.ENOSPC: NbdError.ENOSPC,
    os_errno.EDQUOT: NbdError.ENOSPC,
    os_errno.EFBIG: NbdError.ENOSPC,
    os_errno.EOVERFLOW: NbdError.EOVERFLOW,
    os_errno.ENOTSUP: NbdError.ENOTSUP,
    os_errno.EOPNOTSUPP: NbdError.ENOTSUP,
    os_errno.ESHUTDOWN: NbdError.ESHUTDOWN,
}


def nbd_error(errno: int | None) -> NbdError:
    """Return what the wire says for a number of `errno`; EIO if it has no word for it."""
    return _FROM_ERRNO.get(errno or 0, NbdError.EIO)


def put_simple(
    buffer: bytearray | memoryview, position: int, cookie: int, error: int = 0
) -> int:
    """Write a simple reply, without the data of a read; return where it ends."""
    SIMPLE_REPLY.pack_into(buffer, position, SIMPLE_REPLY_MAGIC, error, cookie)
    return position + 16


def put_done(buffer: bytearray | memoryview, position: int, cookie: int) -> int:
    """Write a NONE chunk that ends a reply successfully; return where it ends."""
    CHUNK.pack_into(buffer, position, STRUCTURED_REPLY_MAGIC, _DONE, _NONE, cookie, 0)
    return position + 20


def put_data_header(
    buffer: bytearray | memoryview,
    position: int,
    cookie: int,
    offset: int,
    length: int,
    *,
    done: bool,
) -> int:
    """Write what precedes `length` bytes of data in an OFFSET_DATA chunk.

    Returns:
        Where the data has to begin.
    """
    DATA_CHUNK.pack_into(
        buffer, position, STRUCTURED_REPLY_MAGIC, done, _OFFSET_DATA, cookie,
        length + 8, offset,
    )  # fmt: skip
    return position + 28


def put_hole(
    buffer: bytearray | memoryview,
    position: int,
    cookie: int,
    offset: int,
    length: int,
    *,
    done: bool,
) -> int:
    """Write an OFFSET_HOLE chunk: `length` zeros at `offset`; return where it ends."""
    HOLE_CHUNK.pack_into(
        buffer, position, STRUCTURED_REPLY_MAGIC, done, _OFFSET_HOLE, cookie,
        12, offset, length,
    )  # fmt: skip
    return position + 32


def put_extended_done(
    buffer: bytearray | memoryview, position: int, cookie: int, request_offset: int
) -> int:
    """Write an extended NONE chunk that ends a reply; return where it ends."""
    EXTENDED_CHUNK.pack_into(
        buffer, position, EXTENDED_REPLY_MAGIC, _DONE, _NONE, cookie, request_offset, 0
    )
    return position + 32


def put_extended_data_header(  # noqa: PLR0913 -- the fields of the chunk
    buffer: bytearray | memoryview,
    position: int,
    cookie: int,
    offset: int,
    length: int,
    *,
    done: bool,
    request_offset: int | None = None,
) -> int:
    """Write what precedes `length` bytes of data in an extended OFFSET_DATA chunk.

    Args:
        buffer: Where to write.
        position: Where the header starts.
        cookie: Of the request.
        offset: Of the data.
        length: Of the data.
        done: Whether this is the last chunk.
        request_offset: Of the request, where the data does not begin there.

    Returns:
        Where the data has to begin.
    """
    EXTENDED_DATA_CHUNK.pack_into(
        buffer, position, EXTENDED_REPLY_MAGIC, done, _OFFSET_DATA, cookie,
        offset if request_offset is None else request_offset, length + 8, offset,
    )  # fmt: skip
    return position + 40


def put_extended_hole(  # noqa: PLR0913 -- the fields of the chunk
    buffer: bytearray | memoryview,
    position: int,
    cookie: int,
    offset: int,
    length: int,
    *,
    done: bool,
    request_offset: int,
) -> int:
    """Write an extended OFFSET_HOLE chunk; return where it ends."""
    EXTENDED_HOLE_CHUNK.pack_into(
        buffer, position, EXTENDED_REPLY_MAGIC, done, _OFFSET_HOLE, cookie,
        request_offset, 12, offset, length,
    )  # fmt: skip
    return position + 44


def simple_reply(cookie: int, error: int = 0) -> bytes:
    """Return a simple reply, without the data of a read."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def chunk(cookie: int, kind: int, payload: bytes = b"", *, done: bool) -> bytes:
    """Return a whole chunk."""
    header = CHUNK.pack(STRUCTURED_REPLY_MAGIC, done, kind, cookie, len(payload))
    return header + payload


def done_chunk(cookie: int) -> bytes:
    """Return a NONE chunk that ends a reply successfully."""
    return chunk(cookie, _NONE, done=True)


def data_header(cookie: int, offset: int, length: int, *, done: bool) -> bytes:
    """Return what precedes `length` bytes of data in an OFFSET_DATA chunk."""
    return DATA_CHUNK.pack(
        STRUCTURED_REPLY_MAGIC, done, _OFFSET_DATA, cookie, length + 8, offset
    )


def hole_chunk(cookie: int, offset: int, length: int, *, done: bool) -> bytes:
    """Return an OFFSET_HOLE chunk: `length` zeros at `offset`."""
    return HOLE_CHUNK.pack(
        STRUCTURED_REPLY_MAGIC, done, _OFFSET_HOLE, cookie, 12, offset, length
    )


def block_status_chunk(
    cookie: int, context_id: int, extents: Sequence[tuple[int, int]], *, done: bool
) -> bytes:
    """Return a BLOCK_STATUS chunk.

    Args:
        cookie: Of the request.
        context_id: As told in the reply to NBD_OPT_SET_META_CONTEXT.
        extents: Lengths in bytes and status flags, at least one pair.
        done: Whether this is the last context of the reply.
    """
    numbers = [number for extent in extents for number in extent]
    payload = struct.pack(f">I{len(numbers)}I", context_id, *numbers)
    return chunk(cookie, ChunkType.BLOCK_STATUS, payload, done=done)


def extended_chunk(
    cookie: int, request_offset: int, kind: int, payload: bytes = b"", *, done: bool
) -> bytes:
    """Return a whole extended chunk."""
    header = EXTENDED_CHUNK.pack(
        EXTENDED_REPLY_MAGIC, done, kind, cookie, request_offset, len(payload)
    )
    return header + payload


def extended_block_status_chunk(
    cookie: int,
    request_offset: int,
    context_id: int,
    extents: Sequence[tuple[int, int]],
    *,
    done: bool,
) -> bytes:
    """Return a BLOCK_STATUS_EXT chunk: as `block_status_chunk`, in numbers of 64 bits."""
    numbers = [number for extent in extents for number in extent]
    payload = struct.pack(f">II{len(numbers)}Q", context_id, len(extents), *numbers)
    return extended_chunk(
        cookie, request_offset, ChunkType.BLOCK_STATUS_EXT, payload, done=done
    )


def error_chunk(
    cookie: int, error: int, text: str = "", *, offset: int | None = None
) -> bytes:
    """Return the chunk that ends a reply with an error.

    Args:
        cookie: Of the request.
        error: One of `NbdError`.
        text: For a person; cut at `MAX_STRING` bytes.
        offset: Where in the export it happened, if that is known.
    """
    kind, payload = error_payload(error, text, offset=offset)
    return chunk(cookie, kind, payload, done=True)


def error_payload(
    error: int, text: str = "", *, offset: int | None = None
) -> tuple[ChunkType, bytes]:
    """Return type and payload of the chunk that ends a reply with an error."""
    message = clipped(text)
    payload = _ERROR.pack(error, len(message)) + message
    if offset is None:
        return ChunkType.ERROR, payload
    return ChunkType.ERROR_OFFSET, payload + _OFFSET.pack(offset)


def clipped(text: str) -> bytes:
    """Return a text for the wire: UTF-8, at most `MAX_STRING` bytes, no NUL."""
    data = text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace")
    if len(data) > MAX_STRING:
        data = data[:MAX_STRING].decode("utf-8", "ignore").encode()
    return data
