"""Giving an image another name, and telling the images that refer to it.

The file has both names until every image that refers to it knows the new one, so
that each of them can be opened at any moment, whatever happens.
"""

import errno
import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from nbdserve.errors import ConfigError, ImageError
from nbdserve.formats.backing_change import (
    Overlay,
    change_backing,
    judge_name,
    open_overlay,
    plan_change,
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
        name: What its backing file will be called.
    """

    overlay: Overlay
    name: bytes

    @property
    def backing_format(self) -> str | None:
        """The recorded format, which stays."""
        reference = self.overlay.reference
        return None if reference is None else reference.format

    async def judge(self) -> None:
        """Raise now what would be raised by `make`, except errors of the system."""
        await plan_change(self.overlay, self.name, self.backing_format)

    async def make(self) -> None:
        """Change the header."""
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
        referrers: Images whose backing file it is. Nobody else may have them open.
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
            name = await run(_new_reference, referrer, overlay, old, new)
            changes.append(_Change(overlay, name))
        own = await _own_changes(stack, old, new, engine)
        for change in (*changes, *own):
            await change.judge()
        if own:
            # valid under both names
            await own[0].make()
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
        if own:
            await own[1].make()


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


def _new_reference(referrer: str, overlay: Overlay, old: str, new: str) -> bytes:
    """Return the name under which an image will find its renamed backing file."""
    reference = overlay.reference
    if reference is None:
        raise ImageError(f"{shown(referrer)}: has no backing file")
    folder = os.path.dirname(referrer)
    recorded = os.path.join(os.fsencode(folder), reference.name)
    if not os.path.exists(recorded) or not os.path.samefile(recorded, old):
        raise ImageError(
            f"{shown(referrer)}: its backing file is {shown(recorded)}, not {shown(old)}"
        )
    if os.path.isabs(reference.name):
        return judge_name(os.path.abspath(new))
    return judge_name(_relative(_real(new), folder))


async def _own_changes(
    stack: AsyncExitStack, old: str, new: str, engine: EngineOptions
) -> list[_Change]:
    """Lock the image; return what changes in it if its own backing file has a relative name.

    Such a name counts from the image's folder. Where that changes, it is made
    absolute first and relative again in the end.
    """
    storage = await run(lambda: FileStorage(old, read_only=True))
    stack.push_async_callback(storage.close)
    found = await probe(storage)
    if found == "raw":
        return []
    reference = await drivers()[found].backing(storage)
    if reference is None or os.path.isabs(reference.name):
        return []
    moved = await run(_backing_if_moved, old, new, os.fsdecode(reference.name))
    if moved is None:
        return []
    await storage.close()
    overlay = await open_overlay(old, engine=engine)
    stack.push_async_callback(overlay.storage.close)
    absolute, relative = moved
    return [
        _Change(overlay, judge_name(absolute)),
        _Change(overlay, judge_name(relative)),
    ]


def _backing_if_moved(old: str, new: str, name: str) -> tuple[str, str] | None:
    """Return the backing file's absolute and new relative name if the folder changes."""
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
