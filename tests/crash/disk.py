"""The storage below the engine: flat bytes, every change noted, faults on command.

It plays the page cache over a disk. A call may suspend before and after the moment at
which its bytes arrive in the cache, and a large write may arrive in two parts.
The log keeps what each 512-byte sector looked like after each change, so that
`cuts` can build what a power cut leaves: for each sector any version that is not
older than the last one that a completed barrier covered. A sector never holds the second of
two small writes without the first: both went through the same page.
"""

import asyncio
import errno
import os
import random
from dataclasses import dataclass
from typing import Final

from nbdserve.storage.base import Buffer, Storage

SECTOR: Final = 512
ZERO_SECTOR: Final = bytes(SECTOR)
#: What is added to the sector numbers of an external data file.
EXTERNAL: Final = 1 << 40
#: How many turns of the loop a call may take.
_TURNS: Final = (0, 0, 1, 1, 2, 4, 9)


@dataclass(frozen=True, slots=True)
class Applied:
    """Bytes arrived in the cache: sector number -> its content now."""

    call: int
    sectors: dict[int, bytes]


@dataclass(frozen=True, slots=True)
class Sized:
    """The file, or with `external` the data file, has another length."""

    call: int
    size: int
    external: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """A changing call has returned."""

    call: int


@dataclass(frozen=True, slots=True)
class Synced:
    """A barrier of one file has returned; it covers what had ended at `begin`."""

    begin: int
    external: bool = False


@dataclass(frozen=True, slots=True)
class SyncedRange:
    """A barrier of a range has returned; it covers what had ended there at `begin`."""

    begin: int
    offset: int
    end: int


@dataclass(frozen=True, slots=True)
class Redone:
    """The redo log says this now."""

    content: bytes


@dataclass(frozen=True, slots=True)
class Began:
    """A request of the guest began."""

    request: int


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """A request of the guest succeeded."""

    request: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A request of the guest got an error."""

    request: int


@dataclass(frozen=True, slots=True)
class Faulted:
    """A changing call failed on command."""

    kind: str


Event = (
    Applied
    | Sized
    | Ended
    | Synced
    | SyncedRange
    | Redone
    | Began
    | Acknowledged
    | Failed
    | Faulted
)


@dataclass(slots=True)
class Fault:
    """What goes wrong: the changing call number `at`, counted from 0.

    Attributes:
        error: The errno.
        part: How much of a failing write arrives all the same, 0 to 1.
        lasting: How many calls fail, from that one on.
    """

    at: int
    error: int = errno.EIO
    part: float = 0.0
    lasting: int = 1


class Files(bytearray):
    """An image file, with its external data file beside it.

    Attributes:
        external: The data file, None if data lie in the image.
    """

    external: bytearray | None = None

    @classmethod
    def of(cls, content: bytes | bytearray) -> "Files":
        """Return a copy."""
        files = cls(content)
        if isinstance(content, Files) and content.external is not None:
            files.external = bytearray(content.external)
        return files


class Disk(Storage):
    """Flat bytes in memory.

    Attributes:
        data: What the page cache holds.
        external: The disk of the external data file. It writes into the same log,
            counts its calls here, and has its faults from here.
        log: What happened, None if nobody wants to know. The index is the clock.
        fault: What is to go wrong.
        calls: Changing calls so far.
        hit: The kinds of the calls that failed.
    """

    def __init__(
        self,
        data: bytes | bytearray,
        *,
        chance: random.Random | None = None,
        record: bool = False,
        read_only: bool = False,
        beside: "Disk | None" = None,
    ) -> None:
        self.name = "disk"
        self._first = self if beside is None else beside
        self.read_only = read_only
        self.zeroes_on_extend = True
        self.fixed_size = False
        self.data = bytearray(data)
        self.log: list[Event] | None = [] if record else None
        self.fault: Fault | None = None
        self.calls = 0
        self.hit: list[str] = []
        self._chance = chance
        self._next_call = 0
        self.external: Disk | None = None
        if isinstance(data, Files) and data.external is not None:
            self.external = Disk(data.external, chance=chance, beside=self)

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def is_external(self) -> bool:
        """Whether this is a data file, beside an image."""
        return self._first is not self

    def files(self) -> Files:
        """Return a copy of what the page cache holds of all files."""
        files = Files(self.data)
        if self.external is not None:
            files.external = bytearray(self.external.data)
        return files

    def note(self, event: Event) -> None:
        """Add something that happened above or beside."""
        if self._first.log is not None:
            self._first.log.append(event)

    def now(self) -> int:
        """Return the clock."""
        log = self._first.log
        return len(log) if log is not None else 0

    async def suspend(self) -> None:
        """Let others run, for a random while."""
        if self._chance is not None:
            # now and then so long that everything else goes on meanwhile
            turns = 80 if self._chance.random() < 0.03 else self._chance.choice(_TURNS)
            for _ in range(turns):
                await asyncio.sleep(0)

    # -- reading

    def _copy_out(self, offset: int, view: memoryview) -> None:
        piece = self.data[offset : offset + len(view)]
        view[: len(piece)] = piece
        if len(piece) < len(view):
            view[len(piece) :] = bytes(len(view) - len(piece))

    def try_read(self, offset: int, view: memoryview) -> bool:
        if self._chance is not None and self._chance.random() < 0.3:
            return False
        self._copy_out(offset, view)
        return True

    async def read(self, offset: int, view: memoryview) -> None:
        await self.suspend()
        self._copy_out(offset, view)
        await self.suspend()

    # -- writing

    def try_write(self, offset: int, data: Buffer) -> bool:
        if self._chance is not None and self._chance.random() < 0.5:
            return False
        call = self._begin()
        fault = self._due("write")
        if fault is not None:
            self._apply_part(call, offset, data, fault)
            raise self._error(fault)
        self._apply(call, offset, data)
        self.note(Ended(call))
        return True

    async def write(self, offset: int, data: Buffer, *, durable: bool = False) -> None:
        # the caller may not change it before we return, and a bug there must show
        call = self._begin()
        first, end = offset, offset + len(data)
        await self.suspend()
        fault = self._due("write")
        if fault is not None:
            self._apply_part(call, offset, data, fault)
            await self.suspend()
            raise self._error(fault)
        view = memoryview(data)
        if (
            self._chance is not None
            and len(view) > SECTOR
            and self._chance.random() < 0.3
        ):
            middle = self._chance.randrange(1, len(view) // SECTOR + 1) * SECTOR
            # sectors arrive as a whole
            middle -= offset % SECTOR
            self._apply(call, offset, view[:middle])
            await self.suspend()
            view, offset = view[middle:], offset + middle
        self._apply(call, offset, view)
        await self.suspend()
        self.note(Ended(call))
        if durable:
            # of its own bytes, and of what was there before them
            self.note(SyncedRange(self.now(), first, end))

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        call = self._begin()
        await self.suspend()
        fault = self._due("zero")
        if fault is not None:
            raise self._error(fault)
        self._apply(call, offset, bytes(length))
        await self.suspend()
        self.note(Ended(call))

    async def truncate(self, size: int) -> None:
        call = self._begin()
        await self.suspend()
        fault = self._due("truncate")
        if fault is not None:
            raise self._error(fault)
        old = len(self.data)
        if size < old:
            # what is cut off reads as zeros when it comes back
            self._apply(call, size, bytes(old - size))
            del self.data[size:]
        else:
            self.data.extend(bytes(size - old))
        self.note(Sized(call, size, self.is_external))
        await self.suspend()
        self.note(Ended(call))

    async def flush(self) -> None:
        begin = self.now()
        await self.suspend()
        fault = self._due("flush")
        if fault is not None:
            raise self._error(fault)
        await self.suspend()
        await self.suspend()
        self.note(Synced(begin, self.is_external))

    async def flush_range(self, offset: int, length: int) -> None:
        begin = self.now()
        await self.suspend()
        fault = self._due("flush")
        if fault is not None:
            raise self._error(fault)
        await self.suspend()
        self.note(SyncedRange(begin, offset, offset + length))

    async def extents(
        self, offset: int, length: int, *, max_extents: int = 1 << 20
    ) -> list[tuple[int, bool]]:
        return [(length, True)]

    async def close(self) -> None:
        self.note(Ended(self._begin()))

    # -- below

    def _begin(self) -> int:
        self._first._next_call += 1
        return self._first._next_call

    def _due(self, kind: str) -> Fault | None:
        first = self._first
        number = first.calls
        first.calls += 1
        fault = first.fault
        if fault is not None and fault.at <= number < fault.at + fault.lasting:
            first.hit.append(kind)
            self.note(Faulted(kind))
            return fault
        return None

    def _error(self, fault: Fault) -> OSError:
        return OSError(fault.error, os.strerror(fault.error), self.name)

    def _apply_part(self, call: int, offset: int, data: Buffer, fault: Fault) -> None:
        length = int(len(data) * fault.part)
        if length < len(data):
            # A short write ends at the end of a sector, or rather of a page.
            length -= (offset + length) % SECTOR
        if length > 0:
            self._apply(call, offset, memoryview(data)[:length])

    def _apply(self, call: int, offset: int, data: Buffer) -> None:
        end = offset + len(data)
        if end > len(self.data):
            self.data.extend(bytes(end - len(self.data)))
            self.note(Sized(call, end, self.is_external))
        self.data[offset:end] = data
        if self._first.log is None or not data:
            return
        base = EXTERNAL if self.is_external else 0
        sectors = {
            base + sector: bytes(
                self.data[sector * SECTOR : (sector + 1) * SECTOR]
            ).ljust(SECTOR, b"\0")
            for sector in range(offset // SECTOR, (end - 1) // SECTOR + 1)
        }
        self.note(Applied(call, sectors))
