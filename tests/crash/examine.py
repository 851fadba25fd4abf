"""Judging one state: it opens, every sector has an allowed value, checks find leaks at most."""

import os
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from nbdserve.errors import ImageError
from nbdserve.formats.mapped.image import MappedImage
from nbdserve.formats.mapped.redo import Link, read_leftover
from nbdserve.formats.qcow1.check import check_image as check_qcow1
from nbdserve.formats.qcow2.check import check_image as check_qcow2
from nbdserve.formats.qcow2.image import Qcow2Image
from tests.crash.cuts import Cache
from tests.crash.disk import (
    SECTOR,
    Acknowledged,
    Applied,
    Began,
    Disk,
    Ended,
    Event,
    Failed,
    Files,
    Redone,
    Sized,
    Synced,
    SyncedRange,
)
from tests.crash.flavours import DATA_FILE, Image
from tests.crash.guest import Allowed, compare
from tests.crash.workload import Plan, Run, record, settle
from tests.helpers.tools import run as run_tool


class ViolationError(Exception):
    """A state that breaks a promise."""


@dataclass(slots=True)
class Tally:
    """How much was tried.

    Attributes:
        states: Distinct files opened, read and checked, by kind of crash.
        violations: What was found.
    """

    states: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    _seen: set[object] = field(default_factory=set)

    def count(self, kind: str, key: object) -> None:
        """Count a state, unless it was one of an earlier run too."""
        if key not in self._seen:
            self._seen.add(key)
            self.states[kind] += 1

    @property
    def distinct(self) -> int:
        """Distinct states of all kinds."""
        return sum(self.states[kind] for kind in ("power cut", "cut again", "kill"))


#: More than the calls of any run.
_CALLS: Final = 1 << 20

#: Of this whole session, for the summary.
TOTAL: Final = Tally()


@dataclass(frozen=True, slots=True)
class Effort:
    """How much to try.

    Attributes:
        per_event: About how many choices of what survives at each event.
        qemu: One state in so many is shown to qemu-img too.
        recover: One state in so many is written, flushed, closed and checked.
        cut_again: One state in so many is cut again while it is being written.
    """

    per_event: int = 24
    qemu: int = 500
    recover: int = 12
    cut_again: int = 300


class Examiner:
    """Examines states of one image."""

    def __init__(self, image: Image, tally: Tally, effort: Effort, seed: int) -> None:
        self._image = image
        self._tally = tally
        self._effort = effort
        self._chance = random.Random(seed)
        self._fd = os.memfd_create("state")
        self._redo_path = Path(f"/dev/shm/nbdserve-crash-{os.getpid()}-{id(self)}")

    def close(self) -> None:
        """Give back what it holds."""
        os.close(self._fd)
        self._redo_path.unlink(missing_ok=True)

    # -- a run

    async def power_cuts(self, run: Run, *, again: bool = True) -> None:
        """Examine what power cuts leave of a run.

        Raises:
            ViolationError: The first one found.
        """
        cache = Cache(Files.of(run.start))
        allowed = Allowed(run.guest, run.requests, kept_by_flush=True)
        judged: dict[int, int] = {}
        epoch = -1
        for now, event in enumerate(run.events):
            fresh = cache.take(event, now)
            _follow(allowed, event, now)
            if not fresh and allowed.epoch == epoch:
                continue
            if allowed.epoch != epoch:
                epoch, fresh = allowed.epoch, []
            values = None
            for choice in cache.choices(fresh, self._effort.per_event, self._chance):
                key = cache.key(choice)
                if judged.get(key) == epoch:
                    continue
                known = key in judged
                judged[key] = epoch
                if values is None:
                    values = allowed.sectors()
                content = cache.build(choice)
                try:
                    await self._judge(content, run.guest, allowed, values, known=known)
                    if not known:
                        await self._sample(run, content, again=again)
                except ViolationError as violation:
                    raise ViolationError(
                        f"power cut after event {now} ({_named(event)}), "
                        f"survived: {cache.story(choice)}: {violation}"
                    ) from violation
                if not known:
                    self._tally.count("power cut" if again else "cut again", key)

    async def kills(self, run: Run) -> None:
        """Examine what killing the server leaves of a run, at each event."""
        cache = Cache(Files.of(run.start))
        allowed = Allowed(run.guest, run.requests, kept_by_flush=False)
        redo = b""
        changed = False
        seen: set[tuple[int, int]] = set()
        for now, event in enumerate(run.events):
            changed = bool(cache.take(event, now)) or changed
            _follow(allowed, event, now)
            if isinstance(event, Redone):
                redo, changed = event.content, True
            if not changed and not isinstance(event, Acknowledged):
                continue
            changed = False
            choice = {
                place: len(versions) for place, versions in cache._pending.items()
            }
            key = cache.key(choice), hash(redo)
            content = cache.build(choice)
            try:
                await self._judge(
                    content,
                    run.guest,
                    allowed,
                    allowed.sectors(),
                    known=key in seen,
                    redo=redo,
                )
            except ViolationError as violation:
                raise ViolationError(
                    f"killed after event {now} ({_named(event)}): {violation}"
                ) from violation
            if key not in seen:
                seen.add(key)
                self._tally.count("kill", key)

    async def restart(self, run: Run, at: int, plan: Plan) -> Run:
        """Kill the server of a run, start another one, and return the two as one run.

        Args:
            run: The first one.
            at: The event before which it was killed.
            plan: Of the second one.
        """
        cache = Cache(Files.of(run.start))
        waiting: set[int] = set()
        redo = b""
        for now, event in enumerate(run.events[:at]):
            cache.take(event, now)
            if isinstance(event, Began):
                waiting.add(event.request)
            elif isinstance(event, Acknowledged | Failed):
                waiting.discard(event.request)
            elif isinstance(event, Redone):
                redo = event.content
        content = cache.build(cache.newest())
        device = await self._open(Disk(content), redo)
        guest = bytes(await self._read(device))
        await settle(device)
        links = self._leftover(redo) if redo else []
        second = await record(
            run.image,
            plan,
            start=content,
            guest=guest,
            first_number=100_000,
            links=links,
        )
        # Nobody will answer these any more, and no thread goes on writing.
        events = [*run.events[:at], *(Failed(request) for request in sorted(waiting))]
        events += [Ended(call) for call in cache.calls()]
        base, requests = len(events), len(run.requests)
        events += (_shifted(event, base, requests) for event in second.events)
        return Run(
            run.image,
            run.start,
            run.guest,
            events,
            run.requests + second.requests,
            second.errors,
            second.disk,
            second.closed,
        )

    # -- a state

    async def _judge(
        self,
        content: Files,
        before: bytes,
        allowed: Allowed,
        values: dict[int, set[bytes]],
        *,
        known: bool,
        redo: bytes = b"",
    ) -> None:
        disk = Disk(content)
        device = await self._open(disk, redo)
        found = await self._read(device)
        wrong = compare(found, before, values)
        if wrong is not None:
            value = bytes(found[wrong * SECTOR : (wrong + 1) * SECTOR])
            raise ViolationError(allowed.explain(wrong, value))
        if self._image.flavour.bitmaps:
            await self._check_bitmaps(device, found)
        if self._image.flavour.raw:
            self._compare_raw(disk, found)
        await settle(device)
        if redo:
            # the replay has changed it
            content, known = disk.files(), False
        if not known:
            self._check(content)

    async def _open(self, disk: Disk, redo: bytes) -> MappedImage:
        try:
            device = await self._image.open(disk)
            if redo:
                links = self._leftover(redo)
                await device.replay(links)
        except (ImageError, OSError) as error:
            raise ViolationError(f"does not open: {error}") from error
        return device

    def _leftover(self, redo: bytes) -> list[Link]:
        self._redo_path.write_bytes(redo)
        return read_leftover(self._redo_path, 0).links

    async def _read(self, device: MappedImage) -> bytearray:
        found = bytearray(device.size)
        try:
            await device.read_into(0, memoryview(found))
        except (ImageError, OSError) as error:
            raise ViolationError(f"can't be read: {error}") from error
        return found

    async def _check_bitmaps(self, device: MappedImage, found: bytearray) -> None:
        """A bitmap that can be used knows all that is not as it was when it began."""
        assert isinstance(device, Qcow2Image)
        usable = {each.name for each in await device.bitmaps() if not each.problem}
        if "still" not in usable:
            raise ViolationError("the disabled bitmap is lost")
        still = await device.dirty_bitmap("still")
        if list(still.dirty()) != [(8192, SECTOR)]:
            raise ViolationError(f"the disabled bitmap has {list(still.dirty())}")
        if "live" not in usable:
            self._tally.states["bitmaps in use"] += 1
            return
        live = await device.dirty_bitmap("live")
        before = self._image.guest
        for offset in range(0, len(found), SECTOR):
            piece = slice(offset, offset + SECTOR)
            [(_, dirty)] = live.runs(offset, SECTOR, max_runs=1)
            if found[piece] != before[piece] and not dirty:
                raise ViolationError(f"the bitmap misses sector {offset // SECTOR}")
        if any(live.dirty()):
            self._tally.states["bitmaps stored"] += 1

    def _compare_raw(self, disk: Disk, found: bytearray) -> None:
        """A raw data file has by itself what the guest sees."""
        external = disk.external
        assert external is not None
        if bytes(external.data[: len(found)]).ljust(len(found), b"\0") != found:
            raise ViolationError("the raw data file is not what the guest sees")

    def _check(self, content: bytearray) -> None:
        os.ftruncate(self._fd, len(content))
        os.pwrite(self._fd, content, 0)
        check = check_qcow1 if self._image.flavour.format == "qcow" else check_qcow2
        result = check(self._fd, "state")
        if result.corruptions or result.check_errors:
            raise ViolationError(f"check: {result.messages}")

    # -- more, of some states

    async def _sample(self, run: Run, content: Files, *, again: bool) -> None:
        chance, effort = self._chance, self._effort
        if not chance.randrange(effort.qemu):
            await self._ask_qemu(content)
        if not again:
            return
        if not chance.randrange(effort.recover):
            await self._recover(content)
        if not chance.randrange(effort.cut_again):
            await self._cut_again(run, content)

    async def _ask_qemu(self, content: Files) -> None:
        """qemu-img finds no more than leaks and reads what we read."""
        self._tally.states["seen by qemu-img"] += 1
        image = self._image
        path, raw = image.folder / "state", image.folder / "state.raw"
        path.write_bytes(content)
        if content.external is not None:
            (image.folder / DATA_FILE).write_bytes(content.external)
        kind = image.flavour.format
        if kind == "qcow2":
            _qemu_img("check", *image.qemu(path), expect=(0, 3))
        _qemu_img("convert", "-O", "raw", *image.qemu(path), raw)
        found = await self._read(await image.open(Disk(content)))
        # qemu rounds the size of a raw file up to sectors
        if raw.read_bytes()[: len(found)] != bytes(found):
            raise ViolationError("qemu-img convert reads something else")

    async def _recover(self, content: Files) -> None:
        """Write, flush and close: it reads as it should, and the check agrees."""
        self._tally.states["recovered"] += 1
        disk = Disk(content)
        device = await self._open(disk, b"")
        expected = await self._read(device)
        cluster = device._parts.geometry.cluster_size
        for _ in range(3):
            length = self._chance.choice((SECTOR, cluster, cluster + SECTOR))
            offset = self._chance.randrange(device.size // SECTOR) * SECTOR
            data = b"recovered;".ljust(length, b"r")[: device.size - offset]
            try:
                await device.write(offset, data)
            except (ImageError, OSError) as error:
                raise ViolationError(f"can't be written: {error}") from error
            expected[offset : offset + len(data)] = data
        await device.flush()
        await device.close()
        self._check(disk.data)
        device = await self._open(Disk(disk.files()), b"")
        if await self._read(device) != expected:
            raise ViolationError("after recovery it reads as something else")
        if self._image.flavour.bitmaps:
            await self._check_bitmaps(device, expected)

    async def _cut_again(self, run: Run, content: Files) -> None:
        """Cut the power while a recovered image is being written."""
        device = await self._open(Disk(content), b"")
        guest = bytes(await self._read(device))
        plan = Plan(self._chance.randrange(1 << 30), requests=5, redo=False)
        second = await record(
            run.image, plan, start=content, guest=guest, first_number=100_000
        )
        effort = self._effort
        self._effort = Effort(3, 1 << 30, 1 << 30, 1 << 30)
        try:
            await self.power_cuts(second, again=False)
        finally:
            self._effort = effort


def _shifted(event: Event, base: int, requests: int) -> Event:
    """Return an event of a second run as one that comes after `base` others."""
    if isinstance(event, Applied | Sized | Ended):
        return replace(event, call=event.call + _CALLS)
    if isinstance(event, Synced):
        return Synced(event.begin + base)
    if isinstance(event, SyncedRange):
        return replace(event, begin=event.begin + base)
    if isinstance(event, Began | Acknowledged | Failed):
        return replace(event, request=event.request + requests)
    return event


def _follow(allowed: Allowed, event: Event, now: int) -> None:
    if isinstance(event, Began):
        allowed.began(event.request, now)
    elif isinstance(event, Acknowledged):
        allowed.ended(event.request, now, succeeded=True)
    elif isinstance(event, Failed):
        allowed.ended(event.request, now, succeeded=False)


def _qemu_img(*argv: str | Path, expect: tuple[int, ...] = (0,)) -> None:
    try:
        run_tool("qemu-img", *argv, expect=expect)
    except AssertionError as error:
        raise ViolationError(str(error)) from error


def _named(event: Event) -> str:
    text = repr(event)
    return text if len(text) < 80 else type(event).__name__
