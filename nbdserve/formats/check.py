"""Checking an image file of any format."""

import os

from nbdserve.block.magics import SECTOR
from nbdserve.errors import ImageError, ImageFormatError
from nbdserve.formats.check_result import CheckResult
from nbdserve.formats.probe import format_of
from nbdserve.formats.qcow1 import check as qcow1
from nbdserve.formats.qcow2 import check as qcow2
from nbdserve.storage.descriptors import open_descriptor
from nbdserve.storage.names import shown


def check_image(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002 - what everybody calls it
) -> CheckResult | None:
    """Check an image file without changing it; it may be in use.

    Args:
        path: The file.
        format: raw, qcow or qcow2; None tells it as `format_of` does.

    Returns:
        What was found; None for raw, which has nothing to check.

    Raises:
        ConfigError: There is no such file, or no permission.
        ImageError: The header is unusable, or not of that format.
        OSError: The file can't be read.
    """
    path = os.fspath(path)
    fd = open_descriptor(path, os.O_RDONLY)
    try:
        if format == "raw":
            return None
        found = format_of(os.pread(fd, SECTOR, 0), shown(path))
        wanted = format or found
        if wanted == "raw":
            return None
        if wanted != found:
            raise ImageFormatError(f"{path}: is {found}, not {wanted}")
        check = qcow1.check_image if found == "qcow" else qcow2.check_image
        try:
            return check(fd, path)
        except ImageError as error:
            raise type(error)(f"{path}: {error}") from error
    finally:
        os.close(fd)
