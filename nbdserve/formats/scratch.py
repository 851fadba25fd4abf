"""An overlay that is forgotten when it is closed: what is written never reaches the image."""

import os
import tempfile
from collections.abc import Sequence

from nbdserve.block.device import BlockDevice
from nbdserve.formats.create import create_image
from nbdserve.formats.crypto.secret import Secret
from nbdserve.formats.open import open_image
from nbdserve.formats.probe import probe_file
from nbdserve.storage.executor import run


async def open_scratch(
    path: str | os.PathLike[str],
    folder: str,
    *,
    format: str = "auto",  # noqa: A002 -- as in `open_image`
    allow_backing: Sequence[str | os.PathLike[str]] = (),
    allow_data_file: Sequence[str | os.PathLike[str]] = (),
    secrets: Sequence[Secret] = (),
) -> BlockDevice:
    """Open a temporary overlay of an image, which is not changed.

    Args:
        path: The image.
        folder: Where there is room for what is written.
        format: See `open_image`; raw as well for what has no magic.
        allow_backing: See `open_image`.
        allow_data_file: See `open_image`.
        secrets: See `open_image`. The overlay is not encrypted.

    Raises:
        ConfigError: There is no such file, or no overlay can be made.
        ImageError: It is no such image, is broken or in use.
    """
    image = await run(os.path.realpath, path)
    if format == "auto":
        format = await probe_file(image)  # noqa: A001
    below = (os.path.dirname(image), *allow_backing)
    async with open_image(
        image,
        format=format,
        read_only=True,
        allow_backing=below,
        allow_data_file=allow_data_file,
        secrets=secrets,
    ) as base:
        size = base.size
    with tempfile.TemporaryDirectory(dir=folder, prefix="nbdserve-") as scratch:
        overlay = os.path.join(scratch, "overlay.qcow2")
        await run(
            lambda: create_image(overlay, size, backing=image, backing_format=format)
        )
        # open files outlive their names, and nobody finds them any more
        return await open_image(
            overlay,
            format="qcow2",
            allow_backing=below,
            allow_data_file=allow_data_file,
            secrets=secrets,
        )
