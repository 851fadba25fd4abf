"""Writing what an overlay holds into its backing file, and emptying the overlay.

The order makes a crash harmless at any moment: the overlay hides the backing file
wherever it has something, so that what is written there changes nothing that can be
seen, until all of it is durable. Only then is the overlay emptied.
"""

import os
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing, nullcontext
from typing import Any, Final

from nbdserve.block.device import BlockDevice
from nbdserve.errors import ConfigError
from nbdserve.formats.backing_change import Overlay, open_disk, open_overlay
from nbdserve.formats.chain import find_backing
from nbdserve.formats.copy import DEPTH, Progress
from nbdserve.formats.mapped.opening import DEFAULT_OPTIONS, EngineOptions
from nbdserve.formats.open import open_image
from nbdserve.formats.pipeline import in_order
from nbdserve.formats.probe import probe
from nbdserve.formats.qcow2.image import Qcow2Image
from nbdserve.formats.regions import STEP
from nbdserve.storage.executor import run
from nbdserve.storage.file import FileStorage
from nbdserve.storage.names import shown

_ASKED_BYTES: Final = 1 << 40
_ASKED_EXTENTS: Final = 1 << 12
#: Bytes of the overlay that are emptied between two looks at the event loop.
_EMPTIED: Final = 1 << 30


async def commit_overlay(  # noqa: PLR0913 -- keywords, each with a default
    path: str | os.PathLike[str],
    *,
    image_format: str = "auto",
    backing_format: str | None = None,
    allow_backing: Sequence[str | os.PathLike[str]] = (),
    allow_data_file: Sequence[str | os.PathLike[str]] = (),
    empty: bool = True,
    engine: EngineOptions = DEFAULT_OPTIONS,
    progress: Progress,
) -> str:
    """Write an overlay into its backing file; durable on return.

    Args:
        path: The overlay. Nobody may have it or its backing file open.
        image_format: Of the overlay.
        backing_format: Of the backing file, if the overlay does not say.
        allow_backing: Folders in which backing files may lie, besides the image's own.
        allow_data_file: External data files that may be opened, and folders in which
            they may lie.
        empty: Whether the overlay gives up what it holds in the end.
        engine: Options for both images.
        progress: Told how many bytes are done.

    Returns:
        The path of the backing file.

    Raises:
        ConfigError: It has no backing file, or one whose format nobody knows.
        ImageError: One of them is broken or in use.
        RequestError: The backing file is smaller and can't grow.
        OSError: Reading or writing fails.
    """
    async with AsyncExitStack() as stack:
        overlay = await open_overlay(
            path,
            image_format=image_format,
            allow_data_file=allow_data_file,
            engine=engine,
        )
        # closed by the disk once there is one, and closing twice does no harm
        stack.push_async_callback(overlay.storage.close)
        target = await _target(overlay, allow_backing)
        base_format = await _base_format(overlay, target, backing_format)
        # Without its backing file: what it does not hold itself is not committed.
        top = await open_disk(
            overlay, backing=None, allow_data_file=allow_data_file, engine=engine
        )
        stack.push_async_callback(top.close)
        folders = [os.path.dirname(path) or os.curdir, *allow_backing]
        base = await open_image(
            target,
            format=base_format,
            allow_backing=folders,
            allow_data_file=allow_data_file,
            state_dir=engine.state_dir,
            secrets=engine.secrets,
        )
        try:
            if base.size < top.size:
                await base.resize(top.size)
            await _copy_down(top, base, progress)
            await base.flush()
        finally:
            await base.close()
        if empty:
            # what is seen stays as it is, so that there is nothing for bitmaps to record
            with top.unrecorded() if isinstance(top, Qcow2Image) else nullcontext():
                for offset in range(0, top.size, _EMPTIED):
                    await top.trim(offset, min(_EMPTIED, top.size - offset))
            await top.flush()
    return target


async def _target(
    overlay: Overlay, allow_backing: Sequence[str | os.PathLike[str]]
) -> str:
    if overlay.reference is None:
        raise ConfigError(f"{overlay.storage.name}: has no backing file to commit to")
    return await find_backing(overlay.storage, overlay.reference, allow_backing)


async def _base_format(overlay: Overlay, target: str, given: str | None) -> str:
    """Return the format of the backing file; a guess is no ground for writing raw."""
    recorded = None if overlay.reference is None else overlay.reference.format
    if recorded is not None:
        if given not in (None, recorded):
            raise ConfigError(
                f"{overlay.storage.name}: its backing file is {recorded}, not {given}"
            )
        return recorded
    if given is not None:
        return given
    storage = await run(lambda: FileStorage(target, read_only=True))
    try:
        found = await probe(storage)
    finally:
        await storage.close()
    if found == "raw":
        raise ConfigError(
            f"{overlay.storage.name}: does not say of which format its backing file"
            f" {shown(target)} is; add --backing-format raw if it is a raw disk"
        )
    return found


async def _copy_down(top: BlockDevice, base: BlockDevice, progress: Progress) -> None:
    async with (
        aclosing(_steps(top, base)) as jobs,
        aclosing(in_order(jobs, DEPTH)) as results,
    ):
        async for position in results:
            progress(position)
    progress(top.size)


async def _steps(
    top: BlockDevice, base: BlockDevice
) -> AsyncGenerator[Coroutine[Any, Any, int]]:
    """Yield a job for each piece that the overlay holds itself."""

    async def copy(offset: int, length: int) -> int:
        await base.write(offset, await top.read(offset, length))
        return offset + length

    async def zero(offset: int, length: int) -> int:
        await base.write_zeroes(offset, length)
        return offset + length

    position = 0
    while position < top.size:
        length = min(_ASKED_BYTES, top.size - position)
        for extent in await top.block_status(
            position, length, max_extents=_ASKED_EXTENTS
        ):
            end = position + extent.length
            if extent.present and extent.zero:
                yield zero(position, extent.length)
            elif extent.present:
                for start in range(position, end, STEP):
                    yield copy(start, min(STEP, end - start))
            position = end
