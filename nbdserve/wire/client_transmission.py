"""The client's side of the transmission phase, as a state machine without I/O.

Requests go out under cookies of their own, and a `Reply` comes back for each, in
whatever order the server likes. The chunks of structured replies are put together
here, and held against the specification as strictly as it allows: the tests of the
server lean on that. Sections of doc/proto.md: "Simple reply message", "Structured
reply chunk message", "Structured reply types", "Request types".
"""

import struct
from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from nbdserve.errors import ProtocolError
from nbdserve.wire.constants import (
    CHUNK_ERROR_BIT,
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
from nbdserve.wire.replies import CHUNK, SIMPLE_REPLY
from nbdserve.wire.requests import REQUEST, Request
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

    __slots__ = ("complete", "covered", "reply")

    def __init__(self, request: Request) -> None:
        self.reply = Reply(request)
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
        self, *, structured: bool = False, context_ids: Collection[int] = ()
    ) -> None:
        self._structured = structured
        self._context_ids = frozenset(context_ids)
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
        """Send any request, also one that the server will have to refuse."""
        cookie = self._next_cookie
        self._next_cookie += 1
        self._outgoing += REQUEST.pack(
            REQUEST_MAGIC, flags, command, cookie, offset, length
        )
        self._outgoing += payload
        if command != Command.DISC:
            request = Request(command, flags, cookie, offset, length)
            self._pending[cookie] = _Pending(request)
        return cookie

    def read(self, offset: int, length: int, *, flags: int = 0) -> int:
        """Send NBD_CMD_READ."""
        return self.request(Command.READ, flags=flags, offset=offset, length=length)

    def write(
        self, offset: int, data: bytes | bytearray | memoryview, *, flags: int = 0
    ) -> int:
        """Send NBD_CMD_WRITE."""
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

    def block_status(self, offset: int, length: int, *, flags: int = 0) -> int:
        """Send NBD_CMD_BLOCK_STATUS."""
        return self.request(
            Command.BLOCK_STATUS, flags=flags, offset=offset, length=length
        )

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
            if magic == SIMPLE_REPLY_MAGIC:
                return self._take_simple()
            if magic != STRUCTURED_REPLY_MAGIC or not self._structured:
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
        if len(self._incoming) < CHUNK.size:
            return None
        _, flags, kind, cookie, length = CHUNK.unpack_from(self._incoming)
        pending = self._find(cookie)
        if length > MAX_DRAIN:
            raise ProtocolError(f"a chunk announces {length} bytes")
        end = CHUNK.size + length
        if len(self._incoming) < end:
            return None
        payload = bytes(self._incoming[CHUNK.size : end])
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
        elif kind == ChunkType.BLOCK_STATUS and command == Command.BLOCK_STATUS:
            self._gather_status(pending.reply, payload)
        else:
            raise ProtocolError(
                f"chunk type {kind} as a reply to {command_name(command)}"
            )

    def _gather_status(self, reply: Reply, payload: bytes) -> None:
        if len(payload) < 12 or len(payload) % 8 != 4:
            raise ProtocolError(f"a BLOCK_STATUS chunk of {len(payload)} bytes")
        (context_id,) = _U32.unpack_from(payload)
        if context_id not in self._context_ids or context_id in reply.statuses:
            raise ProtocolError(f"meta context {context_id} is unknown or came twice")
        extents = list(struct.iter_unpack(">II", payload[4:]))
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
            reply.statuses.keys() != self._context_ids
        ):
            raise ProtocolError("a meta context is missing in the reply")

    def _find(self, cookie: int) -> _Pending:
        try:
            return self._pending[cookie]
        except KeyError:
            raise ProtocolError(f"a reply to an unknown cookie {cookie:#x}") from None


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
