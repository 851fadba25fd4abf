"""The payload of a large write, on its way from the socket to the disk.

Where all of it replaces bytes in place, it need not pass through this process: splice(2)
moves the socket's pages into a pipe, and from there their bytes are copied into the page
cache as they arrive. That is one copy instead of two, and while one piece is written the
client already sends the next: its socket takes only 208 KiB at a time. Elsewhere the
payload is received as a whole, where the disk takes it from.
"""

import contextlib
import errno
import fcntl
import os
import socket
from dataclasses import dataclass
from typing import Final

from nbdserve.block.loan import Piece
from nbdserve.server.budget import Budget
from nbdserve.server.buffers import Buffer, BufferPool
from nbdserve.server.session import Begun, Session
from nbdserve.server.tls import RECORD, ByteStream
from nbdserve.storage.base import Storage
from nbdserve.wire.constants import CommandFlag

#: Payloads from this size on go through the pipe. Of 256 KiB 1.2 times as many are written
#: as without it, of 128 KiB 0.95 times: each takes two system calls more.
IN_PLACE: Final = 256 << 10
#: Bytes that are moved at once: 50 us of writing. As much as a Unix socket holds by default.
_PIECE: Final = 256 << 10
_FUA: Final = int(CommandFlag.FUA)
#: What splice(2) says of sockets that can't, of sandboxes and of kernels without it.
_NO_SPLICE: Final = frozenset({errno.EINVAL, errno.EPERM, errno.ENOSYS})
#: linux/splice.h
_SPLICE_F_MOVE: Final = 1
_SPLICE_F_NONBLOCK: Final = 2


class Pipe:
    """The pipe between a socket and a file, shared by a loop: empty after each turn."""

    def __init__(self) -> None:
        self._ends: tuple[int, int] | None = None

    def ready(self) -> bool:
        """Return whether there is a pipe: no descriptor may be left for one."""
        if self._ends is None:
            with contextlib.suppress(OSError):
                self._open()
        return self._ends is not None

    def fill(self, socket_fd: int, length: int) -> int:
        """Take up to `length` bytes out of a non-blocking socket.

        Returns:
            How many bytes are to be written to files now; 0 at the end of the stream.

        Raises:
            BlockingIOError: There are none yet.
            OSError: The connection is lost.
        """
        _, end = self._ends or self._open()
        flags = _SPLICE_F_MOVE | _SPLICE_F_NONBLOCK
        return os.splice(socket_fd, end, min(length, _PIECE), flags=flags)

    def _open(self) -> tuple[int, int]:
        self._ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        with contextlib.suppress(OSError):  # then it takes fewer at once
            fcntl.fcntl(self._ends[1], fcntl.F_SETPIPE_SZ, _PIECE)
        return self._ends

    def empty(self, storage: Storage, offset: int, length: int) -> None:
        """Write all that is in the pipe, `length` bytes, to a file.

        Raises:
            OSError: The file can't be written; the bytes are gone.
        """
        end, _ = self._ends or self._open()
        try:
            storage.write_piped(offset, end, length)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Forget what is in it; the next one to use it has a new one."""
        if self._ends is not None:
            for end in self._ends:
                os.close(end)
            self._ends = None


@dataclass(slots=True)
class _Payload:
    """A write whose payload is still arriving.

    Attributes:
        received: Bytes that have left the socket.
        begun: What is on the disk of them already, if it goes there at once.
        buffer: Where what is not goes to, once that is needed.
    """

    flags: int
    cookie: int
    offset: int
    length: int
    received: int
    begun: Begun | None = None
    buffer: Buffer | None = None

    @property
    def unwritten(self) -> int:
        """Bytes that are not on the disk yet."""
        return self.length if self.begun is None else self.length - self.begun.written


class Intake:
    """Receives the payload of one write at a time.

    Attributes:
        bytes_taken: Of all payloads, ever.
        spliced: Whether nothing of the last payload was received into memory.
        starved: Whether the payload waits until others give memory back.
    """

    def __init__(
        self,
        sock: ByteStream,
        session: Session,
        pool: BufferPool,
        pipe: Pipe,
        budget: Budget,
    ) -> None:
        self._socket = sock
        self._session = session
        self._pool = pool
        self._pipe = pipe
        self._budget = budget
        self._may_splice = isinstance(sock, socket.socket)
        self._payload: _Payload | None = None
        self.bytes_taken = 0
        self.spliced = self.starved = False

    @property
    def busy(self) -> bool:
        """Whether a payload is still arriving."""
        return self._payload is not None

    @property
    def bytes_held(self) -> int:
        """How many bytes are held until the rest has arrived."""
        payload = self._payload
        return 0 if payload is None or payload.buffer is None else payload.unwritten

    @property
    def on_old_disk(self) -> bool:
        """Whether a payload is still arriving for a disk that the session had before."""
        begun = None if self._payload is None else self._payload.begun
        return begun is not None and self._session.is_old(begun)

    def begin_in_place(
        self, flags: int, cookie: int, offset: int, length: int, first: memoryview
    ) -> bool:
        """Begin with a payload of which `first` is there, and write that.

        Returns:
            Whether it can be written in place; otherwise nothing was done.
        """
        if length < IN_PLACE or flags & _FUA or not self._may_splice:
            return False
        begun = self._session.begin()
        if self._put_first(begun, offset, length, first):
            self._payload = _Payload(
                flags, cookie, offset, length, len(first), begun=begun
            )
            return True
        self._session.leave(begun)
        return False

    @staticmethod
    def _put_first(begun: Begun, offset: int, length: int, first: memoryview) -> bool:
        while True:
            place = begun.place(offset, length)
            if place is None:
                return False
            done = begun.written
            if done == len(first):
                return True
            storage, host_offset, room = place
            piece = first[done : done + room]
            try:
                if not storage.try_write(host_offset, piece):
                    return False
            except OSError:
                return False  # once more, as a whole, which says what is wrong
            begun.written += len(piece)

    def begin(
        self, flags: int, cookie: int, offset: int, length: int, first: memoryview
    ) -> None:
        """Begin with a payload of which `first` is there, in memory."""
        payload = _Payload(flags, cookie, offset, length, len(first))
        self._payload = payload
        self._take_buffer(payload).view[: len(first)] = first

    def _take_buffer(self, payload: _Payload) -> Buffer:
        payload.buffer = buffer = self._pool.take(payload.unwritten)
        self._budget.take(payload.unwritten)
        return buffer

    def receive(self, most: int) -> int | None:
        """Receive up to `most` bytes of the payload, and write it when all is there.

        Returns:
            How many bytes of it are still to come and to be thrown away, as the write has
            failed; None at the end of the stream.

        Raises:
            OSError: The connection is lost.
        """
        payload = self._payload
        self.starved = False
        if payload is None:
            return 0
        before = payload.received
        left: int | None = 0
        try:
            left = self._receive_some(payload, min(payload.length, before + most))
        except (BlockingIOError, InterruptedError):
            if payload.received == before and self._splice_is_stuck():
                self._may_splice = False  # the next turn is at once: there are bytes
        except OSError as error:
            if not self._may_splice or error.errno not in _NO_SPLICE:
                raise
            self._may_splice = False  # the same: nothing was taken
        if payload is self._payload and payload.received == payload.length:
            self._carry_out(payload)
        return left

    def _receive_some(self, payload: _Payload, enough: int) -> int | None:
        """Receive until `enough` bytes have left the socket; returns what `receive` does."""
        while payload.received < enough:
            place = self._place_of(payload)
            if place is not None:
                room = min(place[2], enough - payload.received)
                received = self._pipe.fill(self._socket.fileno(), room)
            elif payload.buffer is None and self._budget.exhausted:
                self.starved = True
                return 0
            else:
                received = self._receive_into(payload, enough - payload.received)
            if not received:
                return None
            payload.received += received
            self.bytes_taken += received
            if place is not None and not self._put(payload, place, received):
                left = payload.length - payload.received
                self.drop()
                return left
        return 0

    def _place_of(self, payload: _Payload) -> Piece | None:
        """Ask where the next bytes can be put past our memory."""
        if payload.buffer is not None or payload.begun is None:
            return None
        if not self._may_splice or not self._pipe.ready():
            return None
        return payload.begun.place(payload.offset, payload.length)

    def _splice_is_stuck(self) -> bool:
        """Tell whether there are bytes though splice finds none: it stops at TCP's urgent ones."""
        sock = self._socket
        if not self._may_splice or not isinstance(sock, socket.socket):
            return False
        try:
            sock.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return False
        return True

    def _receive_into(self, payload: _Payload, most: int) -> int:
        """Receive up to `most` bytes, or a record of TLS if that is more."""
        buffer = payload.buffer or self._take_buffer(payload)
        there = payload.unwritten - (payload.length - payload.received)
        # With room for a record none is left in memory, where no event would tell of it.
        stop = min(payload.unwritten, there + max(most, RECORD))
        return self._socket.recv_into(buffer.view[there:stop])

    def _put(self, payload: _Payload, place: Piece, length: int) -> bool:
        """Write what is in the pipe; return False if that failed, which is answered."""
        storage, host_offset, _ = place
        try:
            self._pipe.empty(storage, host_offset, length)
        except OSError as error:
            self._session.write_failed(payload.cookie, payload.offset, error)
            return False
        if payload.begun is not None:
            payload.begun.written += length
        return True

    def _carry_out(self, payload: _Payload) -> None:
        """Write what is not written yet, and answer."""
        session, buffer, begun = self._session, payload.buffer, payload.begun
        self.spliced = buffer is None
        session.counters.requests += 1
        if buffer is not None:
            rest = buffer.view[: payload.unwritten]
            session.counters.bytes_written += payload.length - len(rest)
            session.write(
                payload.flags, payload.cookie, payload.offset, rest, buffer, begun
            )
        else:
            session.written(payload.cookie, payload.offset, payload.length)
        self.drop()

    def drop(self) -> None:
        """Forget the payload."""
        payload, self._payload = self._payload, None
        if payload is None:
            return
        if payload.buffer is not None:
            self._budget.give_back(payload.unwritten)
            payload.buffer.unpin()
        if payload.begun is not None:
            self._session.leave(payload.begun)
