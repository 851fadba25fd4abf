"""One client in the transmission phase: bytes in, requests out to the session.

A readable socket starts a turn: receive what is there into memory that all connections
share, carry out every complete request in it, send the replies together. What is
left of an incomplete request is kept as a few bytes, so that an idle
connection costs next to nothing. A turn has a budget of time and bytes; a peer that does
not read its replies, or has too much in flight, is not read until that changes.
"""

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import asdict
from time import perf_counter
from typing import Final

from structlog.typing import FilteringBoundLogger

from nbdserve.errors import ProtocolError
from nbdserve.exports.export import Export
from nbdserve.server.buffers import Buffer
from nbdserve.server.intake import Intake
from nbdserve.server.outbox import Outbox
from nbdserve.server.session import Session
from nbdserve.server.shared import Shared
from nbdserve.server.stall import PeerWatch
from nbdserve.server.tls import ByteStream, TlsSocket
from nbdserve.storage.company import (
    MODEST,
    SHORT_TURN_BYTES,
    SHORT_TURN_S,
    company,
)
from nbdserve.wire.constants import (
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    Command,
    CommandFlag,
    NbdError,
)
from nbdserve.wire.handshake import Negotiated
from nbdserve.wire.requests import (
    EXTENDED_REQUEST,
    REQUEST,
    bad_magic,
    parse_status_payload,
)
from nbdserve.wire.transmission import drain_length
from nbdserve.wire.validate import (
    ExportFacts,
    Refusal,
    command_name,
    judge,
    judge_extended,
)

#: Bytes of the memory that receives, and of what is received at once: a burst of
#: 32 writes of 4 KiB with ease, behind what may be left of the last turn.
RECEIVE_ARENA: Final = 256 << 10
_RECEIVE: Final = 192 << 10
#: A longer request waits while all connections together hold too much memory. And the
#: payload of a longer write gets its own buffer if it is not there yet, in which the rest
#: arrives where the disk takes it from; up to here it is copied instead.
_LARGE: Final = 32 << 10
#: Bytes that have to be free for receiving behind what is left of the last turn.
_LEAST_ROOM: Final = 64 << 10
#: Requests between two looks at the clock: a few us if all is cached, but some of them
#: may unpack a cluster.
_REQUESTS_PER_LOOK: Final = 4
#: What a turn that was cut short counts as.
_REQUESTS: Final = 32

_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)
_DISC: Final = int(Command.DISC)
_SHUTTING_DOWN: Final = "server shutting down"
_PAYLOAD_LEN: Final = int(CommandFlag.PAYLOAD_LEN)
_Judge = Callable[[ExportFacts, int, int, int, int], Refusal | None]


class Connection:
    """One client in the transmission phase.

    Attributes:
        session: Its requests.
        closed: Done when everything is over; the result says why it ended.
        blame: The error of the client that ended the connection, if it was one.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: ByteStream,
        export: Export,
        negotiated: Negotiated,
        shared: Shared,
        log: FilteringBoundLogger,
    ) -> None:
        self._loop = loop
        self._log = log
        self._socket = sock
        self._shared = shared
        self._limits = shared.limits
        self._budget = shared.budget
        turn_s, turn_bytes = shared.limits.turn_s, shared.limits.turn_bytes
        self._long_turn = (turn_s, turn_bytes, _REQUESTS_PER_LOOK)
        self._short_turn = (
            min(turn_s, SHORT_TURN_S),
            min(turn_bytes, SHORT_TURN_BYTES),
            1,
        )
        self._crowded = False  # somebody modest is there
        self._usual = 0.0  # requests of a turn, lately
        self._expect_more = shared.busy_poll.expect
        self._outbox = Outbox(
            loop, sock, shared.outgoing, shared.budget, self._on_progress
        )
        self.session = Session(
            export,
            negotiated,
            self._outbox,
            budget=shared.budget,
            turnstile=shared.turnstile,
            on_progress=self._on_progress,
            log=log,
        )
        told = negotiated.export
        self._facts = ExportFacts(
            size=negotiated.export.size,
            transmission_flags=negotiated.transmission_flags,
            structured=negotiated.structured,
            meta_contexts=len(negotiated.meta_contexts),
            minimum_block=told.minimum_block if told.only_whole_blocks else 1,
            max_payload=negotiated.export.maximum_payload,
            extended=negotiated.extended,
        )
        self._extended = negotiated.extended
        layout = EXTENDED_REQUEST if negotiated.extended else REQUEST
        self._magic = EXTENDED_REQUEST_MAGIC if negotiated.extended else REQUEST_MAGIC
        self._header_size = layout.size
        self._unpack = layout.unpack_from
        self._judge: _Judge = judge_extended if negotiated.extended else judge
        if log.is_enabled_for(logging.DEBUG):
            self._judge = self._judge_and_log
        self._rest = b""  # received, but not carried out
        self._cut_short = False  # there are complete requests in it
        self._receive_next = _RECEIVE
        self._starved = False  # a large request has to wait for memory
        self._intake = Intake(
            sock, self.session, shared.incoming.pool, shared.pipe, shared.budget
        )
        self._peer_watch = PeerWatch(shared.limits, loop.time())
        self._drain_left = 0  # bytes of the payload of a refused write
        self._reading = False  # the loop watches the socket
        self._continuing = False  # a turn is scheduled
        self._ended: str | None = None  # no more requests, and why
        self._linger: asyncio.TimerHandle | None = None
        self._shutting_down = False
        self.blame: ProtocolError | None = None
        self.closed: asyncio.Future[str] = loop.create_future()

    @property
    def in_flight(self) -> int:
        """How many requests wait."""
        return self.session.in_flight

    @property
    def story(self) -> dict[str, int]:
        """What was done, by name."""
        return asdict(self.session.counters)

    def start(self, leftover: bytes) -> None:
        """Begin with what came behind the handshake."""
        self._rest = leftover
        self._cut_short = bool(leftover)
        if leftover:
            self._continue_soon()
        else:
            self._watch()

    def shut_down(self) -> None:
        """Refuse new requests, answer those in flight, then close."""
        if self._shutting_down or self._ended is not None:
            return
        self._shutting_down = True
        self._judge = _refuse_all
        self._starved = False
        if not self._outbox.blocked:
            self._guarded_turn()  # who has just asked is told, not cut off

    def abort(self) -> None:
        """Close at once; what is in flight comes to its end unanswered."""
        self._end(_SHUTTING_DOWN)
        self._close()

    def end_if_stalled(self) -> None:
        """Close if the peer holds up others, or is idle for too long.

        To be called every now and then.
        """
        now_s, watch, session = self._loop.time(), self._peer_watch, self.session
        reason = watch.stall(
            now_s,
            held=self._held(),
            moved=self._intake.bytes_taken + self._outbox.bytes_unblocked,
            memory_is_short=self._budget.exhausted,
        )
        if reason is not None:
            self.blame = ProtocolError(reason)
        else:
            requests = session.counters.requests
            reason = watch.idleness(
                now_s, requests=requests, in_flight=session.in_flight
            )
        if reason is not None:
            self._end(reason)
            self._close()

    def end_if_on_old_disk(self) -> None:
        """Close if the peer does not send the rest of a payload that an old disk has begun."""
        if self._intake.on_old_disk:
            reason = "a payload did not arrive, and its disk has to be closed"
            self.blame = ProtocolError(reason)
            self._end(reason)
            self._close()

    def _held(self) -> int:
        """Return the bytes that are held until the peer moves."""
        held = self._outbox.bytes_queued if self._outbox.blocked else 0
        if self._reading:
            held += self._intake.bytes_held
        return held

    # When to take a turn

    def _watch(self) -> None:
        if not self._reading:
            self._reading = True
            self._loop.add_reader(self._socket.fileno(), self._on_readable)

    def _unwatch(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._socket.fileno())

    def _on_readable(self) -> None:
        if self._linger is not None:
            self._discard()
        elif not self._continuing:
            self._guarded_turn()

    def _continue_soon(self) -> None:
        """Take another turn after the others had theirs."""
        if not self._continuing:
            self._continuing = True
            self._loop.call_soon(self._continue)

    def _continue(self) -> None:
        self._continuing = False
        if self._ended is None:
            if self._may_start():
                self._guarded_turn()
            else:
                self._pause()  # late replies have filled the socket, or memory is short

    def _pause(self) -> None:
        """Do nothing until `_on_progress`."""
        self._unwatch()
        if self._budget.exhausted:
            self._budget.wake_later(self._on_progress)

    def _may_start(self) -> bool:
        """Tell whether limits and the peer allow another request."""
        session = self.session
        return (
            not self._outbox.blocked
            and session.in_flight < self._limits.requests_in_flight
            and session.bytes_in_flight < self._limits.bytes_in_flight
            # whoever has nothing in flight may go on with small requests
            and (not self._budget.exhausted or not (session.in_flight or self._starved))
        )

    def _on_progress(self) -> None:
        """Something was finished or sent: go on, or come to the end."""
        self._notice_loss()
        if self._ended is None and not self._continuing:
            if not self._reading and self._may_start():
                self._continue_soon()
            elif self._shutting_down:
                self._end_if_quiet()
            elif not self._reading and self._budget.exhausted:
                self._pause()
        if self._ended is not None:
            self._close_if_idle()

    def _guarded_turn(self) -> None:
        """Take a turn, and end the connection if that goes wrong."""
        try:
            self._turn()
        except ProtocolError as error:
            self.blame = error
            self._end(str(error))
        except OSError as error:
            self._end(error.strerror or "connection lost")
        except Exception:  # noqa: BLE001
            # a bug: without an end the loop would run into it again and again
            self._log.exception("connection failed unexpectedly")
            self._end("internal error")
        if (
            self._reading
            and not self._cut_short
            and not self.session.in_flight
            and not self._outbox.blocked
            and self._outbox.lost is None
            and not self._shutting_down
        ):
            # as almost always: everything is answered, nothing waits
            self._expect_more()
            return
        self._decide()

    def _decide(self) -> None:
        """Decide what follows a turn: pause, another turn, waiting for the peer, the end."""
        self._notice_loss()
        if self._ended is None and self._shutting_down:
            self._end_if_quiet()
        if self._ended is not None:
            self._close_if_idle()
        elif not self._may_start():
            self._pause()
        elif self._cut_short:
            self._continue_soon()
        else:
            self._watch()

    # A turn

    def _turn(self) -> None:
        """Receive, carry out, send."""
        self._outbox.begin()
        try:
            if self._intake.busy:
                self._receive_payload()
            else:
                self._receive()
        except (ProtocolError, OSError):
            raise
        except BaseException:
            self._outbox.abandon()
            raise
        finally:
            self._outbox.flush()

    def _receive(self) -> None:
        """Receive requests behind what is left, and carry them out."""
        arena = self._shared.incoming
        buffer = arena.buffer
        rest = self._rest
        if buffer.pins == 1:
            buffer.position = 0
        elif buffer.capacity - buffer.position < len(rest) + _LEAST_ROOM:
            buffer = arena.renew()
        start = buffer.position
        end = start + len(rest)
        view = buffer.view
        if rest:
            view[start:end] = rest
            self._rest = b""
        if not self._cut_short:
            try:
                received = self._socket.recv_into(view[end : end + self._receive_next])
            except (BlockingIOError, InterruptedError):
                received = 0
            else:
                if not received:
                    self._end_of_stream(bool(rest))
            end += received
        self._cut_short = False
        self._receive_next = _RECEIVE
        position = self._carry_out(buffer, start, end)
        if buffer.pins > 1:
            buffer.position = position  # a write that waits has its payload in there
        if position < end and self._ended is None:
            self._rest = bytes(view[position:end])

    def _carry_out(  # noqa: C901, PLR0912, PLR0915 -- one loop without a call too many
        self, buffer: Buffer, position: int, end: int
    ) -> int:
        """Carry out the complete requests in a part of a buffer.

        Returns:
            Where the first one starts that was not carried out.
        """
        if self._drain_left:
            position = self._drain(position, end)
        view = buffer.view
        header_size, expected_magic = self._header_size, self._magic
        unpack = self._unpack
        facts, judge_request = self._facts, self._judge
        session, outbox = self.session, self._outbox
        now_s = self._look_around()
        turn_s, turn_bytes, per_look = (
            self._short_turn if self._crowded else self._long_turn
        )
        deadline_s, bytes_left = now_s + turn_s, turn_bytes
        count = 0
        self._starved = False
        while end - position >= header_size:
            magic, flags, command, cookie, offset, length = unpack(view, position)
            if magic != expected_magic:
                raise bad_magic(magic, extended=self._extended)
            data = position + header_size
            refusal = judge_request(facts, command, flags, offset, length)
            if refusal is not None:
                session.refuse(cookie, offset, refusal)
                self._drain_left = self._payload_of_refused(command, flags, length)
                position = self._drain(data, end)
            elif command == _READ:
                if length > _LARGE and self._starves():
                    break
                position = data
                bytes_left -= length
                session.read(flags, cookie, offset, length)
            elif command == _WRITE:
                if end - data < length:
                    if self._expect(flags, cookie, offset, length, view[data:end]):
                        position = end
                    break
                position = data + length
                bytes_left -= length
                session.write(flags, cookie, offset, view[data:position], buffer)
            elif command == _DISC:
                self._end("disconnected")
                break
            elif flags & _PAYLOAD_LEN:
                if end - data < length:
                    break
                position = data + length
                self._carry_out_status(flags, cookie, offset, view[data:position])
            else:
                position = data
                session.other(command, flags, cookie, offset, length)
            count += 1
            if (
                ((session.in_flight or outbox.blocked) and not self._may_start())
                or bytes_left <= 0
                or (not count % per_look and perf_counter() > deadline_s)
            ):
                self._cut_short = True
                break
        session.counters.requests += count
        # a turn that was cut short says nothing of how much there is
        asked = _REQUESTS if self._cut_short else count
        self._usual += (asked - self._usual) / 8
        if (
            self._usual <= MODEST
            and session.in_flight <= MODEST
            and turn_bytes - bytes_left <= SHORT_TURN_BYTES
            and not self._intake.busy
        ):
            company.met(self, now_s)
        return position

    def _look_around(self) -> float:
        """Find out whether a modest client is there; return the time."""
        now_s = perf_counter()
        crowded = now_s < company.until_s and company.modest is not self
        if crowded is not self._crowded:
            self._crowded = self.session.crowded = self._outbox.crowded = crowded
        return now_s

    def _starves(self) -> bool:
        """Tell whether a large request has to wait until others give memory back."""
        if self._budget.exhausted:
            self._starved = self._cut_short = True
        return self._starved

    def _judge_and_log(
        self, facts: ExportFacts, command: int, flags: int, offset: int, length: int
    ) -> Refusal | None:
        """Judge, and tell about every request: level debug only."""
        decide = judge_extended if self._extended else judge
        refusal = decide(facts, command, flags, offset, length)
        self._log.debug(
            "request",
            command=command_name(command),
            flags=flags,
            offset=offset,
            length=length,
            refused=refusal and refusal.text,
        )
        return refusal

    def _payload_of_refused(self, command: int, flags: int, length: int) -> int:
        """Return how many bytes behind a refused header to throw away."""
        return drain_length(
            command,
            flags,
            length,
            extended=self._extended,
            max_payload=self._facts.max_payload,
        )

    def _carry_out_status(
        self, flags: int, cookie: int, offset: int, data: memoryview
    ) -> None:
        """Carry out NBD_CMD_BLOCK_STATUS with a payload, or refuse it.

        The judge lets no other command pass that has NBD_CMD_FLAG_PAYLOAD_LEN and gets
        here, and no payload of a wrong size.
        """
        payload = parse_status_payload(data)
        command, flags = int(Command.BLOCK_STATUS), flags & ~_PAYLOAD_LEN
        refusal = self._judge(
            self._facts, command, flags, offset, payload.length
        ) or self.session.refusal_of(payload)
        if refusal is not None:
            self.session.refuse(cookie, offset, refusal)
        else:
            ids = payload.context_ids
            self.session.status(flags, cookie, offset, payload.length, ids)

    def _drain(self, position: int, end: int) -> int:
        """Skip the payload of a refused write; return where that ends for now."""
        skipped = min(self._drain_left, end - position)
        self._drain_left -= skipped
        return position + skipped

    def _expect(
        self, flags: int, cookie: int, offset: int, length: int, first: memoryview
    ) -> bool:
        """Prepare for the rest of a payload.

        Returns:
            Whether what is there of it was taken.
        """
        if length <= _LARGE:
            return False
        if self._intake.begin_in_place(flags, cookie, offset, length, first):
            return True
        if self._starves():
            return False
        self._intake.begin(flags, cookie, offset, length, first)
        return True

    def _receive_payload(self) -> None:
        """Receive a long payload where the disk takes it from, then write it."""
        self._cut_short = False
        self._look_around()
        _, most, _ = self._short_turn if self._crowded else self._long_turn
        left = self._intake.receive(most)
        if left is None:
            self._end_of_stream(inside_request=True)
            return
        self._drain_left = left
        if self._intake.starved:
            self._starves()
        elif not self._intake.busy:
            # Most likely another one follows, whose payload is not to be received here.
            self._receive_next = self._header_size if self._intake.spliced else _RECEIVE
            if isinstance(self._socket, TlsSocket) and self._socket.pending():
                self._continue_soon()  # the rest of a record is in memory: no event

    # The end

    def _end_of_stream(self, inside_request: bool) -> None:
        if inside_request or self._drain_left:
            self._end("closed by the client inside a request")
        else:
            self._end("closed by the client")

    def _notice_loss(self) -> None:
        if self._outbox.lost is not None:
            self._end(self._outbox.lost.strerror or "connection lost")

    def _end(self, reason: str) -> None:
        """Take no more requests. The first reason counts."""
        if self._ended is None:
            self._ended = reason
            self._unwatch()
            self._intake.drop()
            self._rest = b""
            self._budget.forget(self._on_progress)

    def _end_if_quiet(self) -> None:
        """When shutting down: end after the last reply."""
        if not self._cut_short and not self.session.in_flight and self._outbox.empty:
            self._end(_SHUTTING_DOWN)

    def _close_if_idle(self) -> None:
        """Close once everything is answered."""
        if self.session.in_flight or not self._outbox.empty or self._linger is not None:
            return
        if self._shutting_down and self._outbox.lost is None:
            self._start_lingering()
        else:
            self._close()

    def _start_lingering(self) -> None:
        """Close our half, and give the client a moment to close the other one.

        If requests arrive that nobody reads, closing a TCP socket sends a reset,
        and that makes the client's kernel throw away replies not yet read.
        """
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            self._close()  # the client is gone already
            return
        self._linger = self._loop.call_later(self._limits.linger_s, self._close)
        self._watch()

    def _discard(self) -> None:
        try:
            received = self._socket.recv(_LEAST_ROOM)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            received = b""
        if not received:
            self._close()

    def _close(self) -> None:
        """Close the socket, and give everything back."""
        if self._linger is not None:
            self._linger.cancel()
        if not self.closed.done():
            self._unwatch()
            self._outbox.close()
            self._socket.close()
            company.left(self)
            self.closed.set_result(self._ended or _SHUTTING_DOWN)


def _refuse_all(
    _facts: ExportFacts, command: int, _flags: int, _offset: int, _length: int
) -> Refusal | None:
    """Judge while the server is shutting down."""
    if command == _DISC:
        return None
    return Refusal(NbdError.ESHUTDOWN, "the server is shutting down")
