"""Moving an image to another backing file without changing what it shows.

What the old and the new backing file have differently is copied into the image
first. While that goes on the image still names the old one, so that a crash loses
nothing; the name changes when all copies are durable.
"""

import os
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any

from nbdserve.block.device import BlockDevice
from nbdserve.errors import ConfigError
from nbdserve.formats.backing_change import (
    Overlay,
    change_backing,
    judge_name,
    open_disk,
    open_overlay,
    plan_change,
)
from nbdserve.formats.chain import ChainOptions, backing_chain, find_backing
from nbdserve.formats.copy import DEPTH, Progress
from nbdserve.formats.crypto.secret import Secret
from nbdserve.formats.mapped.opening import DEFAULT_OPTIONS, EngineOptions
from nbdserve.formats.open import drivers, open_image
from nbdserve.formats.pipeline import in_order
from nbdserve.formats.regions import (
    Window,
    differing_runs,
    nonzero_runs,
    read_padded,
    windows,
)
from nbdserve.storage.executor import run
from nbdserve.storage.names import shown


async def rebase_unsafely(
    path: str | os.PathLike[str],
    backing: str | None,
    backing_format: str | None,
    *,
    image_format: str = "auto",
    engine: EngineOptions = DEFAULT_OPTIONS,
) -> None:
    """Change the name of the backing file and nothing else.

    Args:
        path: The image.
        backing: The new name as it shall be recorded; None is no backing file. It
            need not exist.
        backing_format: Its format.
        image_format: Of the image.
        engine: Options for the image.

    Raises:
        ConfigError: The name is not possible.
        ImageError: The image is broken or in use, or has no room for the name.
        OSError: It can't be written.
    """
    name = None if backing is None else judge_name(backing)
    overlay = await open_overlay(path, image_format=image_format, engine=engine)
    try:
        await change_backing(overlay, name, backing_format)
    finally:
        await overlay.storage.close()


async def rebase(  # noqa: PLR0913 -- keywords, each with a default
    path: str | os.PathLike[str],
    backing: str | None,
    backing_format: str | None,
    *,
    image_format: str = "auto",
    allow_backing: Sequence[str | os.PathLike[str]] = (),
    allow_data_file: Sequence[str | os.PathLike[str]] = (),
    engine: EngineOptions = DEFAULT_OPTIONS,
    progress: Progress,
) -> None:
    """Move an image to another backing file; what it shows stays the same.

    Args:
        path: The image. Nobody else may have it open.
        backing: The new name as it shall be recorded, a relative one counts from the
            folder of the image; None is no backing file.
        backing_format: Its format.
        image_format: Of the image.
        allow_backing: Folders in which backing files may lie, besides the image's own.
        allow_data_file: External data files that may be opened, and folders in which
            they may lie.
        engine: Options for the image.
        progress: Told how many bytes are done.

    Raises:
        ConfigError: The name is not possible, or leads to no file.
        ImageError: An image is broken or in use, or there is no room for the name.
        OSError: Reading or writing fails.
    """
    name = None if backing is None else judge_name(backing)
    async with AsyncExitStack() as stack:
        new = None
        if backing is not None:
            new = await _open_new(
                path,
                backing,
                backing_format,
                allow_backing,
                allow_data_file,
                engine.secrets,
            )
            stack.push_async_callback(new.close)
        overlay = await open_overlay(
            path,
            image_format=image_format,
            allow_data_file=allow_data_file,
            engine=engine,
        )
        stack.push_async_callback(overlay.storage.close)
        # Before the work rather than after it: is there room for the name?
        await plan_change(overlay, name, backing_format)
        old = await _open_old(
            path, overlay, allow_backing, allow_data_file, engine.secrets
        )
        if old is not None:
            stack.push_async_callback(old.close)
        image = await open_disk(
            overlay, backing=old, allow_data_file=allow_data_file, engine=engine
        )
        stack.push_async_callback(image.close)
        await _Rebasing(image, 0 if old is None else old.size, new).run(progress)
        await image.flush()
        await change_backing(overlay, name, backing_format)


async def _open_new(
    path: str | os.PathLike[str],
    backing: str,
    backing_format: str | None,
    allow_backing: Sequence[str | os.PathLike[str]],
    allow_data_file: Sequence[str | os.PathLike[str]],
    secrets: Sequence[Secret],
) -> BlockDevice:
    """Open the new backing file, unless the image is part of its chain."""
    folder = os.path.dirname(os.fspath(path))
    full = os.path.join(folder, backing)
    folders = [folder or os.curdir, *allow_backing]
    image_format = backing_format or "auto"
    options = ChainOptions(
        format=image_format, read_only=True, allow_backing=folders, lock=False
    )
    chain = await backing_chain(full, options, drivers())
    if await run(_is_among, os.fspath(path), [name for name, _ in chain]):
        raise ConfigError(
            f"{shown(path)}: {shown(full)} reads from it, so it can't be its backing file"
        )
    return await open_image(
        full,
        format=image_format,
        read_only=True,
        allow_backing=folders,
        allow_data_file=allow_data_file,
        secrets=secrets,
    )


def _is_among(path: str, names: Sequence[str]) -> bool:
    return any(os.path.exists(name) and os.path.samefile(path, name) for name in names)


async def _open_old(
    path: str | os.PathLike[str],
    overlay: Overlay,
    allow_backing: Sequence[str | os.PathLike[str]],
    allow_data_file: Sequence[str | os.PathLike[str]],
    secrets: Sequence[Secret],
) -> BlockDevice | None:
    if overlay.reference is None:
        return None
    target = await find_backing(overlay.storage, overlay.reference, allow_backing)
    folders = [os.path.dirname(path) or os.curdir, *allow_backing]
    image_format = overlay.reference.format or "auto"
    return await open_image(
        target,
        format=image_format,
        read_only=True,
        allow_backing=folders,
        allow_data_file=allow_data_file,
        secrets=secrets,
    )


@dataclass(frozen=True, slots=True)
class _Rebasing:
    """One image on its way to another backing file.

    Attributes:
        image: Still on the old backing file.
        old_size: Bytes of that one, 0 if there is none.
        new: The new one, None if there will be none.
    """

    image: BlockDevice
    old_size: int
    new: BlockDevice | None

    async def run(self, progress: Progress) -> None:
        """Copy what would change."""
        async with (
            aclosing(self._steps()) as jobs,
            aclosing(in_order(jobs, DEPTH)) as results,
        ):
            async for position in results:
                progress(position)
        progress(self.image.size)

    async def _steps(self) -> AsyncGenerator[Coroutine[Any, Any, int]]:
        devices = [self.image] if self.new is None else [self.image, self.new]
        async with aclosing(windows(devices, self.image.size)) as found:
            async for window in found:
                yield self._step(window)

    async def _step(self, window: Window) -> int:
        offset, end = window.offset, window.offset + window.length
        data = bytearray(window.length)
        other = bytearray(window.length)
        view, new_view = memoryview(data), memoryview(other)
        await self.image.read_into(offset, view)
        if self.new is not None:
            await read_padded(self.new, offset, new_view)
        position = offset
        while position < end:
            for extent in await self.image.block_status(position, end - position):
                start = position - offset
                position += extent.length
                if extent.present and not extent.depth:
                    # it decides this itself, whatever lies behind it
                    stop = position - offset
                    new_view[start:stop] = view[start:stop]
        grain = self.image.preferred_block
        for start, stop in differing_runs(data, new_view, grain):
            await self._keep(offset + start, view[start:stop])
        return end

    async def _keep(self, offset: int, data: memoryview) -> None:
        """Write what the image shows into it."""
        grain = self.image.preferred_block
        position = 0
        runs = nonzero_runs(bytearray(data), grain)
        for start, stop in [*runs, (len(data), len(data))]:
            if position < start:
                await self._zero(offset + position, data[position:start])
            if start < stop:
                await self.image.write(offset + start, data[start:stop])
            position = stop

    async def _zero(self, offset: int, data: memoryview) -> None:
        if offset + len(data) <= self.old_size:
            await self.image.write_zeroes(offset, len(data))
        else:
            # zeros already as long as the old backing file ends before: say it in data
            await self.image.write(offset, data)
