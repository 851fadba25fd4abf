"""What can be done with the exports of a running server.

One change of an export at a time (`Export.change`); a compaction takes long, so it goes on
beside them, as a job that can be asked and stopped.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from nbdserve.block.device import bottom_of
from nbdserve.config.units import parse_size
from nbdserve.control.answers import (
    CompactionState,
    Exports,
    ExportState,
    NewSize,
    Resized,
    SnapshotChanged,
    Snapshots,
)
from nbdserve.errors import ConfigError, ImageError, NbdserveError
from nbdserve.exports.export import Export
from nbdserve.formats.info import snapshot_json
from nbdserve.formats.mapped.image import MappedImage
from nbdserve.formats.qcow2.image import Qcow2Image
from nbdserve.server.server import Server
from nbdserve.storage.names import shown

if TYPE_CHECKING:
    from nbdserve.formats.qcow2.compaction import Compacted

#: A compaction rests as long as it works: the disk belongs to the clients.
_PACE: Final = 1.0


class UnknownExportError(ConfigError):
    """There is no such export, or not any more."""


class BusyError(ConfigError):
    """Something else has to end first."""


@dataclass(slots=True)
class _Job:
    """A compaction that was started."""

    image: Qcow2Image
    size_before: int
    moved: int = 0
    total: int = 0
    task: "asyncio.Task[Compacted] | None" = None

    def progress(self, moved: int, total: int) -> None:
        """Remember how far it is."""
        self.moved, self.total = moved, total


class Operations:
    """Everything an operator can do with the exports of a server."""

    def __init__(
        self,
        server: Server,
        path_of: Callable[[str], str],
        reopen: Callable[[Export], Awaitable[None]],
    ) -> None:
        """Serve one server.

        Args:
            server: Whose exports.
            path_of: From the name of an export to its image, as the operator wrote it.
            reopen: Opens the disk of an export anew (`Export.change` is held).
        """
        self._server = server
        self._path_of = path_of
        self._reopen = reopen
        self._jobs: dict[Export, _Job] = {}
        self._log = structlog.get_logger()

    # -- looking

    def exports(self) -> Exports:
        """Describe all exports."""
        return Exports(exports=[self.state(each) for each in self._server.registry])

    def find(self, name: str) -> Export:
        """Return the export of that name.

        Raises:
            UnknownExportError: There is none.
        """
        export = self._server.registry.get(name)
        if export is None:
            known = ", ".join(repr(each.name) for each in self._server.registry)
            raise UnknownExportError(
                f"there is no export {name!r}, only: {known or 'none at all'}"
            )
        return export

    def state(self, export: Export) -> ExportState:
        """Describe an export."""
        path = self._path_of(export.name)
        file_size = None
        try:
            status = os.stat(path)
        except OSError:
            pass  # deleted, or renamed: that is for its owner to know
        else:
            file_size = status.st_size or None
        return ExportState(
            name=export.name,
            description=export.description,
            file=shown(path),
            format=_format(export),
            size=export.size,
            file_size=file_size,
            read_only=export.read_only,
            clients=export.clients,
            broken=export.device.broken if export.is_open else None,
        )

    # -- changing

    @asynccontextmanager
    async def _alone(self, name: str) -> AsyncIterator[Export]:
        """Have the disk of an export for a change.

        Raises:
            UnknownExportError: There is none, or it went while we waited.
        """
        export = self.find(name)
        async with export.change:
            if export.retired or self._server.stopping:
                raise UnknownExportError(f"the export {name!r} has just been removed")
            await export.ready()
            yield export

    async def flush(self, name: str) -> None:
        """Make everything durable that was answered so far.

        Raises:
            OSError: It can't be done.
        """
        async with self._alone(name) as export:
            await export.device.flush()

    async def resize(self, name: str, wanted: NewSize) -> Resized:
        """Give a disk another size; who is connected goes on with the old one.

        Raises:
            BusyError: It would get smaller under clients.
            ConfigError: It can't have that size.
            NbdserveError, OSError: See `BlockDevice.resize`.
        """
        async with self._alone(name) as export:
            device = export.device
            before, size = device.size, _size(wanted.size, device.size)
            if size < before and wanted.shrink and export.clients:
                raise BusyError(
                    f"{export.clients} clients of {name!r} may use what lies behind"
                    f" {size} bytes: it can get smaller once they are gone"
                )
            _begin_pause(export)
            await device.resize(size, shrink=wanted.shrink)
            self._log.info(
                "export resized", export=name, size=device.size, previous_size=before
            )
            return Resized(
                name=name,
                size=device.size,
                previous_size=before,
                longest_pause_s=_pause(export),
            )

    async def reopen(self, name: str) -> ExportState:
        """Open the image of an export anew, after a failed sync for instance.

        Clients stay; what they ask for meanwhile is answered afterwards.

        Raises:
            NbdserveError, OSError: See `Server.exchange_disk`.
        """
        async with self._alone(name) as export:
            await self._reopen(export)
            self._log.info("export reopened", export=name, clients=export.clients)
            return self.state(export)

    # -- snapshots

    async def snapshots(self, name: str) -> Snapshots:
        """List internal snapshots.

        Raises:
            ConfigError: The image can't have any.
            ImageError: Their table is broken.
        """
        async with self._alone(name) as export:
            found = await _qcow2(export, "have internal snapshots").snapshots()
        return Snapshots(snapshots=[snapshot_json(each) for each in found])

    async def create_snapshot(self, name: str, snapshot: str) -> SnapshotChanged:
        """Keep the disk as it is now; see `Qcow2Image.create_snapshot`."""
        async with self._alone(name) as export:
            image = _qcow2(export, "have internal snapshots")
            _begin_pause(export)
            await image.create_snapshot(snapshot)
            pause_s = _pause(export)
        self._log.info(
            "snapshot created",
            export=name,
            snapshot=snapshot,
            pause_s=round(pause_s, 6),
        )
        return SnapshotChanged(export=name, snapshot=snapshot, longest_pause_s=pause_s)

    async def delete_snapshot(self, name: str, snapshot: str) -> SnapshotChanged:
        """Forget a snapshot; see `Qcow2Image.delete_snapshot`."""
        async with self._alone(name) as export:
            image = _qcow2(export, "have internal snapshots")
            _begin_pause(export)
            await image.delete_snapshot(snapshot)
            pause_s = _pause(export)
        self._log.info(
            "snapshot deleted",
            export=name,
            snapshot=snapshot,
            pause_s=round(pause_s, 6),
        )
        return SnapshotChanged(export=name, snapshot=snapshot, longest_pause_s=pause_s)

    # -- compaction

    async def start_compaction(self, name: str) -> CompactionState:
        """Begin to compact an image, beside its clients.

        Raises:
            BusyError: It is being compacted.
            ConfigError: It can't be.
        """
        async with self._alone(name) as export:
            image = _qcow2(export, "can be compacted")
            running = self._jobs.get(export)
            if running is not None and running.task and not running.task.done():
                raise BusyError(f"{name!r} is being compacted already")
            if image.read_only:
                raise ConfigError(f"{name!r} is served read-only")
            size = self.state(export).file_size or 0
            job = self._jobs[export] = _Job(image, size)
            job.task = asyncio.get_running_loop().create_task(
                image.compact(pace=_PACE, progress=job.progress)
            )
            job.task.add_done_callback(lambda _: self._tell_compaction(export, job))
            # what can be refused at once is
            await asyncio.sleep(0)
            return self.compaction(name)

    def _tell_compaction(self, export: Export, job: _Job) -> None:
        state = _state_of(job)
        tell = self._log.error if state.state == "failed" else self._log.info
        tell(
            f"compaction {state.state}",
            export=export.name,
            moved=state.moved_bytes,
            size_before=state.size_before,
            size_after=state.size_after,
            **({} if state.error is None else {"error": state.error}),
        )
        for gone in [each for each in self._jobs if each.retired]:
            del self._jobs[gone]

    def compaction(self, name: str) -> CompactionState:
        """Tell how far the last compaction of an image is.

        Raises:
            UnknownExportError: There is no such export.
        """
        job = self._jobs.get(self.find(name))
        return CompactionState(state="none") if job is None else _state_of(job)

    async def stop_compaction(self, name: str) -> CompactionState:
        """End a compaction after the move that is under way, if there is one.

        Raises:
            UnknownExportError: There is no such export.
        """
        job = self._jobs.get(self.find(name))
        if job is not None and job.task is not None and not job.task.done():
            job.task.cancel()
            await asyncio.wait([job.task])
        return self.compaction(name)

    async def close(self) -> None:
        """End what goes on beside."""
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _state_of(job: _Job) -> CompactionState:
    task = job.task
    if task is None or not task.done():
        return CompactionState(
            state="running",
            moved_bytes=job.moved,
            total_bytes=job.total,
            size_before=job.size_before,
        )
    if task.cancelled():
        return CompactionState(
            state="stopped",
            moved_bytes=job.moved,
            total_bytes=job.total,
            size_before=job.size_before,
        )
    error = task.exception()
    if error is not None:
        expected = isinstance(error, NbdserveError | OSError)
        return CompactionState(
            state="failed",
            moved_bytes=job.moved,
            total_bytes=job.total,
            size_before=job.size_before,
            error=str(error) if expected else f"{type(error).__name__}: {error}",
        )
    done = task.result()
    return CompactionState(
        state="done" if done.finished else "stopped",
        moved_bytes=done.moved,
        total_bytes=done.moved if done.finished else job.total,
        size_before=done.size_before,
        size_after=done.size_after,
        unmovable_clusters=done.stays,
        longest_pause_s=done.longest_pause_s,
    )


def _format(export: Export) -> str | None:
    """Return the format of an image, None as long as nobody has wanted it."""
    if not export.is_open:
        return None
    device = bottom_of(export.device)
    if isinstance(device, MappedImage):
        return "qcow2" if isinstance(device, Qcow2Image) else "qcow"
    return "raw"


def _qcow2(export: Export, what: str) -> Qcow2Image:
    """Return the image of an export.

    Raises:
        ImageError: It has failed.
        ConfigError: It is of another format, which can't do `what`.
    """
    device = bottom_of(export.device)
    if device.broken is not None:
        raise ImageError(f"{export.name!r} has to be reopened: {device.broken}")
    if not isinstance(device, Qcow2Image):
        raise ConfigError(f"{export.name!r}: only qcow2 images {what}")
    return device


def _size(wanted: int | str, now: int) -> int:
    """Return a size in bytes; texts with a sign count from what it is now.

    Raises:
        ConfigError: It is none.
    """
    if isinstance(wanted, int):
        size = wanted
    else:
        sign = wanted[:1]
        size = parse_size(wanted.removeprefix("+").removeprefix("-"))
        if sign == "+":
            size = now + size
        elif sign == "-":
            size = now - size
    if size < 0:
        raise ConfigError(f"a disk can't have {size} bytes")
    return size


def _begin_pause(export: Export) -> None:
    """Measure from now on for how long clients' changes have to wait."""
    device = bottom_of(export.device)
    if isinstance(device, MappedImage):
        device.recent_pause_s = 0.0


def _pause(export: Export) -> float:
    device = bottom_of(export.device)
    return device.recent_pause_s if isinstance(device, MappedImage) else 0.0
