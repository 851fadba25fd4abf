"""Open an image as its configuration says, and make an export of it."""

import structlog

from nbdserve.block.device import BlockDevice
from nbdserve.block.dirty_bitmap import DirtyBitmap
from nbdserve.block.layers.guarded import Guarded
from nbdserve.block.layers.window import Window
from nbdserve.config.model import ImageConfig
from nbdserve.errors import ConfigError, ImageError, explain
from nbdserve.exports.access import Policy
from nbdserve.exports.export import Export
from nbdserve.formats.crypto.secret import read_secrets
from nbdserve.formats.open import open_image
from nbdserve.formats.persistent_bitmaps import find_bitmap
from nbdserve.formats.probe import probe_file
from nbdserve.formats.qcow2.image import Qcow2Image
from nbdserve.formats.scratch import open_scratch
from nbdserve.storage.executor import run
from nbdserve.storage.names import shown


async def open_export(
    image: ImageConfig, policy: Policy, state_dir: str | None
) -> Export:
    """Open one image.

    Raises:
        ConfigError: Its path can't be opened.
        ImageError: It can't be used.
    """
    device, persistent = await open_disk(image, state_dir)
    known = {bitmap.name for bitmap in persistent}
    export = Export(
        image.name,
        device,
        image.description,
        allocation_depth=image.allocation_depth,
        bitmaps=[name for name in image.bitmaps if name not in known],
        persistent=persistent,
    )
    export.policy = policy
    return export


async def open_disk(
    image: ImageConfig, state_dir: str | None
) -> tuple[BlockDevice, list[DirtyBitmap]]:
    """Open the disk of an image as it is to be seen, and find its own bitmaps.

    Raises:
        ConfigError: Its path can't be opened.
        ImageError: It can't be used.
    """
    try:
        return await _open_disk(image, state_dir)
    except OSError as error:
        raise ImageError(
            f"{shown(image.path)}: can't be opened: {explain(error)}"
        ) from error


async def _open_disk(
    image: ImageConfig, state_dir: str | None
) -> tuple[BlockDevice, list[DirtyBitmap]]:
    device: BlockDevice
    guessed = await _is_guess(image)
    secrets = await run(read_secrets, image.secret_files)
    if image.scratch is not None and not image.reads_only:
        device = await open_scratch(
            image.path,
            image.scratch,
            format=image.format or "auto",
            allow_backing=image.allow_backing,
            allow_data_file=image.allow_data_file,
            secrets=secrets,
        )
    else:
        device = await open_image(
            image.path,
            format=image.format or ("raw" if guessed else "auto"),
            read_only=image.reads_only,
            allow_backing=image.allow_backing,
            allow_data_file=image.allow_data_file,
            secrets=secrets,
            cache=image.cache,
            state_dir=state_dir,
            snapshot=image.snapshot,
        )
    for note in device.notes:
        structlog.get_logger().warning(note)
    try:
        persistent = await _persistent_bitmaps(device, image)
        if guessed:
            device = Guarded(device)
        if image.offset or not image.discard:
            device = Window(device, image.offset, discard=image.discard)
    except BaseException:
        await device.close()
        raise
    return device, persistent


async def _is_guess(image: ImageConfig) -> bool:
    """Tell whether an image is writable and raw because it looks like nothing else.

    Raises:
        ConfigError: Its path can't be opened.
    """
    if not image.guess_raw or image.format is not None or image.leaves_alone:
        return False
    if await probe_file(image.path) != "raw":
        return False
    structlog.get_logger().warning(
        "the format was not specified and is guessed to be raw: writes that make the"
        " first sector the header of an image are refused; -f raw allows them",
        image=shown(image.path),
    )
    return True


async def _persistent_bitmaps(
    device: BlockDevice, image: ImageConfig
) -> list[DirtyBitmap]:
    """Return those of the bitmaps to be served that the image or its chain has.

    Raises:
        ConfigError: One is not there, and could not record anything either.
        ImageError: One can't be used.
    """
    found: list[DirtyBitmap] = []
    for name in image.bitmaps:
        try:
            bitmap = await find_bitmap(device, name)
        except OSError as error:
            raise ImageError(
                f"{shown(image.path)}: bitmap {name!r} can't be read: {error}"
            ) from error
        if bitmap is not None:
            found.append(bitmap)
        elif image.persistent_only or device.read_only:
            raise ConfigError(f"{shown(image.path)}: there is no bitmap {name!r}")
        elif isinstance(device, Qcow2Image):
            structlog.get_logger().warning(
                "there is no persistent bitmap of that name: what changes is recorded"
                " until the server ends",
                image=shown(image.path),
                bitmap=name,
            )
    if found and image.offset:
        raise ConfigError(
            f"{shown(image.path)}: its bitmaps are about the whole disk, so they can't be"
            " served with an offset"
        )
    return found
