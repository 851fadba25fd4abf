"""`nbdserve image`: make, describe and check image files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from nbdserve.errors import ImageError
from nbdserve.storage.names import shown


@contextmanager
def named_errors(path: str) -> Iterator[None]:
    """Put the image's name into an error of the system that lacks it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise ImageError(f"{shown(path)}: {os.strerror(error.errno)}") from error
