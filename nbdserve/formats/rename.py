"""Giving an image another name, and telling the images that refer to it.

The file has both names until every image that refers to it knows the new one, so
that each of them can be opened at any moment, whatever happens.
"""

import errno
import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from nbdserve.errors import ConfigError, ForeignFormatError, ImageError
from nbdserve.formats.backing_change import (
    Overlay,
    change_backing,
    change_data_file,
    data_file_of,
    judge_name,
    open_overlay,
    plan_change,
    plan_data_file,
)
from nbdserve.formats.mapped.opening import DEFAULT_OPTIONS, EngineOptions
from nbdserve.formats.open import drivers
from nbdserve.formats.probe import probe
from nbdserve.storage.executor import run
from nbdserve.storage.file import FileStorage
from nbdserve.storage.names import shown
from nbdserve.storage.publish import add_name, require_new, sync_folder


@dataclass(frozen=True, slots=True)
class _Change:
    """A header that has to change.

    Attributes:
        overlay: The image.
        name: What its backing file will be called, or
        of_data: its external data file.
    """

    overlay: Overlay
    name: bytes
    of_data: bool = False

    @property
    def backing_format(self) -> str | None:
        """The recorded format, which stays."""
        reference = self.overlay.reference
        return None if reference is None else reference.format

    async def judge(self) -> None:
        """Raise now what would be raised by `make`, except errors of the system."""
        if self.of_data:
            await plan_data_file(self.overlay, self.name)
        else:
            await plan_change(self.overlay, self.name, self.backing_format)

    async def make(self) -> None:
        """Change the header."""
        if self.of_data:
            await change_data_file(self.overlay, self.name)
        else:
            await change_backing(self.overlay, self.name, self.backing_format)


async def rename_image(
    old: str,
    new: str,
    referrers: Sequence[str] = (),
    *,
    engine: EngineOptions = DEFAULT_OPTIONS,
) -> None:
    """Rename an image; durable on return.

    Args:
        old: Its name. Nobody may be writing to it.
        new: Its new name, on the same file system; nothing may be there.
        referrers: Images whose backing file, or external data file, it is. Nobody else may have them open.
        engine: Options for images whose headers change.

    Raises:
        ConfigError: There is no such image, or the new name is not possible.
        ImageError: An image is in use or broken, or refers to something else.
        OSError: The system refuses a step.
    """
    await run(_judge_names, old, new)
    async with AsyncExitStack() as stack:
        changes = []
        for referrer in referrers:
            overlay = await open_overlay(referrer, engine=engine)
            stack.push_async_callback(overlay.storage.close)
            changes.append(await _referring_change(referrer, overlay, old, new))
        absolute, relative = await _own_changes(stack, old, new, engine)
        for change in (*changes, *absolute, *relative):
            await change.judge()
        for change in absolute:
            # valid under both names
            await change.make()
        await run(_add_name, old, new)
        try:
            for change in changes:
                await change.make()
        except OSError as error:
            raise ImageError(
                f"{shown(old)} has both names now, since a referring image could not be"
                f" changed: {error.strerror}"
            ) from error
        await run(_remove_name, old)
        for change in relative:
            await change.make()


def _judge_names(old: str, new: str) -> None:
    if os.path.islink(old):
        raise ConfigError(
            f"{shown(old)}: is a symbolic link; rename what it leads to:"
            f" {shown(os.path.realpath(old))}"
        )
    if os.path.exists(old) and not os.path.isfile(old):
        raise ConfigError(f"{shown(old)}: is not a regular file")
    try:
        require_new(new)
    except FileExistsError as error:
        raise ConfigError(
            f"{shown(new)} exists already: nothing is overwritten"
        ) from error


async def _referring_change(
    referrer: str, overlay: Overlay, old: str, new: str
) -> _Change:
    """Return what changes in an image whose backing or data file is renamed."""
    data = await data_file_of(overlay)
    if data is not None and await run(_leads_to, referrer, data, old):
        return _Change(overlay, await run(_new_name, referrer, data, new), of_data=True)
    reference = overlay.reference
    if reference is None:
        raise ImageError(f"{shown(referrer)}: has no backing file")
    if not await run(_leads_to, referrer, reference.name, old):
        recorded = os.path.join(os.fsencode(os.path.dirname(referrer)), reference.name)
        raise ImageError(
            f"{shown(referrer)}: its backing file is {shown(recorded)}, not {shown(old)}"
        )
    return _Change(overlay, await run(_new_name, referrer, reference.name, new))


def _leads_to(referrer: str, name: bytes, path: str) -> bool:
    recorded = os.path.join(os.fsencode(os.path.dirname(referrer)), name)
    return os.path.exists(recorded) and os.path.samefile(recorded, path)


def _new_name(referrer: str, name: bytes, new: str) -> bytes:
    """Return the name under which an image will find a renamed file."""
    if os.path.isabs(name):
        return judge_name(os.path.abspath(new))
    return judge_name(_relative(_real(new), os.path.dirname(referrer)))


async def _own_changes(
    stack: AsyncExitStack, old: str, new: str, engine: EngineOptions
) -> tuple[list[_Change], list[_Change]]:
    """Lock the image; return what changes in it where it names files relatively.

    Such a name counts from the image's folder. Where that changes, it is made
    absolute first and relative again in the end.
    """
    storage = await run(lambda: FileStorage(old, read_only=True))
    stack.push_async_callback(storage.close)
    try:
        found = await probe(storage)
    except ForeignFormatError:
        found = "raw"  # it may name files as well, but not those of ours
    if found == "raw":
        return [], []
    reference = await drivers()[found].backing(storage)
    data = await data_file_of(Overlay(storage, found, reference))
    backing = None if reference is None else reference.name
    moved = [
        (*places, name is data)
        for name in (backing, data)
        if name is not None and not os.path.isabs(name)
        if (places := await run(_place_if_moved, old, new, os.fsdecode(name)))
    ]
    if not moved:
        return [], []
    await storage.close()
    overlay = await open_overlay(old, engine=engine)
    stack.push_async_callback(overlay.storage.close)
    return (
        [_Change(overlay, judge_name(each), of_data) for each, _, of_data in moved],
        [_Change(overlay, judge_name(each), of_data) for _, each, of_data in moved],
    )


def _place_if_moved(old: str, new: str, name: str) -> tuple[str, str] | None:
    """Return a file's absolute and new relative name if the image's folder changes."""
    folders = [os.path.dirname(path) or os.curdir for path in (old, new)]
    if os.path.samefile(*folders):
        return None
    absolute = os.path.abspath(os.path.join(folders[0], name))
    return absolute, _relative(_real(absolute), folders[1])


def _real(path: str) -> str:
    """Return a path without symbolic links, except that it may be one itself."""
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder or os.curdir), name)


def _relative(path: str, folder: str) -> str:
    relative = os.path.relpath(path, os.path.realpath(folder or os.curdir))
    return f"./{relative}" if ":" in relative.partition("/")[0] else relative


def _add_name(old: str, new: str) -> None:
    try:
        add_name(old, new)
        sync_folder(new)
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise ConfigError(
                f"{shown(new)}: is on another file system: use nbdserve image convert"
            ) from error
        raise


def _remove_name(old: str) -> None:
    # where there are no hard links, it moved already
    if os.path.lexists(old):
        os.unlink(old)
    sync_folder(old)
