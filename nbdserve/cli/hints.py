"""What to do about an error, in words that only the command line has."""

from collections.abc import Iterator
from contextlib import contextmanager

from nbdserve.errors import ForeignFormatError


@contextmanager
def raw_option(option: str) -> Iterator[None]:
    """Say which option takes a file as raw that looks like another format.

    Args:
        option: It, such as `--format raw`.
    """
    try:
        yield
    except ForeignFormatError as error:
        raise ForeignFormatError(
            f"{error}, or add {option} to take it as it is"
        ) from None
