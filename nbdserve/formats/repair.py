"""Repairing an image file of any format; only qcow2 has counts that can be repaired."""

import os

from nbdserve.errors import ConfigError, ImageError
from nbdserve.formats.qcow2.repair import Agree, Repair
from nbdserve.formats.qcow2.repair import repair_image as repair_qcow2
from nbdserve.storage import locks
from nbdserve.storage.descriptors import open_descriptor
from nbdserve.storage.names import shown


def repair_image(
    path: str | os.PathLike[str], *, everything: bool, agree: Agree
) -> Repair:
    """Repair an image file that nobody else uses.

    Args:
        path: A qcow2 image.
        everything: Whether corruptions are repaired too, or leaks only.
        agree: Asked before anything that can be read, or might be rescued, is lost.

    Raises:
        ConfigError: There is no such file, or it is of another format.
        ImageError: The header is unusable, or the image is in use.
        OSError: The file can't be read or written.
    """
    fd = open_descriptor(path, os.O_RDWR)
    try:
        locks.take(fd, shown(path), write=True)
        start = os.pread(fd, 8, 0)
        if start[:4] != b"QFI\xfb" or start[4:] == b"\0\0\0\1":
            raise ConfigError(f"{shown(path)}: only qcow2 images can be repaired")
        return repair_qcow2(fd, shown(path), everything=everything, agree=agree)
    except ImageError as error:
        if shown(path) in str(error):
            raise
        raise type(error)(f"{shown(path)}: {error}") from error
    finally:
        os.close(fd)
