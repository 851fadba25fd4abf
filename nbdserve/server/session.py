"""Carry out the requests of one connection, inline as long as nothing has to wait.

A request whose coroutine finishes at once is answered into the batch that is being
put together. One that suspends goes on as a task, and its reply leaves on its own.
A session never cancels: an engine that was started comes to its end.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from structlog.typing import FilteringBoundLogger

from nbdserve.block.device import BlockDevice, Hole
from nbdserve.observe.counters import ConnectionCounters
from nbdserve.server.budget import Budget
from nbdserve.server.buffers import Buffer
from nbdserve.server.dispatch import HANDLERS, Outcome, error_of, is_expected
from nbdserve.server.framing import (
    DATA_HEADER,
    SIMPLE_HEADER,
    Range,
    frame_chunks,
)
from nbdserve.server.inline import adopt
from nbdserve.server.outbox import Outbox
from nbdserve.wire.constants import SIMPLE_REPLY_MAGIC, Command, CommandFlag
from nbdserve.wire.handshake import Negotiated
from nbdserve.wire.replies import (
    SIMPLE_REPLY,
    block_status_chunk,
    error_reply,
    put_data_header,
    simple_reply,
)
from nbdserve.wire.validate import Refusal, command_name

_DF: Final = int(CommandFlag.DF)
_FUA: Final = int(CommandFlag.FUA)
_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)
_put_simple = SIMPLE_REPLY.pack_into


@dataclass(slots=True)
class _Waiting:
    """A request that has to wait.

    Attributes:
        buffer: What it holds: room for the reply of a read, the payload of a write.
        start: Where the room for the reply starts.
    """

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    buffer: Buffer | None = None
    start: int = 0

    @property
    def bytes_held(self) -> int:
        return 0 if self.buffer is None else self.length


class Session:
    """The requests of one connection.

    Attributes:
        counters: What was done so far.
        in_flight: Requests that wait.
        bytes_in_flight: Bytes of memory that they hold.
    """

    __slots__ = (
        "_arena",
        "_budget",
        "_context_id",
        "_device",
        "_log",
        "_loop",
        "_on_progress",
        "_outbox",
        "_read_header",
        "_structured",
        "_tasks",
        "bytes_in_flight",
        "counters",
        "in_flight",
    )

    def __init__(
        self,
        device: BlockDevice,
        negotiated: Negotiated,
        outbox: Outbox,
        budget: Budget,
        on_progress: Callable[[], None],
        log: FilteringBoundLogger,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._device = device
        self._outbox = outbox
        self._arena = outbox.arena
        self._budget = budget
        self._on_progress = on_progress
        self._structured = negotiated.structured
        self._read_header = DATA_HEADER if negotiated.structured else SIMPLE_HEADER
        contexts = negotiated.meta_contexts
        self._context_id = contexts[0].context_id if contexts else 0
        self._log = log
        self._tasks: set[asyncio.Task[Any]] = set()
        self.counters = ConnectionCounters()
        self.in_flight = 0
        self.bytes_in_flight = 0

    def read(self, flags: int, cookie: int, offset: int, length: int) -> None:
        """Carry out NBD_CMD_READ. The data lands where it is sent from."""
        size = self._read_header + length
        buffer = self._outbox.reserve(size)
        start = buffer.position - size
        data = start + self._read_header
        coroutine = self._device.read_into(offset, buffer.view[data : data + length])
        try:
            waits_for = coroutine.send(None)
        except StopIteration as finished:
            self.counters.bytes_read += length
            view = buffer.view
            holes = finished.value
            if not self._structured:
                _put_simple(view, start, SIMPLE_REPLY_MAGIC, 0, cookie)
            elif not length or (holes and not flags & _DF):
                parts = frame_chunks(view, start, cookie, offset, length, holes)
                self._outbox.send_parts(buffer, start, parts)
                return
            else:
                put_data_header(view, start, cookie, offset, length, done=True)
            if buffer is not self._arena.buffer:
                self._outbox.send_parts(buffer, start, [(start, start + size)])
        except BaseException as failure:  # noqa: BLE001
            self._outbox.withdraw(buffer, start)
            self._outbox.put(self._failed(_READ, cookie, failure))
        else:
            self._outbox.detach(buffer, start)
            self._wait(
                coroutine,
                waits_for,
                _Waiting(_READ, flags, cookie, offset, length, buffer, start),
            )

    def write(
        self, flags: int, cookie: int, offset: int, payload: memoryview, buffer: Buffer
    ) -> None:
        """Carry out NBD_CMD_WRITE.

        Args:
            flags: Of the request.
            cookie: Of the request.
            offset: Of the request.
            payload: The data, a part of `buffer`.
            buffer: Pinned by the caller for as long as this call takes.
        """
        coroutine = self._device.write(offset, payload, fua=bool(flags & _FUA))
        try:
            waits_for = coroutine.send(None)
        except StopIteration:
            self.counters.bytes_written += len(payload)
            room = self._outbox.reserve(SIMPLE_HEADER)
            _put_simple(
                room.view, room.position - SIMPLE_HEADER, SIMPLE_REPLY_MAGIC, 0, cookie
            )
        except BaseException as failure:  # noqa: BLE001
            self._outbox.put(self._failed(_WRITE, cookie, failure))
        else:
            buffer.pin()
            self._wait(
                coroutine,
                waits_for,
                _Waiting(_WRITE, flags, cookie, offset, len(payload), buffer),
            )

    def other(
        self, command: int, flags: int, cookie: int, offset: int, length: int
    ) -> None:
        """Carry out any other command that the judge let pass."""
        coroutine = HANDLERS[command](self._device, flags, offset, length)
        try:
            waits_for = coroutine.send(None)
        except StopIteration as finished:
            self._outbox.put(self._success(cookie, finished.value))
        except BaseException as failure:  # noqa: BLE001
            self._outbox.put(self._failed(command, cookie, failure))
        else:
            self._wait(
                coroutine, waits_for, _Waiting(command, flags, cookie, offset, length)
            )

    def refuse(self, cookie: int, refusal: Refusal) -> None:
        """Answer a request that is not carried out."""
        self.counters.errors += 1
        error, text = refusal
        self._outbox.put(error_reply(cookie, error, text, structured=self._structured))

    def _wait(
        self, coroutine: Coroutine[Any, Any, Any], waits_for: object, request: _Waiting
    ) -> None:
        """Go on with a request as a task."""
        task = adopt(self._loop, coroutine, waits_for)
        self._tasks.add(task)
        self.in_flight += 1
        self.bytes_in_flight += request.bytes_held
        self._budget.take(request.bytes_held)
        task.add_done_callback(partial(self._finished, request))

    def _finished(self, request: _Waiting, task: asyncio.Task[Any]) -> None:
        """Answer a request that had to wait."""
        self._tasks.discard(task)
        self.in_flight -= 1
        self.bytes_in_flight -= request.bytes_held
        failure = asyncio.CancelledError() if task.cancelled() else task.exception()
        buffer = request.buffer
        outbox = self._outbox
        if failure is not None:
            outbox.send_late_bytes(
                self._failed(request.command, request.cookie, failure)
            )
        elif request.command == _READ and buffer is not None:
            self.counters.bytes_read += request.length
            outbox.send_late(buffer, self._frame_late(request, buffer, task.result()))
            buffer = None  # the outbox has its pin now
        elif request.command == _WRITE:
            self.counters.bytes_written += request.length
            outbox.send_late_bytes(simple_reply(request.cookie))
        else:
            outbox.send_late_bytes(self._success(request.cookie, task.result()))
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
        return frame_chunks(view, start, cookie, request.offset, length, holes)

    def _success(self, cookie: int, outcome: Outcome) -> bytes:
        """Return the reply to a command without data."""
        if outcome is None:
            # "Simple reply message" stays allowed for every command but READ, and
            # BLOCK_STATUS, which has extents
            return simple_reply(cookie)
        return block_status_chunk(cookie, self._context_id, outcome, done=True)

    def _failed(self, command: int, cookie: int, failure: BaseException) -> bytes:
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
        return error_reply(cookie, error, text, structured=self._structured)
