"""A guest that does everything at once: seeded, and recorded together with the disk."""

import asyncio
import random
import tempfile
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbdserve.errors import ImageError
from nbdserve.formats.mapped.image import MappedImage
from nbdserve.formats.mapped.redo import Link, RedoLog
from nbdserve.formats.qcow2.image import Qcow2Image
from tests.crash.disk import (
    SECTOR,
    ZERO_SECTOR,
    Acknowledged,
    Began,
    Disk,
    Event,
    Failed,
    Fault,
    Redone,
)
from tests.crash.flavours import Image
from tests.crash.guest import Allowed, MismatchError, Request, Values, compare, stamp


class LoggedRedo:
    """A redo log of which each state is kept."""

    def __init__(self, path: Path, disk: Disk) -> None:
        self._log = RedoLog(path)
        self._path = path
        self._disk = disk
        # it takes the place of what a killed server left
        self._note()

    @property
    def sequence(self) -> int:
        return self._log.sequence

    def link(self, guest_cluster: int, entry_in_file: int, entry: int) -> bool:
        done = self._log.link(guest_cluster, entry_in_file, entry)
        self._note()
        return done

    def committed(self, sequence: int) -> None:
        self._log.committed(sequence)
        self._note()

    def close(self, *, remove: bool) -> None:
        self._log.close(remove=remove)

    def _note(self) -> None:
        self._disk.note(Redone(self._path.read_bytes()))


@dataclass(slots=True)
class Run:
    """What happened.

    Attributes:
        image: As it was before.
        start: The file as it was before, if that is not the image's own.
        guest: What the guest saw before.
        events: In order.
        requests: Of the guest, by number.
        errors: What requests got that failed.
        disk: As it was left.
    """

    image: Image
    start: bytes | bytearray
    guest: bytes
    events: list[Event]
    requests: list[Request]
    errors: list[Exception]
    disk: Disk
    closed: bool = False


@dataclass(slots=True)
class Guest:
    """Makes requests that are within the rules, and knows what they should do."""

    image: Image
    device: MappedImage
    disk: Disk
    chance: random.Random
    before: bytes
    requests: list[Request] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    first_number: int = 0
    live: Allowed = field(init=False)
    _model: Values = field(default_factory=dict)
    _inside: dict[int, int] = field(default_factory=dict)
    _ambiguous: set[int] = field(default_factory=set)
    _lone: dict[int, int] = field(default_factory=dict)
    _partial: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.live = Allowed(self.before, self.requests, kept_by_flush=False)

    # -- what a sector reads as

    def _now(self, sector: int) -> bytes:
        known = self._model.get(sector)
        if known is None:
            known = self.before[sector * SECTOR : (sector + 1) * SECTOR]
        return known.ljust(SECTOR, b"\0")

    def _certain(self, sector: int) -> bool:
        return sector not in self._ambiguous and not self._inside.get(sector)

    def _begin(self, request: Request) -> int:
        self._partial.update(request.partial)
        number = len(self.requests)
        self.requests.append(request)
        for sector in request.values:
            if self._inside.get(sector):
                self._ambiguous.add(sector)
                self._lone.pop(sector, None)
            else:
                self._lone[sector] = number
            self._inside[sector] = self._inside.get(sector, 0) + 1
        self.disk.note(Began(number))
        self.live.began(number, self.disk.now())
        return number

    def _end(self, number: int, *, succeeded: bool) -> None:
        request = self.requests[number]
        self._partial.difference_update(request.partial)
        for sector, value in request.values.items():
            self._inside[sector] -= 1
            if self._lone.get(sector) == number and succeeded and request.firm:
                self._model[sector] = value
                self._ambiguous.discard(sector)
            else:
                self._ambiguous.add(sector)
        self.disk.note(Acknowledged(number) if succeeded else Failed(number))
        self.live.ended(number, self.disk.now(), succeeded=succeeded)

    # -- requests

    async def step(self) -> None:
        """Make one request."""
        pick = self.chance.random()
        if pick < 0.50:
            await self._write(fua=self.chance.random() < 0.12)
        elif pick < 0.64:
            await self._zero()
        elif pick < 0.76:
            await self._trim()
        elif pick < 0.86:
            await self.flush()
        elif pick < 0.93:
            self._commit_in_background()
        else:
            await self.look()

    def _range(self, *, aligned: bool) -> tuple[int, int]:
        size, chance = len(self.before), self.chance
        cluster = self.device._parts.geometry.cluster_size
        length = chance.choice(
            (SECTOR, SECTOR, 1024, 1536, cluster, cluster * 2, cluster * 3 + SECTOR)
        )
        # A few places are hot, so that requests meet.
        if chance.random() < 0.6:
            offset = chance.choice((0, 1, 2, 5, 6, 9)) * cluster
            offset += chance.choice((0, 0, SECTOR, cluster - SECTOR))
        else:
            offset = chance.randrange(size // SECTOR) * SECTOR
        if chance.random() < 0.2:
            offset = offset // cluster * cluster
        if not aligned:
            offset += chance.randrange(SECTOR)
            length = max(1, length - chance.randrange(SECTOR))
        offset = min(offset, size - 1)
        return offset, min(length, size - offset, 32 * SECTOR * max(1, cluster // 4096))

    def _values(self, offset: int, data: bytes) -> Values:
        """Return what the sectors of a range read as once `data` is there."""
        values: Values = {}
        end = offset + len(data)
        for sector in range(offset // SECTOR, (end - 1) // SECTOR + 1):
            start = sector * SECTOR
            first, last = max(start, offset), min(start + SECTOR, end)
            piece = data[first - offset : last - offset]
            if len(piece) < SECTOR:
                old = self._now(sector)
                piece = old[: first - start] + piece + old[last - start :]
            values[sector] = piece
        return values

    def _place(self) -> tuple[int, int]:
        """Return a range in which partial sectors have a certain value."""
        offset, length = self._range(aligned=self.chance.random() < 0.75)
        if not all(map(self._certain, self._edges(offset, length))):
            end = min(-(-(offset + length) // SECTOR) * SECTOR, len(self.before))
            offset = offset // SECTOR * SECTOR
            length = end - offset
        return offset, length

    def _edges(self, offset: int, length: int) -> list[int]:
        """Return the sectors that a range covers in part."""
        edges = [offset // SECTOR] if offset % SECTOR else []
        end = offset + length
        if end % SECTOR and end != len(self.before):
            edges.append(end // SECTOR)
        return edges

    async def _write(self, *, fua: bool) -> None:
        offset, length = self._place()
        number = len(self.requests) + self.first_number
        first = offset // SECTOR
        count = (offset + length - 1) // SECTOR - first + 1
        whole = b"".join(stamp(number, first + each) for each in range(count))
        data = whole[offset % SECTOR : offset % SECTOR + length]
        request = Request(
            "write",
            self._values(offset, data),
            fua,
            partial=self._edges(offset, length),
            text=f"write {offset}+{length}",
        )
        await self._do(request, self.device.write(offset, data, fua=fua))

    async def _zero(self) -> None:
        offset, length = self._place()
        fua = self.chance.random() < 0.1
        unmap = self.chance.random() < 0.75
        values = self._values(offset, bytes(length))
        text = f"zero {offset}+{length} unmap={unmap}"
        await self._do(
            Request(
                "zero", values, fua, partial=self._edges(offset, length), text=text
            ),
            self.device.write_zeroes(offset, length, may_unmap=unmap, fua=fua),
        )

    async def _trim(self) -> None:
        offset, length = self._range(aligned=True)
        size = len(self.before)
        grain = self.device._parts.geometry.grain
        first = -(-offset // grain) * grain
        end = offset + length
        last = -(-end // grain) * grain if end == size else end // grain * grain
        values = dict.fromkeys(
            range(first // SECTOR, -(-min(last, size) // SECTOR)), ZERO_SECTOR
        )
        # It may do nothing over a backing file, and to a part of a compressed cluster.
        split = self.device._parts.geometry.extended
        firm = self.image.base is None and not (self.image.flavour.compressed and split)
        request = Request("trim", values, firm=firm, text=f"trim {offset}+{length}")
        await self._do(request, self.device.trim(offset, length))

    async def flush(self) -> None:
        """Flush."""
        await self._do(Request("flush", {}), self.device.flush())

    async def _do(self, request: Request, work: Coroutine[Any, Any, None]) -> None:
        if not self._partial.isdisjoint(request.values):
            # two requests that meet within a sector would leave a mixture
            work.close()
            return
        number = self._begin(request)
        try:
            await work
        except (OSError, ImageError) as error:
            self._end(number, succeeded=False)
            self.errors.append(error)
        else:
            self._end(number, succeeded=True)

    def _commit_in_background(self) -> None:
        """What the commit interval does."""
        space = self.device._space
        assert space is not None
        space.commit._tick()

    async def look(self) -> None:
        """Read everything, if nobody writes meanwhile.

        Raises:
            MismatchError: Something has a wrong value.
        """
        if any(self._inside.values()):
            return
        count = len(self.requests)
        found = bytearray(len(self.before))
        await self.device.read_into(0, memoryview(found))
        if count != len(self.requests):
            return
        wrong = compare(found, self.before, self.live.sectors())
        if wrong is not None:
            value = bytes(found[wrong * SECTOR : (wrong + 1) * SECTOR])
            raise MismatchError(f"live image: {self.live.explain(wrong, value)}")


@dataclass(frozen=True, slots=True)
class Plan:
    """How to run.

    Attributes:
        seed: Decides everything.
        requests: How many the guest makes.
        workers: How many at a time.
        redo: Whether there is a redo log.
        close: Whether the image is closed in the end.
        fault: What goes wrong.
    """

    seed: int
    requests: int = 30
    workers: int = 3
    redo: bool = True
    close: bool = True
    fault: Fault | None = None


async def record(
    image: Image,
    plan: Plan,
    *,
    start: bytes | bytearray | None = None,
    guest: bytes | None = None,
    first_number: int = 0,
    links: Sequence[Link] = (),
) -> Run:
    """Run a guest on an image and return what happened.

    Args:
        image: What to open.
        plan: How to run.
        start: Another file to start from, with
        guest: what the guest sees then.
        first_number: Of the first request, to tell its data from earlier ones.
        links: What a killed server left in its redo log.

    Raises:
        MismatchError: The live image returned wrong data.
    """
    chance = random.Random(plan.seed)
    content = image.content if start is None else start
    before = image.guest if guest is None else guest
    disk = Disk(content, chance=chance, record=True)
    device = await image.open(disk)
    if links:
        await device.replay(list(links))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        if plan.redo:
            device.use_redo(LoggedRedo(Path(folder) / "redo", disk))
        disk.fault = plan.fault
        disk.calls = 0
        who = Guest(image, device, disk, chance, before, first_number=first_number)
        left = [plan.requests]

        async def work() -> None:
            while left[0] > 0:
                left[0] -= 1
                await who.step()

        async def compact() -> None:
            while left[0] > 0 and isinstance(device, Qcow2Image):
                await device.compact()
                await disk.suspend()

        workers = [work() for _ in range(plan.workers)]
        if image.flavour.compacting:
            workers.append(compact())
        await asyncio.gather(*workers)
        closed = False
        if plan.fault is not None:
            await who.look()
        if plan.close:
            try:
                await who.flush()
                await who.look()
                await device.close()
                closed = True
            except OSError as error:
                who.errors.append(error)
        await settle(device)
        return Run(
            image,
            content,
            before,
            list(disk.log or []),
            who.requests,
            who.errors,
            disk,
            closed,
        )


async def settle(device: MappedImage) -> None:
    """Let what is under way end, and stop the timer."""
    space = device._space
    assert space is not None
    for _ in range(2000):
        busy = space.commit._running, space.commit._releasing, space.pool._refilling
        if not any(busy):
            break
        await asyncio.sleep(0)
    if space.commit._timer is not None:
        space.commit._timer.cancel()
