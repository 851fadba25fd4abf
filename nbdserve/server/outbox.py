"""Replies on their way out: filled in place, sent in batches.

The replies of one turn lie one behind the other in the arena, a buffer that all
connections of a loop share, and leave in one `send`. A turn never waits, so
the arena is empty again after it, unless the peer does not read fast enough or
a read had to wait for its data: then the parts still needed stay pinned, and
the arena goes on behind them or in another buffer.
"""

import asyncio
import errno
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from nbdserve.block.loan import Piece
from nbdserve.server.budget import Budget
from nbdserve.server.buffers import Buffer, BufferPool
from nbdserve.server.tls import ByteStream

#: Bytes of replies that leave at once: 16 reads of 4 KiB. Sending 256 KiB at once instead
#: saves system calls, and a fifth of the throughput: the client has less to do
#: while the server works.
REPLY_ARENA: Final = 64 << 10
#: Replies longer than this, if the arena has no room left for them, get a buffer of their
#: own, and are sent at once.
_LARGE: Final = REPLY_ARENA // 2
#: Linux takes up to 1024 (IOV_MAX) in one call; more than a few gain nothing.
_PIECES_PER_CALL: Final = 64
#: Bytes handed to the kernel in one call, and, times two, before others have their turn: a
#: peer that reads as fast as we send would take a queue of 64 MiB in one go (20 ms).
_BYTES_PER_CALL: Final = 1 << 20
#: The same while other clients are there: 30 us. For TLS it stays the same, because what was
#: refused once has to be offered again as a whole.
_BYTES_PER_SHORT_CALL: Final = 128 << 10


class Arena:
    """The buffer that is being filled; a new one takes its place when it is full.

    Attributes:
        pool: Where buffers come from.
        size: Bytes of it.
        buffer: What is being filled, from `position` on.
    """

    __slots__ = ("buffer", "pool", "size")

    def __init__(self, pool: BufferPool, size: int) -> None:
        self.pool = pool
        self.size = size
        self.buffer = pool.take(size)

    def renew(self) -> Buffer:
        """Leave the buffer to those who use parts of it, and go on with another."""
        self.buffer.unpin()
        self.buffer = self.pool.take(self.size)
        return self.buffer

    def close(self) -> None:
        """Give the buffer back."""
        self.buffer.unpin()


class Outbox:
    """The replies of one connection.

    Between `begin` and `flush` nothing else may use the arena: a turn is one piece.

    Attributes:
        arena: Where replies are put together.
        blocked: Whether the peer has to read before anything more can be sent.
        bytes_unblocked: How many bytes were sent that had to wait for the peer, ever.
        lost: Why nothing can be sent any longer, if so.
        may_borrow: Whether bytes that a disk lends can be sent.
        crowded: Whether others wait for every call that takes long (see `company.py`).
    """

    __slots__ = (
        "_budget",
        "_flush_scheduled",
        "_loop",
        "_on_drained",
        "_queue",
        "_run_start",
        "_socket",
        "arena",
        "blocked",
        "bytes_unblocked",
        "crowded",
        "lost",
        "may_borrow",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: ByteStream,
        arena: Arena,
        budget: Budget,
        on_drained: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._socket = sock
        self.arena = arena
        self._budget = budget
        self._on_drained = on_drained
        # what precedes the run [run_start, position) of the arena; a pin each
        self._queue: deque[tuple[memoryview, Buffer | None]] = deque()
        self._run_start = 0
        self._flush_scheduled = False
        self.blocked = False
        self.bytes_unblocked = 0
        self.lost: OSError | None = None
        self.may_borrow = isinstance(sock, socket.socket)  # what is encrypted is copied
        self.crowded = False

    @property
    def empty(self) -> bool:
        """Whether every reply was handed to the kernel, or never can be."""
        return not self._queue

    @property
    def bytes_queued(self) -> int:
        """How many bytes wait for the peer."""
        return sum(len(piece) for piece, _ in self._queue)

    def begin(self) -> None:
        """Start a turn."""
        buffer = self.arena.buffer
        if buffer.pins == 1:
            buffer.position = 0
        self._run_start = buffer.position

    def reserve(self, length: int) -> Buffer:
        """Return a buffer whose last `length` bytes before `position` are yours.

        Fill them before the turn ends, or say what becomes of them: `detach`,
        `withdraw`, `send_parts`. A buffer that is not the arena's has nothing else in
        it and is sent only by `send_parts`.
        """
        buffer = self.arena.buffer
        end = buffer.position + length
        if end <= buffer.capacity:
            buffer.position = end
            return buffer
        return self._reserve_elsewhere(length)

    def _reserve_elsewhere(self, length: int) -> Buffer:
        if length > _LARGE:
            buffer = self.arena.pool.take(length)
        else:
            self.flush()
            buffer = self.arena.buffer
            if buffer.position + length > buffer.capacity:
                self._end_run()
                buffer = self.arena.renew()
                self._run_start = 0
        buffer.position += length
        return buffer

    def put(self, reply: bytes) -> None:
        """Add a reply to the turn."""
        buffer = self.reserve(len(reply))
        end = buffer.position
        buffer.view[end - len(reply) : end] = reply
        if buffer is not self.arena.buffer:
            self.send_parts(buffer, end, [(0, end)])

    def withdraw(self, buffer: Buffer, start: int) -> None:
        """Undo the latest `reserve`, which started at `start`."""
        if buffer is self.arena.buffer:
            buffer.position = start
        else:
            buffer.unpin()

    def detach(self, buffer: Buffer, start: int) -> None:
        """Keep what was reserved last for later: `send_late` or `drop` ends that."""
        if buffer is self.arena.buffer:
            self._end_run(start)
            self._run_start = buffer.position
            buffer.pin()

    def send_parts(
        self, buffer: Buffer, start: int, parts: Sequence[tuple[int, int]]
    ) -> None:
        """Send only parts of what was reserved last, which started at `start`."""
        view = buffer.view
        if buffer is self.arena.buffer:
            if len(parts) == 1 and parts[0][0] == start:
                buffer.position = parts[0][1]
                return
            self._end_run(start)
            self._run_start = buffer.position
            buffer.pin()
            self._enqueue(view, parts, buffer)
        else:
            self._end_run()
            self._enqueue(view, parts, buffer)
            self.flush()

    def send_late(self, buffer: Buffer, parts: Sequence[tuple[int, int]]) -> None:
        """Send parts of what was detached, outside of a turn."""
        if self.lost is not None:
            buffer.unpin()
            return
        self._enqueue(buffer.view, parts, buffer)
        self._flush_soon()

    def send_late_bytes(self, reply: bytes) -> None:
        """Send a reply outside of a turn."""
        if self.lost is None:
            self._queue.append((memoryview(reply), None))
            self._budget.take(len(reply))
            self._flush_soon()

    def _enqueue(
        self, view: memoryview, parts: Sequence[tuple[int, int]], buffer: Buffer
    ) -> None:
        """Queue parts of a buffer, and hand the caller's pin over to the last one."""
        last = len(parts) - 1
        for number, (start, end) in enumerate(parts):
            self._queue.append((view[start:end], buffer if number == last else None))
            self._budget.take(end - start)

    def _end_run(self, end: int | None = None) -> None:
        """Queue the run, so that something else can follow it."""
        buffer = self.arena.buffer
        if end is None:
            end = buffer.position
        if end > self._run_start:
            buffer.pin()
            self._enqueue(buffer.view, [(self._run_start, end)], buffer)
        self._run_start = end

    def abandon(self) -> None:
        """Forget the replies of this turn that lie in the arena.

        One may be reserved and not filled: what is there is somebody else's.
        """
        self.arena.buffer.position = self._run_start

    def flush(self) -> None:
        """Send the replies of this turn, or as much as the kernel takes."""
        buffer = self.arena.buffer
        start = self._run_start
        end = buffer.position
        if self._queue:
            self._end_run()
            if not self.blocked:
                self._send_queue()
        elif end > start:
            try:
                sent = self._socket.send(buffer.view[start:end])
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                self._lose(error)
                sent = end - start
            if sent < end - start:
                self._run_start = start + sent
                self._end_run()
                self._block()
        if buffer.pins == 1:
            buffer.position = 0
        self._run_start = buffer.position

    # Loans

    def send_lent(self, pieces: Sequence[Piece]) -> None:
        """Send what precedes in this turn, then bytes that a disk has lent.

        Nothing may be queued. What the kernel does not take now is copied: what is lent
        never waits for a peer that does not read.
        """
        self.flush()
        rest = pieces
        if not self._queue and self.lost is None:
            rest = self._send_pieces(pieces)
        if rest and self.lost is None:
            self._copy_pieces(rest)

    def _send_pieces(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        """Send lent bytes; return those that the kernel did not take."""
        socket_fd = self._socket.fileno()
        for number, (storage, offset, length) in enumerate(pieces):
            position, end = offset, offset + length
            while position < end:
                try:
                    sent = storage.send(socket_fd, position, end - position)
                except (BlockingIOError, InterruptedError):
                    sent = 0
                except OSError as error:
                    self._lose(error)
                    return ()
                if not sent:
                    rest = (storage, position, end - position)
                    return (rest, *pieces[number + 1 :])
                position += sent
        return ()

    def _copy_pieces(self, pieces: Sequence[Piece]) -> None:
        """Queue a copy of lent bytes."""
        length = sum(piece[2] for piece in pieces)
        buffer = self.arena.pool.take(length)
        position = 0
        try:
            for storage, offset, size in pieces:
                storage.read_now(offset, buffer.view[position : position + size])
                position += size
        except OSError as error:
            # The header says that the bytes follow: there is no way back.
            buffer.unpin()
            self._lose(error)
            return
        self._enqueue(buffer.view, [(0, length)], buffer)
        self._block()

    def _flush_soon(self) -> None:
        """Send what was queued once all that is ready now has been queued too."""
        if not self._flush_scheduled and not self.blocked:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush_late)

    def _flush_late(self) -> None:
        self._flush_scheduled = False
        if self._queue and not self.blocked:
            self._send_queue()
        if not self._queue:
            self._on_drained()

    def _send_queue(self) -> None:
        """Send what is queued, and wait for the peer if that is not everything."""
        queue = self._queue
        at_once, bytes_left = _BYTES_PER_CALL, 2 * _BYTES_PER_CALL
        if self.may_borrow and self.crowded:
            at_once = bytes_left = _BYTES_PER_SHORT_CALL
        try:
            while queue:
                pieces = _first(queue, at_once)
                if len(pieces) == 1:
                    sent = self._socket.send(pieces[0])
                else:
                    sent = self._socket.sendmsg(pieces)
                self._sent(sent)
                bytes_left -= sent
                if bytes_left <= 0 and queue:
                    self._block()  # and come back in the next turn of the loop
                    return
        except (BlockingIOError, InterruptedError):
            self._block()
        except OSError as error:
            self._lose(error)

    def _sent(self, sent: int) -> None:
        """Take `sent` bytes off the queue."""
        queue = self._queue
        self._budget.give_back(sent)
        self.bytes_unblocked += sent
        while sent:
            piece, buffer = queue[0]
            if sent < len(piece):
                queue[0] = (piece[sent:], buffer)
                return
            sent -= len(piece)
            queue.popleft()
            if buffer is not None:
                buffer.unpin()

    def _block(self) -> None:
        if not self.blocked:
            self.blocked = True
            self._loop.add_writer(self._socket.fileno(), self._on_writable)

    def _unblock(self) -> None:
        if self.blocked:
            self.blocked = False
            self._loop.remove_writer(self._socket.fileno())

    def _on_writable(self) -> None:
        self._send_queue()
        if not self._queue:
            self._unblock()
            self._on_drained()

    def _lose(self, error: OSError) -> None:
        """Forget all replies: the peer is gone."""
        # without its traceback, whose frames hold the replies
        self.lost = error.with_traceback(None)
        self.close()

    def close(self) -> None:
        """Give everything back; call it before the socket is closed."""
        if self.lost is None:
            self.lost = OSError(errno.ESHUTDOWN, "connection closed")
        self._unblock()
        while self._queue:
            piece, buffer = self._queue.popleft()
            self._budget.give_back(len(piece))
            if buffer is not None:
                buffer.unpin()


def _first(
    queue: deque[tuple[memoryview, Buffer | None]], room: int
) -> list[memoryview]:
    """Return what one system call sends, at most `room` bytes.

    What could not be sent is offered again, and never less of it: TLS needs that.
    """
    pieces: list[memoryview] = []
    for piece, _ in queue:
        pieces.append(piece[:room])
        room -= len(piece)
        if room <= 0 or len(pieces) == _PIECES_PER_CALL:
            break
    return pieces
