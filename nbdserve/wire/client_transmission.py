"""The client's side of the transmission phase, as a state machine without I/O.

Requests go out under cookies of their own, and a `Reply` comes back for each, in
whatever order the server likes. The chunks of structured replies are put together
here, and held against the specification as strictly as it allows: the tests of the
server lean on that. Sections of doc/proto.md: "Simple reply message", "Structured
reply chunk message", "Extended reply chunk message", "Structured reply types",
"Request types".
"""

import struct
from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from nbdserve.errors import ProtocolError
from nbdserve.wire.constants import (
    CHUNK_ERROR_BIT,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    MAX_DRAIN,
    MAX_STRING,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    ChunkFlag,
    ChunkType,
    Command,
    CommandFlag,
)
from nbdserve.wire.replies import CHUNK, EXTENDED_CHUNK, SIMPLE_REPLY
from nbdserve.wire.requests import EXTENDED_REQUEST, REQUEST, Request
from nbdserve.wire.validate import command_name

_U32: Final = struct.Struct(">I")
_ERROR: Final = struct.Struct(">IH")
_HOLE: Final = struct.Struct(">QI")


@dataclass(slots=True)
class Reply:
    """A complete reply.

    Attributes:
        request: What it answers.
        error: 0, or one of `NbdError` (or a number that isn't one).
        text: What the server said about the error.
        error_offset: Where in the export it happened, if the server said so.
        data: What a read returned, zeros filled in for the holes.
        holes: Offset in the export and length of each hole chunk of a read.
        statuses: Of BLOCK_STATUS: context id -> lengths and status flags.
        chunks: The types of the chunks in the order they came; empty with a
            simple reply.
    """

    request: Request
    error: int = 0
    text: str = ""
    error_offset: int | None = None
    data: bytearray = field(default_factory=bytearray)
    holes: list[tuple[int, int]] = field(default_factory=list)
    statuses: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    chunks: list[int] = field(default_factory=list)


class _Pending:
    """A request whose reply is not complete."""

    __slots__ = ("complete", "context_ids", "covered", "reply")

    def __init__(self, request: Request, context_ids: frozenset[int]) -> None:
        self.reply = Reply(request)
        #: of BLOCK_STATUS: those that the reply has to have
        self.context_ids = context_ids
        self.complete = False
        #: start and end of what content chunks have told, in order
        self.covered: list[tuple[int, int]] = []

    def cover(self, offset: int, length: int) -> int:
        """Note a content chunk; return where in the data it belongs."""
        request = self.reply.request
        start, end = offset, offset + length
        if length == 0 or start < request.offset:
            raise ProtocolError(f"a content chunk has {length} bytes at {offset}")
        if end > request.offset + request.length:
            raise ProtocolError(f"a content chunk ends at {end}, past the request")
        if request.flags & CommandFlag.DF and self.covered:
            raise ProtocolError("a second content chunk despite NBD_CMD_FLAG_DF")
        index = bisect_left(self.covered, (start, end))
        follows = index == 0 or self.covered[index - 1][1] <= start
        precedes = index == len(self.covered) or end <= self.covered[index][0]
        if not (follows and precedes):
            raise ProtocolError(f"content chunks overlap at {offset}")
        self.covered.insert(index, (start, end))
        return start - request.offset


class ClientTransmission:
    """One connection after its handshake, seen from the client."""

    def __init__(
        self,
        *,
        structured: bool = False,
        extended: bool = False,
        context_ids: Collection[int] = (),
    ) -> None:
        self._structured = structured
        self._extended = extended
        self._context_ids = frozenset(context_ids)
        self._status_kind = (
            ChunkType.BLOCK_STATUS_EXT if extended else ChunkType.BLOCK_STATUS
        )
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._pending: dict[int, _Pending] = {}
        self._next_cookie = 1

    @property
    def in_flight(self) -> int:
        """How many requests have no complete reply."""
        return len(self._pending)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes from the server."""
        self._incoming += data

    def data_to_send(self) -> bytes:
        """Return, once, what is to be sent."""
        data = bytes(self._outgoing)
        self._outgoing.clear()
        return data

    # Requests. Each returns its cookie.

    def request(
        self,
        command: int,
        *,
        flags: int = 0,
        offset: int = 0,
        length: int = 0,
        payload: bytes | bytearray | memoryview = b"",
    ) -> int:
        """Send any request, also one that the server will have to refuse.

        With extended headers NBD_CMD_FLAG_PAYLOAD_LEN is yours to set.
        """
        request = Request(command, flags, self._next_cookie, offset, length)
        return self._send(request, payload, self._context_ids)

    def _send(
        self,
        request: Request,
        payload: bytes | bytearray | memoryview,
        context_ids: frozenset[int],
    ) -> int:
        """Send a request; its header may say something else than `request` means."""
        cookie = self._next_cookie
        self._next_cookie += 1
        layout, magic = (
            (EXTENDED_REQUEST, EXTENDED_REQUEST_MAGIC)
            if self._extended
            else (REQUEST, REQUEST_MAGIC)
        )
        filtered = request.command == Command.BLOCK_STATUS and (
            request.flags & CommandFlag.PAYLOAD_LEN
        )
        length = len(payload) if filtered else request.length
        self._outgoing += layout.pack(
            magic, request.flags, request.command, cookie, request.offset, length
        )
        self._outgoing += payload
        if request.command != Command.DISC:
            self._pending[cookie] = _Pending(request, context_ids)
        return cookie

    def read(self, offset: int, length: int, *, flags: int = 0) -> int:
        """Send NBD_CMD_READ."""
        return self.request(Command.READ, flags=flags, offset=offset, length=length)

    def write(
        self, offset: int, data: bytes | bytearray | memoryview, *, flags: int = 0
    ) -> int:
        """Send NBD_CMD_WRITE."""
        if self._extended:
            flags |= CommandFlag.PAYLOAD_LEN
        return self.request(
            Command.WRITE, flags=flags, offset=offset, length=len(data), payload=data
        )

    def write_zeroes(self, offset: int, length: int, *, flags: int = 0) -> int:
        """Send NBD_CMD_WRITE_ZEROES."""
        return self.request(
            Command.WRITE_ZEROES, flags=flags, offset=offset, length=length
        )

    def trim(self, offset: int, length: int, *, flags: int = 0) -> int:
        """Send NBD_CMD_TRIM."""
        return self.request(Command.TRIM, flags=flags, offset=offset, length=length)

    def cache(self, offset: int, length: int, *, flags: int = 0) -> int:
        """Send NBD_CMD_CACHE."""
        return self.request(Command.CACHE, flags=flags, offset=offset, length=length)

    def block_status(
        self,
        offset: int,
        length: int,
        *,
        flags: int = 0,
        context_ids: Collection[int] | None = None,
    ) -> int:
        """Send NBD_CMD_BLOCK_STATUS.

        Args:
            offset: Bytes.
            length: Bytes.
            flags: NBD_CMD_FLAG_REQ_ONE, or none.
            context_ids: With extended headers: only these of the selected contexts, which
                goes into a payload (NBD_FLAG_BLOCK_STATUS_PAYLOAD).
        """
        payload, wanted = b"", self._context_ids
        if context_ids is not None:
            flags |= CommandFlag.PAYLOAD_LEN
            payload = struct.pack(f">Q{len(context_ids)}I", length, *context_ids)
            wanted = frozenset(context_ids)
        request = Request(
            Command.BLOCK_STATUS, flags, self._next_cookie, offset, length
        )
        return self._send(request, payload, wanted)

    def flush(self, *, flags: int = 0) -> int:
        """Send NBD_CMD_FLUSH."""
        return self.request(Command.FLUSH, flags=flags)

    def disconnect(self) -> None:
        """Send NBD_CMD_DISC, which has no reply."""
        self.request(Command.DISC)

    # Replies

    def next_reply(self) -> Reply | None:
        """Return the next complete reply, or None if more bytes are needed.

        Raises:
            ProtocolError: The server broke the protocol.
        """
        while len(self._incoming) >= 4:
            (magic,) = _U32.unpack_from(self._incoming)
            if magic == SIMPLE_REPLY_MAGIC and not self._extended:
                return self._take_simple()
            chunks = EXTENDED_REPLY_MAGIC if self._extended else STRUCTURED_REPLY_MAGIC
            if magic != chunks or not (self._structured or self._extended):
                raise ProtocolError(f"reply magic is {magic:#010x}")
            pending = self._take_chunk()
            if pending is None:
                return None
            if pending.complete:
                return pending.reply
        return None

    def _take_simple(self) -> Reply | None:
        if len(self._incoming) < SIMPLE_REPLY.size:
            return None
        _, error, cookie = SIMPLE_REPLY.unpack_from(self._incoming)
        pending = self._find(cookie)
        reply = pending.reply
        command = reply.request.command
        reads = command == Command.READ
        if self._structured and (reads or reply.chunks):
            raise ProtocolError("a simple reply where a structured one is due")
        if command == Command.BLOCK_STATUS and not error:
            raise ProtocolError("a simple reply to NBD_CMD_BLOCK_STATUS")
        length = reply.request.length if reads and not error else 0
        end = SIMPLE_REPLY.size + length
        if len(self._incoming) < end:
            return None
        reply.error = error
        reply.data = self._incoming[SIMPLE_REPLY.size : end]
        del self._incoming[:end]
        del self._pending[cookie]
        return reply

    def _take_chunk(self) -> _Pending | None:
        """Take one chunk, if it is there as a whole; return whose it is."""
        layout = EXTENDED_CHUNK if self._extended else CHUNK
        if len(self._incoming) < layout.size:
            return None
        _, flags, kind, cookie, *offset, length = layout.unpack_from(self._incoming)
        pending = self._find(cookie)
        if self._extended and offset != [pending.reply.request.offset]:
            raise ProtocolError(
                f"a chunk has offset {offset[0]}, not that of its request"
            )
        if length > MAX_DRAIN:
            raise ProtocolError(f"a chunk announces {length} bytes")
        end = layout.size + length
        if len(self._incoming) < end:
            return None
        payload = bytes(self._incoming[layout.size : end])
        del self._incoming[:end]
        pending.reply.chunks.append(kind)
        self._gather(pending, kind, payload, done=bool(flags & ChunkFlag.DONE))
        if flags & ChunkFlag.DONE:
            del self._pending[cookie]
            self._check_complete(pending)
            pending.complete = True
        return pending

    def _gather(
        self, pending: _Pending, kind: int, payload: bytes, *, done: bool
    ) -> None:
        """Keep what one chunk says."""
        command = pending.reply.request.command
        if kind & CHUNK_ERROR_BIT:
            _gather_error(pending.reply, kind, payload)
        elif kind == ChunkType.NONE:
            if payload or not done:
                raise ProtocolError("a NONE chunk with payload or without DONE")
        elif kind == ChunkType.OFFSET_DATA and command == Command.READ:
            _gather_data(pending, payload)
        elif kind == ChunkType.OFFSET_HOLE and command == Command.READ:
            _gather_hole(pending, payload)
        elif kind == self._status_kind and command == Command.BLOCK_STATUS:
            self._gather_status(pending, payload)
        else:
            raise ProtocolError(
                f"chunk type {kind} as a reply to {command_name(command)}"
            )

    def _gather_status(self, pending: _Pending, payload: bytes) -> None:
        reply = pending.reply
        context_id, extents = (
            _parse_extended_status(payload)
            if self._extended
            else _parse_status(payload)
        )
        if context_id not in pending.context_ids or context_id in reply.statuses:
            raise ProtocolError(f"meta context {context_id} is unknown or came twice")
        request = reply.request
        if any(length == 0 for length, _ in extents):
            raise ProtocolError("an extent of no length")
        if sum(length for length, _ in extents[:-1]) >= request.length:
            raise ProtocolError("more extents than the request covers")
        if request.flags & CommandFlag.REQ_ONE and (
            len(extents) != 1 or extents[0][0] > request.length
        ):
            raise ProtocolError("more than asked for with NBD_CMD_FLAG_REQ_ONE")
        reply.statuses[context_id] = extents

    def _check_complete(self, pending: _Pending) -> None:
        """Refuse a reply that claims success and tells less than it has to."""
        reply = pending.reply
        if reply.error:
            return
        if reply.request.command == Command.READ:
            told = sum(end - start for start, end in pending.covered)
            if told != reply.request.length:
                raise ProtocolError(
                    f"a read of {reply.request.length} bytes got {told} of them"
                )
        if reply.request.command == Command.BLOCK_STATUS and (
            reply.statuses.keys() != pending.context_ids
        ):
            raise ProtocolError("a meta context is missing in the reply")

    def _find(self, cookie: int) -> _Pending:
        try:
            return self._pending[cookie]
        except KeyError:
            raise ProtocolError(f"a reply to an unknown cookie {cookie:#x}") from None


def _parse_status(payload: bytes) -> tuple[int, list[tuple[int, int]]]:
    """Parse the payload of a BLOCK_STATUS chunk: context id, and extents."""
    if len(payload) < 12 or len(payload) % 8 != 4:
        raise ProtocolError(f"a BLOCK_STATUS chunk of {len(payload)} bytes")
    (context_id,) = _U32.unpack_from(payload)
    return context_id, list(struct.iter_unpack(">II", payload[4:]))


def _parse_extended_status(payload: bytes) -> tuple[int, list[tuple[int, int]]]:
    """Parse the payload of a BLOCK_STATUS_EXT chunk: context id, and extents."""
    if len(payload) < 24 or len(payload) % 16 != 8:
        raise ProtocolError(f"a BLOCK_STATUS_EXT chunk of {len(payload)} bytes")
    context_id, count = struct.unpack_from(">II", payload)
    if count * 16 + 8 != len(payload):
        raise ProtocolError(f"{count} extents in {len(payload)} bytes")
    return context_id, list(struct.iter_unpack(">QQ", payload[8:]))


def _gather_error(reply: Reply, kind: int, payload: bytes) -> None:
    """Parse an error chunk; those of unknown type begin as the known ones do."""
    if len(payload) < _ERROR.size:
        raise ProtocolError(f"an error chunk of {len(payload)} bytes")
    error, length = _ERROR.unpack_from(payload)
    rest = payload[_ERROR.size + length :]
    if error == 0 or length > MAX_STRING or len(payload) < _ERROR.size + length:
        raise ProtocolError("an error chunk contradicts itself")
    if kind == ChunkType.ERROR_OFFSET:
        if len(rest) != 8:
            raise ProtocolError("an ERROR_OFFSET chunk of a wrong size")
        reply.error_offset = int.from_bytes(rest, "big")
    elif kind == ChunkType.ERROR and rest:
        raise ProtocolError("an ERROR chunk with bytes behind its message")
    reply.error = error
    text = payload[_ERROR.size : _ERROR.size + length]
    reply.text = text.decode(errors="replace")


def _gather_data(pending: _Pending, payload: bytes) -> None:
    if len(payload) < 9:
        raise ProtocolError(f"an OFFSET_DATA chunk of {len(payload)} bytes")
    offset = int.from_bytes(payload[:8], "big")
    position = pending.cover(offset, len(payload) - 8)
    _make_room(pending.reply)
    pending.reply.data[position : position + len(payload) - 8] = payload[8:]


def _gather_hole(pending: _Pending, payload: bytes) -> None:
    if len(payload) != _HOLE.size:
        raise ProtocolError(f"an OFFSET_HOLE chunk of {len(payload)} bytes")
    offset, length = _HOLE.unpack(payload)
    pending.cover(offset, length)
    _make_room(pending.reply)
    pending.reply.holes.append((offset, length))


def _make_room(reply: Reply) -> None:
    """Begin with zeros, so that holes need no filling."""
    if not reply.data:
        reply.data = bytearray(reply.request.length)
