"""Opening an image to change it from the command line."""

import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nbdserve.errors import ConfigError, ImageError
from nbdserve.storage.names import shown

if TYPE_CHECKING:
    from nbdserve.block.device import BlockDevice
    from nbdserve.formats.crypto.secret import Secret
    from nbdserve.formats.qcow2.image import Qcow2Image


@asynccontextmanager
async def opened_to_change(
    path: str,
    *,
    image_format: str | None = None,
    allow_backing: Sequence[str] = (),
    allow_data_file: Sequence[str] = (),
    secrets: "Sequence[Secret]" = (),
) -> AsyncIterator["BlockDevice"]:
    """Open an image that nobody else uses, and close it in the end.

    What a killed server had acknowledged is linked first, so it is not lost.

    Raises:
        ConfigError: It can't be opened.
        ImageError: It is broken or in use.
    """
    from nbdserve.app import default_state_dir
    from nbdserve.formats.open import open_image

    async with open_image(
        path,
        format=image_format or "auto",
        allow_backing=allow_backing,
        allow_data_file=allow_data_file,
        state_dir=default_state_dir(os.environ),
        secrets=secrets,
    ) as device:
        for note in device.notes:
            print(f"nbdserve: {note}", file=sys.stderr)
        yield device


def as_qcow2(device: "BlockDevice", path: str, what: str) -> "Qcow2Image":
    """Return the device as the qcow2 image that it has to be.

    Raises:
        ConfigError: It is of another format, which can't do `what`.
    """
    from nbdserve.formats.qcow2.image import Qcow2Image

    if not isinstance(device, Qcow2Image):
        raise ConfigError(f"{shown(path)}: only qcow2 images {what}")
    return device


@asynccontextmanager
async def qcow2_to_change(
    path: str,
    what: str,
    *,
    allow_backing: Sequence[str] = (),
    allow_data_file: Sequence[str] = (),
    secrets: "Sequence[Secret]" = (),
) -> AsyncIterator["Qcow2Image"]:
    """Open a qcow2 image as `opened_to_change` does.

    Raises:
        ConfigError: It can't be opened, or is of another format, which can't do `what`.
        ImageError: It is broken or in use.
    """
    await require_qcow2(path, what)
    async with opened_to_change(
        path,
        allow_backing=allow_backing,
        allow_data_file=allow_data_file,
        secrets=secrets,
    ) as device:
        yield as_qcow2(device, path, what)


async def require_qcow2(path: str, what: str) -> None:
    """Refuse a file of another format, which can't do `what`, before it is opened to change.

    Raises:
        ConfigError: Names the format; or there is no such file.
        ImageFormatError: It is of a version that nobody knows.
    """
    from nbdserve.formats.probe import probe_file

    found = await probe_file(path)
    if found == "raw":
        raise ConfigError(
            f"{shown(path)}: has no qcow2 header, and only qcow2 images {what}"
        )
    if found != "qcow2":
        raise ConfigError(f"{shown(path)}: is {found}, and only qcow2 images {what}")


def link_leftovers(path: str, secrets: "Sequence[Secret]" = ()) -> None:
    """Link what a killed server had acknowledged and not linked, if it left a redo log.

    Raises:
        ImageError: It did, and the image can't be opened to do so.
    """
    from nbdserve.app import default_state_dir
    from nbdserve.formats.mapped.redo import redo_path

    folder = default_state_dir(os.environ)
    if folder is None:
        return
    status = os.stat(path)
    if not redo_path(Path(folder), status.st_dev, status.st_ino).exists():
        return

    import asyncio

    async def open_and_close() -> None:
        async with opened_to_change(path, secrets=secrets):
            pass

    try:
        asyncio.run(open_and_close())
    except (ConfigError, ImageError) as error:
        raise ImageError(
            f"a killed server left acknowledged writes that can't be linked: {error};"
            " --force goes on without them"
        ) from error
