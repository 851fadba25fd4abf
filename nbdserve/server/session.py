"""Carry out the requests of one connection, inline as long as nothing has to wait.

A request whose coroutine finishes at once is answered into the batch that is being
put together. One that suspends goes on when what it waits for is done (`inline`), and its
reply leaves with those of others that were finished in the same turn of the loop.
A session never cancels: an engine that was started comes to its end.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from structlog.typing import FilteringBoundLogger

from nbdserve.block.device import BlockDevice, Hole
from nbdserve.block.loan import Piece
from nbdserve.errors import ImageError, explain
from nbdserve.exports.export import Export
from nbdserve.observe.counters import ConnectionCounters
from nbdserve.server.budget import Budget
from nbdserve.server.buffers import Buffer
from nbdserve.server.bulk import BULK, Turnstile, read_bulk
from nbdserve.server.dispatch import (
    HANDLERS,
    Outcome,
    block_status,
    error_of,
    is_expected,
)
from nbdserve.server.framing import (
    DATA_HEADER,
    EXTENDED_DATA_HEADER,
    SIMPLE_HEADER,
    Range,
    frame_chunks,
)
from nbdserve.server.inline import go_on, start
from nbdserve.server.outbox import Outbox
from nbdserve.wire.answers import answers
from nbdserve.wire.constants import (
    SIMPLE_REPLY_MAGIC,
    Command,
    CommandFlag,
    NbdError,
)
from nbdserve.wire.handshake import Negotiated
from nbdserve.wire.replies import (
    SIMPLE_REPLY,
    put_data_header,
    put_extended_data_header,
)
from nbdserve.wire.requests import StatusPayload
from nbdserve.wire.validate import Refusal, command_name

if TYPE_CHECKING:
    from nbdserve.exports.contexts import Describe

_DF: Final = int(CommandFlag.DF)
_FUA: Final = int(CommandFlag.FUA)
_READ: Final = int(Command.READ)
_REQ_ONE: Final = int(CommandFlag.REQ_ONE)
_WRITE: Final = int(Command.WRITE)
_BLOCK_STATUS: Final = int(Command.BLOCK_STATUS)
_put_simple = SIMPLE_REPLY.pack_into
#: Reads from this size on are lent, where that can be: copying 64 KiB into and out of a
#: buffer takes 25 us, sending the pages themselves 8 (1 MiB: 210 and 30).
_BORROW: Final = 64 << 10
#: Longer ones would keep others waiting, if the peer takes them as fast as they are sent: 1 MiB
#: takes 80 to 190 us.
_MOST_BORROWED: Final = 4 << 20
_MOST_BORROWED_IN_COMPANY: Final = 1 << 20
#: From here on reads that are copied go in pieces while others are there (see `bulk.py`).
_BULK_IN_COMPANY: Final = 128 << 10


class _Waiting:
    """A request that has to wait; not a dataclass, whose `__init__` stays interpreted.

    Attributes:
        buffer: What it holds: room for the reply of a read, the payload of a write.
        start: Where the room for the reply starts.
        disk: Which disk of the session it is for, by number.
    """

    __slots__ = (
        "buffer",
        "command",
        "cookie",
        "disk",
        "flags",
        "length",
        "offset",
        "start",
    )

    def __init__(  # noqa: PLR0913, PLR0917 -- what a request consists of
        self,
        command: int,
        flags: int,
        cookie: int,
        offset: int,
        length: int,
        buffer: Buffer | None = None,
        start: int = 0,
    ) -> None:
        self.command = command
        self.flags = flags
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.buffer = buffer
        self.start = start
        self.disk = 0

    @property
    def bytes_held(self) -> int:
        return 0 if self.buffer is None else self.length


@dataclass(slots=True)
class Begun:
    """A write of which a part is on a disk before the rest has arrived.

    It ends on the disk on which it has begun.

    Attributes:
        device: That disk.
        disk: The same by number.
        written: Bytes at the beginning of the request that are there.
    """

    device: BlockDevice
    disk: int
    written: int = 0

    def place(self, offset: int, length: int) -> Piece | None:
        """Ask where the next bytes of the request can be put (`BlockDevice.place`)."""
        return self.device.place(offset + self.written, length - self.written)


class Session:
    """The requests of one connection.

    Attributes:
        counters: What was done so far.
        in_flight: Requests that wait.
        bytes_in_flight: Bytes of memory that they hold.
        crowded: Whether others wait for every turn that takes long (see `company.py`).
    """

    __slots__ = (
        "_answers",
        "_arena",
        "_begun",
        "_budget",
        "_contexts",
        "_device",
        "_disk",
        "_disk_failed",
        "_extended",
        "_left_old",
        "_log",
        "_loop",
        "_on_old",
        "_on_progress",
        "_outbox",
        "_put_data_header",
        "_read_header",
        "_selected",
        "_structured",
        "_turnstile",
        "bytes_in_flight",
        "counters",
        "crowded",
        "in_flight",
    )

    def __init__(  # noqa: PLR0913 -- what a connection is made of
        self,
        export: Export,
        negotiated: Negotiated,
        outbox: Outbox,
        *,
        budget: Budget,
        turnstile: Turnstile,
        on_progress: Callable[[], None],
        log: FilteringBoundLogger,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._outbox = outbox
        self._arena = outbox.arena
        self._budget = budget
        self._turnstile = turnstile
        self._on_progress = on_progress
        self._structured = negotiated.structured
        self._extended = negotiated.extended
        self._answers = answers(
            structured=negotiated.structured, extended=negotiated.extended
        )
        self._put_data_header: Callable[..., int] = put_data_header
        if negotiated.extended:
            self._read_header = EXTENDED_DATA_HEADER
            self._put_data_header = put_extended_data_header
        else:
            self._read_header = DATA_HEADER if negotiated.structured else SIMPLE_HEADER
        self._selected = negotiated.meta_contexts
        self._contexts: list[tuple[int, Describe]] = []
        self._log = log
        self._disk_failed = False
        self.counters = ConnectionCounters()
        self.in_flight = 0
        self.bytes_in_flight = 0
        self.crowded = False
        self._disk = self._on_old = self._begun = 0
        self._left_old: asyncio.Future[None] | None = None
        self.attach(export)

    def attach(self, export: Export) -> None:
        """Carry out requests on the disk that an export has now."""
        self._device = export.device
        self._disk += 1
        self._on_old = self.in_flight + self._begun
        self._contexts = [
            (context.context_id, export.contexts[context.name])
            for context in self._selected
        ]
        self._disk_failed = False

    async def left_old(self) -> None:
        """Wait until no request is under way on a disk that the session had before."""
        while self._on_old:
            self._left_old = self._loop.create_future()
            await self._left_old

    def begin(self) -> Begun:
        """Begin a write on the disk that there is now; `leave` ends that."""
        self._begun += 1
        return Begun(self._device, self._disk)

    def is_old(self, begun: Begun) -> bool:
        """Tell whether a write is for a disk that the session had before."""
        return begun.disk != self._disk

    def leave(self, begun: Begun) -> None:
        """Do nothing more with a write that was begun."""
        self._begun -= 1
        self._leave(begun.disk)

    def _leave(self, disk: int) -> None:
        """Note that a request has ended that was for a disk of this number."""
        if disk != self._disk:
            self._on_old -= 1
            if self._left_old is not None and not self._left_old.done():
                self._left_old.set_result(None)

    def read(self, flags: int, cookie: int, offset: int, length: int) -> None:
        """Carry out NBD_CMD_READ. The data lands where it is sent from, if it moves at all."""
        if _BORROW <= length <= _MOST_BORROWED and self._borrow(cookie, offset, length):
            return
        size = self._read_header + length
        buffer = self._outbox.reserve(size)
        first = buffer.position - size
        data = first + self._read_header
        view = buffer.view[data : data + length]
        try:
            if length > BULK or (length > _BULK_IN_COMPANY and self.crowded):
                coroutine = read_bulk(self._turnstile, self._device, offset, view)
            else:
                coroutine = self._device.read_into(offset, view)
            done, outcome = start(coroutine)
        except BaseException as failure:  # noqa: BLE001
            self._outbox.withdraw(buffer, first)
            self._outbox.put(self._failed(_READ, cookie, offset, failure))
            return
        if not done:
            self._outbox.detach(buffer, first)
            request = _Waiting(_READ, flags, cookie, offset, length, buffer, first)
            self._wait(coroutine, outcome, request)
            return
        self.counters.bytes_read += length
        view = buffer.view
        if not self._structured:
            _put_simple(view, first, SIMPLE_REPLY_MAGIC, 0, cookie)
        elif not length or (outcome and not flags & _DF):
            parts = self._frame(view, first, cookie, offset, length, outcome)
            self._outbox.send_parts(buffer, first, parts)
            return
        else:
            self._put_data_header(view, first, cookie, offset, length, done=True)
        if buffer is not self._arena.buffer:
            self._outbox.send_parts(buffer, first, [(first, first + size)])

    def _borrow(self, cookie: int, offset: int, length: int) -> bool:
        """Answer a large read without copying; return whether that was possible."""
        outbox = self._outbox
        if not outbox.may_borrow or not outbox.empty:
            return False
        if length > _MOST_BORROWED_IN_COMPANY and self.crowded:
            return False
        lent = self._device.lend(offset, length)
        if lent is None:
            return False
        room = outbox.reserve(self._read_header)
        start = room.position - self._read_header
        if self._structured:
            self._put_data_header(room.view, start, cookie, offset, length, done=True)
        else:
            _put_simple(room.view, start, SIMPLE_REPLY_MAGIC, 0, cookie)
        outbox.send_lent(lent)
        self.counters.bytes_read += length
        return True

    def write(
        self,
        flags: int,
        cookie: int,
        offset: int,
        payload: memoryview,
        buffer: Buffer,
        begun: Begun | None = None,
    ) -> None:
        """Carry out NBD_CMD_WRITE.

        Args:
            flags: Of the request.
            cookie: Of the request.
            offset: Of the request.
            payload: The data, a part of `buffer`.
            buffer: Pinned by the caller for as long as this call takes.
            begun: If the beginning of the request is on a disk already, so that
                `payload` is the rest.
        """
        try:
            if begun is None:
                coroutine = self._device.write(offset, payload, fua=bool(flags & _FUA))
            else:
                coroutine = begun.device.write(offset + begun.written, payload)
            done, waits_for = start(coroutine)
        except BaseException as failure:  # noqa: BLE001
            self._outbox.put(self._failed(_WRITE, cookie, offset, failure))
            return
        if not done:
            buffer.pin()
            request = _Waiting(_WRITE, flags, cookie, offset, len(payload), buffer)
            self._wait(coroutine, waits_for, request, begun)
            return
        self.counters.bytes_written += len(payload)
        if self._extended:
            self._outbox.put(self._answers.done(cookie, offset))
            return
        room = self._outbox.reserve(SIMPLE_HEADER)
        _put_simple(
            room.view, room.position - SIMPLE_HEADER, SIMPLE_REPLY_MAGIC, 0, cookie
        )

    def written(self, cookie: int, offset: int, length: int) -> None:
        """Answer a write that was begun and is on the disk."""
        self.counters.bytes_written += length
        self._outbox.put(self._answers.done(cookie, offset))

    def write_failed(self, cookie: int, offset: int, failure: OSError) -> None:
        """Answer a write that was begun and has failed."""
        self.counters.requests += 1
        self._outbox.put(self._failed(_WRITE, cookie, offset, failure))

    def other(
        self, command: int, flags: int, cookie: int, offset: int, length: int
    ) -> None:
        """Carry out any other command that the judge let pass."""
        if command == _BLOCK_STATUS:
            self.status(flags, cookie, offset, length)
            return
        try:
            coroutine = HANDLERS[command](self._device, flags, offset, length)
        except BaseException as failure:  # noqa: BLE001
            self._outbox.put(self._failed(command, cookie, offset, failure))
            return
        self._start(coroutine, _Waiting(command, flags, cookie, offset, length))

    def status(
        self,
        flags: int,
        cookie: int,
        offset: int,
        length: int,
        context_ids: Sequence[int] | None = None,
    ) -> None:
        """Carry out NBD_CMD_BLOCK_STATUS.

        Args:
            flags: Of the request.
            cookie: Of the request.
            offset: Of the request.
            length: Of the range, at least 1.
            context_ids: Only these of the selected contexts (see `refusal_of`).
        """
        contexts = self._contexts
        if context_ids is not None:
            contexts = [each for each in contexts if each[0] in context_ids]
        coroutine = block_status(contexts, offset, length, bool(flags & _REQ_ONE))
        request = _Waiting(_BLOCK_STATUS, flags, cookie, offset, length)
        self._start(coroutine, request)

    def refusal_of(self, payload: StatusPayload) -> Refusal | None:
        """Judge which contexts a payload of NBD_CMD_BLOCK_STATUS names."""
        wanted = set(payload.context_ids)
        if len(wanted) != len(payload.context_ids):
            return Refusal(NbdError.EINVAL, "a meta context is named twice")
        unknown = wanted - {context_id for context_id, _ in self._contexts}
        if unknown:
            return Refusal(NbdError.EINVAL, f"meta context {min(unknown)} is unknown")
        return None

    def _start(
        self, coroutine: Coroutine[Any, Any, Outcome], request: _Waiting
    ) -> None:
        """Drive a command without data to its end, or to its first wait."""
        cookie, offset = request.cookie, request.offset
        try:
            done, outcome = start(coroutine)
        except BaseException as failure:  # noqa: BLE001
            self._outbox.put(self._failed(request.command, cookie, offset, failure))
            return
        if done:
            self._outbox.put(self._success(cookie, offset, outcome))
        else:
            self._wait(coroutine, outcome, request)

    def refuse(self, cookie: int, offset: int, refusal: Refusal) -> None:
        """Answer a request that is not carried out."""
        self.counters.errors += 1
        error, text = refusal
        self._outbox.put(self._answers.error(cookie, offset, error, text))

    def _wait(
        self,
        coroutine: Coroutine[Any, Any, Any],
        waits_for: object,
        request: _Waiting,
        begun: Begun | None = None,
    ) -> None:
        """Go on with a request when what it waits for is done."""
        self.in_flight += 1
        self.bytes_in_flight += request.bytes_held
        self._budget.take(request.bytes_held)
        request.disk = self._disk
        if begun is not None and begun.disk != self._disk:
            request.disk = begun.disk
            self._on_old += 1
        go_on(self._loop, coroutine, waits_for, partial(self._finished, request))

    def _finished(
        self, request: _Waiting, result: Any, failure: BaseException | None
    ) -> None:
        """Answer a request that had to wait."""
        self.in_flight -= 1
        self.bytes_in_flight -= request.bytes_held
        self._leave(request.disk)
        buffer = request.buffer
        outbox = self._outbox
        cookie, offset = request.cookie, request.offset
        if failure is not None:
            outbox.send_late_bytes(
                self._failed(request.command, cookie, offset, failure)
            )
        elif request.command == _READ and buffer is not None:
            self.counters.bytes_read += request.length
            outbox.send_late(buffer, self._frame_late(request, buffer, result))
            buffer = None  # the outbox has its pin now
        elif request.command == _WRITE:
            self.counters.bytes_written += request.length
            outbox.send_late_bytes(self._answers.done(cookie, offset))
        else:
            outbox.send_late_bytes(self._success(cookie, offset, result))
        if buffer is not None:
            buffer.unpin()
        self._budget.give_back(request.bytes_held)
        self._on_progress()

    def _frame_late(
        self, request: _Waiting, buffer: Buffer, holes: Sequence[Hole]
    ) -> list[Range]:
        """Write the headers around a read that had to wait."""
        view, start = buffer.view, request.start
        cookie, length = request.cookie, request.length
        if not self._structured:
            _put_simple(view, start, SIMPLE_REPLY_MAGIC, 0, cookie)
            return [(start, start + SIMPLE_HEADER + length)]
        if request.flags & _DF:
            holes = ()
        return self._frame(view, start, cookie, request.offset, length, holes)

    def _frame(
        self,
        view: memoryview,
        start: int,
        cookie: int,
        offset: int,
        length: int,
        holes: Sequence[Hole],
    ) -> list[Range]:
        return frame_chunks(
            view, start, cookie, offset, length, holes, extended=self._extended
        )

    def _success(self, cookie: int, offset: int, outcome: Outcome) -> bytes:
        """Return the reply to a command without data."""
        if outcome is None:
            return self._answers.done(cookie, offset)
        return self._answers.statuses(cookie, offset, outcome)

    def _failed(
        self, command: int, cookie: int, offset: int, failure: BaseException
    ) -> bytes:
        """Return the reply to a request that failed, and log what nobody expected.

        Raises:
            KeyboardInterrupt: It was that: not the request failed, the process ends.
            SystemExit: The same.
        """
        if isinstance(failure, KeyboardInterrupt | SystemExit):
            raise failure
        self.counters.errors += 1
        error, text = error_of(failure)
        if not is_expected(failure):
            self._log.error(
                "request failed unexpectedly",
                command=command_name(command),
                exc_info=failure,
            )
        elif isinstance(failure, OSError | ImageError) and not self._disk_failed:
            # Once for each connection: clients repeat what failed.
            self._disk_failed = True
            self._log.error(
                "the disk failed",
                command=command_name(command),
                offset=offset,
                error=explain(failure),
            )
        return self._answers.error(cookie, offset, error, text)
