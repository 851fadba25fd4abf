"""Names of other files that an image records: from the bytes of a name to a real path.

Whoever made the image chose the name. It stands for a plain file, after all symbolic
links are resolved; whether that may be opened is for the caller to judge.
"""

import errno
import os
import re

from nbdserve.errors import ImageError
from nbdserve.storage.file import FileStorage
from nbdserve.storage.names import shown

#: qemu takes a name for "protocol:rest" if a colon precedes any slash.
_PROTOCOL = re.compile(rb"[^/:]*:")


def resolve(
    parent: FileStorage, name: bytes, noun: str, refusal: type[ImageError]
) -> bytes:
    """Return the real path that a recorded name stands for.

    A relative name starts at the folder of the image's name as it was given, as in
    qemu: anything else might find another file than the one that qemu wrote.

    Args:
        parent: The image that records it.
        name: As it is recorded.
        noun: What it is to the image, for messages.
        refusal: The class of error to raise.

    Raises:
        ImageError: Of the class `refusal`: it names no file.
    """
    if b"\0" in name:
        raise refusal(
            f"{parent.name}: the name of its {noun} has a NUL byte: {shown(name)}"
        )
    if _PROTOCOL.match(name):
        raise refusal(
            f"{parent.name}: its {noun} {shown(name)} is not a plain file name;"
            " json: and protocol: names are not followed"
        )
    full = os.path.join(os.path.dirname(os.fsencode(parent.path)), name)
    try:
        return os.path.realpath(full, strict=True)
    except OSError as error:
        reason = (
            "its symbolic links form a loop"
            if error.errno == errno.ELOOP
            else os.strerror(error.errno or errno.ENOENT)
        )
        raise refusal(
            f"{parent.name}: its {noun} {shown(full)} can't be opened: {reason}"
        ) from error


def lies_in(path: bytes, folder: bytes) -> bool:
    """Return whether a real path lies below a real folder."""
    return path.startswith(folder.rstrip(b"/") + b"/")
