"""Storage that fails on command, and storage that remembers: for tests of everything above.

Both wrap another storage. `suspending` makes them refuse every `try_` call and
suspend once in each coroutine, so that the paths for cold data and slow devices
are taken in memory as well.
"""

import asyncio
import errno
import os
from dataclasses import dataclass, field

from nbdserve.storage.base import Buffer, Storage


class WrappedStorage(Storage):
    """Passes every call on to `inner`.

    Attributes:
        inner: The storage below.
        suspending: Whether `try_` calls say False and coroutines suspend once.
    """

    def __init__(self, inner: Storage, *, suspending: bool = False) -> None:
        self.inner = inner
        self.suspending = suspending
        self.name = inner.name
        self.read_only = inner.read_only
        self.zeroes_on_extend = inner.zeroes_on_extend
        self.fixed_size = inner.fixed_size

    @property
    def size(self) -> int:
        """The length of the inner storage."""
        return self.inner.size

    def try_read(self, offset: int, view: memoryview) -> bool:
        """Read, unless suspending."""
        return not self.suspending and self.inner.try_read(offset, view)

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill `view`."""
        await self._suspend()
        if not self.inner.try_read(offset, view):
            await self.inner.read(offset, view)

    def try_write(self, offset: int, data: Buffer) -> bool:
        """Write, unless suspending."""
        return not self.suspending and self.inner.try_write(offset, data)

    async def write(self, offset: int, data: Buffer, *, durable: bool = False) -> None:
        """Write all of `data`."""
        await self._suspend()
        await self.inner.write(offset, data, durable=durable)

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make a range read as zeros."""
        await self._suspend()
        await self.inner.zero(offset, length, unmap=unmap)

    async def truncate(self, size: int) -> None:
        """Set the length."""
        await self._suspend()
        await self.inner.truncate(size)

    async def flush(self) -> None:
        """Make every completed change durable."""
        await self._suspend()
        await self.inner.flush()

    async def extents(
        self, offset: int, length: int, *, max_extents: int = 1 << 20
    ) -> list[tuple[int, bool]]:
        """Describe a range."""
        await self._suspend()
        return await self.inner.extents(offset, length, max_extents=max_extents)

    def hole_at(self, offset: int, length: int) -> int:
        """Ask the inner storage."""
        return self.inner.hole_at(offset, length)

    async def prefetch(self, offset: int, length: int) -> None:
        """Pass the hint on."""
        await self._suspend()
        await self.inner.prefetch(offset, length)

    async def close(self) -> None:
        """Close the inner storage."""
        await self.inner.close()

    async def _suspend(self) -> None:
        if self.suspending:
            await asyncio.sleep(0)


#: The names under which `FaultyStorage` counts calls.
CHANGING_CALLS = frozenset({"write", "zero", "truncate", "flush"})
ALL_CALLS = CHANGING_CALLS | {"read", "extents"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What goes wrong, and when.

    Attributes:
        at: Which call fails, counted from 0.
        error: The errno it fails with.
        kinds: Which calls count: some of `ALL_CALLS`.
        written: How many bytes of a failing write are written all the same (a short
            write).
        lasting: Whether all later calls fail as well.
    """

    at: int
    error: int = errno.EIO
    kinds: frozenset[str] = CHANGING_CALLS
    written: int = 0
    lasting: bool = False


#: Never happens; for counting the calls of a workload.
NO_FAULT = Fault(at=-1)


class FaultyStorage(WrappedStorage):
    """Fails one call, and perhaps all after it.

    A `try_` call and the coroutine of the same name count as the same kind; a `try_`
    call that is refused while `suspending` is not counted.

    Attributes:
        fault: May be replaced at any time.
        calls: How many calls of the fault's kinds were made so far. Run a workload
            once without a fault to learn how many there are.
        failed: The kinds of the calls that failed, in order.
    """

    def __init__(
        self, inner: Storage, fault: Fault = NO_FAULT, *, suspending: bool = False
    ) -> None:
        super().__init__(inner, suspending=suspending)
        self.fault = fault
        self.calls = 0
        self.failed: list[str] = []

    def try_read(self, offset: int, view: memoryview) -> bool:
        """Read, fail or say False."""
        if self.suspending:
            return False
        self._judge("read")
        return self.inner.try_read(offset, view)

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill `view` or fail."""
        self._judge("read")
        await super().read(offset, view)

    def try_write(self, offset: int, data: Buffer) -> bool:
        """Write, fail (perhaps half-way) or say False."""
        if self.suspending:
            return False
        if self._is_due("write"):
            self.inner.try_write(offset, memoryview(data)[: self.fault.written])
            raise self._fault()
        return self.inner.try_write(offset, data)

    async def write(self, offset: int, data: Buffer, *, durable: bool = False) -> None:
        """Write all of `data`, or fail (perhaps half-way)."""
        if self._is_due("write"):
            await super().write(offset, memoryview(data)[: self.fault.written])
            raise self._fault()
        await super().write(offset, data, durable=durable)

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make a range read as zeros or fail."""
        self._judge("zero")
        await super().zero(offset, length, unmap=unmap)

    async def truncate(self, size: int) -> None:
        """Set the length or fail."""
        self._judge("truncate")
        await super().truncate(size)

    async def flush(self) -> None:
        """Flush or fail."""
        self._judge("flush")
        await super().flush()

    async def extents(
        self, offset: int, length: int, *, max_extents: int = 1 << 20
    ) -> list[tuple[int, bool]]:
        """Describe a range or fail."""
        self._judge("extents")
        return await super().extents(offset, length, max_extents=max_extents)

    def _is_due(self, kind: str) -> bool:
        fault = self.fault
        if kind not in fault.kinds:
            return False
        number = self.calls
        self.calls += 1
        due = number == fault.at or (fault.lasting and number > fault.at >= 0)
        if due:
            self.failed.append(kind)
        return due

    def _judge(self, kind: str) -> None:
        if self._is_due(kind):
            raise self._fault()

    def _fault(self) -> OSError:
        return OSError(self.fault.error, os.strerror(self.fault.error), self.name)


@dataclass(slots=True)
class Operation:
    """One changing call, as it was made.

    `begin` and `end` are ticks of one clock for the whole recording. A flush (or a
    durable write, for its own bytes) covers every operation whose `end` is smaller
    than its `begin`; what ends later may be lost by a cut, even if the flush has
    ended.

    Attributes:
        kind: write, zero, punch, truncate, flush, or mark for `RecordingStorage.mark`.
        offset: Bytes; the new size for truncate.
        length: Bytes.
        data: A copy of what was written.
        durable: Whether the write was to be durable on return.
        label: What a mark says.
        begin: When the call began.
        end: When it ended; None while it is under way or if it failed.
        error: The errno with which it failed: it may have happened in part.
    """

    kind: str
    begin: int
    offset: int = 0
    length: int = 0
    data: bytes = b""
    durable: bool = False
    label: object = None
    end: int | None = None
    error: int | None = None


@dataclass(slots=True)
class Recording:
    """Operations in the order in which they began, on one clock."""

    operations: list[Operation] = field(default_factory=list)
    ticks: int = 0

    def tick(self) -> int:
        """Advance the clock."""
        self.ticks += 1
        return self.ticks


class RecordingStorage(WrappedStorage):
    """Remembers every change, for building what a crash may leave.

    Attributes:
        recording: What happened; may be shared by several storages of one run.
    """

    def __init__(
        self,
        inner: Storage,
        *,
        recording: Recording | None = None,
        suspending: bool = False,
    ) -> None:
        super().__init__(inner, suspending=suspending)
        self.recording = recording if recording is not None else Recording()

    @property
    def operations(self) -> list[Operation]:
        """All operations so far, in the order in which they began."""
        return self.recording.operations

    def mark(self, label: object) -> None:
        """Note something that happened above, such as a guest's write ending."""
        operation = self._begin("mark", label=label)
        operation.end = operation.begin

    def try_write(self, offset: int, data: Buffer) -> bool:
        """Write and remember it, unless suspending."""
        if self.suspending:
            return False
        operation = self._begin_write(offset, data, durable=False)
        try:
            done = self.inner.try_write(offset, data)
        except OSError as error:
            operation.error = error.errno
            raise
        if done:
            operation.end = self.recording.tick()
        else:
            self.operations.remove(operation)
        return done

    async def write(self, offset: int, data: Buffer, *, durable: bool = False) -> None:
        """Write all of `data`."""
        operation = self._begin_write(offset, data, durable=durable)
        with _Ending(self.recording, operation):
            await super().write(offset, data, durable=durable)

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make a range read as zeros."""
        kind = "punch" if unmap else "zero"
        operation = self._begin(kind, offset=offset, length=length)
        with _Ending(self.recording, operation):
            await super().zero(offset, length, unmap=unmap)

    async def truncate(self, size: int) -> None:
        """Set the length."""
        with _Ending(self.recording, self._begin("truncate", offset=size)):
            await super().truncate(size)

    async def flush(self) -> None:
        """Make every completed change durable."""
        with _Ending(self.recording, self._begin("flush")):
            await super().flush()

    def _begin(
        self, kind: str, *, offset: int = 0, length: int = 0, label: object = None
    ) -> Operation:
        operation = Operation(
            kind, self.recording.tick(), offset=offset, length=length, label=label
        )
        self.operations.append(operation)
        return operation

    def _begin_write(self, offset: int, data: Buffer, *, durable: bool) -> Operation:
        operation = self._begin("write", offset=offset, length=len(data))
        operation.data = bytes(data)
        operation.durable = durable
        return operation


class _Ending:
    """Notes when and how an operation ended."""

    __slots__ = ("_operation", "_recording")

    def __init__(self, recording: Recording, operation: Operation) -> None:
        self._recording = recording
        self._operation = operation

    def __enter__(self) -> None:
        """Nothing to do: the operation was noted when it began."""

    def __exit__(self, _kind: object, error: object, _traceback: object) -> None:
        """Note the end, or the error."""
        if error is None:
            self._operation.end = self._recording.tick()
        elif isinstance(error, OSError):
            self._operation.error = error.errno
