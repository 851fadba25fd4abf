"""Amending an image file: first what the open image does, then header and refcounts."""

import os
from collections.abc import Sequence

from nbdserve.errors import ConfigError, ImageError
from nbdserve.formats.crypto.secret import Secret
from nbdserve.formats.open import open_image
from nbdserve.formats.qcow2.amend import Amendment, judge_amendment
from nbdserve.formats.qcow2.amend import amend_image as amend_qcow2
from nbdserve.formats.qcow2.image import Qcow2Image
from nbdserve.storage import locks
from nbdserve.storage.descriptors import open_descriptor
from nbdserve.storage.names import shown


async def prepare_to_amend(
    path: str | os.PathLike[str],
    wanted: Amendment,
    *,
    allow_backing: Sequence[str] = (),
    allow_data_file: Sequence[str] = (),
    state_dir: str | None = None,
    secrets: Sequence[Secret] = (),
) -> None:
    """Let an image have nothing that the version wanted does not know.

    Args:
        path: A qcow2 image that nobody else uses.
        wanted: The changes.
        allow_backing: Folders in which backing files may lie.
        allow_data_file: External data files that may be opened, or their folders.
        state_dir: Where a killed server may have left acknowledged writes.
        secrets: Passphrases of encrypted images.

    Raises:
        ConfigError: The choices contradict each other, or it is no qcow2 image.
        ImageError: The image is broken, or can't become that.
        OSError: The file can't be read or written.
    """
    async with open_image(
        path,
        allow_backing=allow_backing,
        allow_data_file=allow_data_file,
        state_dir=state_dir,
        secrets=secrets,
    ) as image:
        if not isinstance(image, Qcow2Image):
            raise ConfigError(f"{shown(path)}: only qcow2 images can be amended")
        judge_amendment(shown(path), image.header, await image.snapshots(), wanted)
        if wanted.version not in (None, image.header.version):
            await image.prepare_version(wanted.version)


def amend_image(path: str | os.PathLike[str], wanted: Amendment) -> None:
    """Change header and refcounts of an image that nobody else uses.

    Raises:
        ConfigError: There is no such file, or the choices contradict each other.
        ImageError: The image is broken or in use, or can't become that.
        OSError: The file can't be read or written.
    """
    fd = open_descriptor(path, os.O_RDWR)
    try:
        locks.take(fd, shown(path), write=True)
        amend_qcow2(fd, shown(path), wanted)
    except ImageError as error:
        if shown(path) in str(error):
            raise
        raise type(error)(f"{shown(path)}: {error}") from error
    finally:
        os.close(fd)
