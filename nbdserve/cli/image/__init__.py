"""`nbdserve image`: make, describe and check image files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from nbdserve.errors import ConfigError, ImageError
from nbdserve.storage.names import shown


@contextmanager
def named_errors(path: str, *, or_uri: bool = False) -> Iterator[None]:
    """Put the image's name into an error of the system that lacks it.

    Args:
        path: The image.
        or_uri: Whether the command takes NBD URIs as well.

    Raises:
        ConfigError: It is a URI, and the command takes none.
    """
    from nbdserve.cli.image.disks import is_uri

    if is_uri(path) and not or_uri and not os.path.lexists(path):
        raise ConfigError(
            f"{shown(path)}: is an NBD URI, and this command takes image files only;"
            " 'nbdserve list' describes exports, 'nbdserve image convert' copies them"
        )
    try:
        yield
    except BrokenPipeError:
        raise  # of what we print: images are no pipes
    except OSError as error:
        if error.filename is not None or error.strerror is None:
            raise
        raise ImageError(f"{shown(path)}: {error.strerror}") from error
