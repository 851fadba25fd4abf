"""Opening what may hold a disk, a file or a block device, and nothing else.

A path is what somebody typed: it may lead to a FIFO, whose open would wait for ever, or
to a tape, which would be rewound.
"""

import os
import stat
from typing import Final

from nbdserve.errors import ConfigError
from nbdserve.storage.names import shown

_KINDS: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
}


def open_descriptor(path: str | os.PathLike[str], flags: int) -> int:
    """Return a descriptor of a regular file or block device; the caller closes it.

    Args:
        path: Of the file.
        flags: As for `os.open`; it is never inherited.

    Raises:
        ConfigError: There is none, it is something else, or can't be opened.
    """
    name = shown(path) or "''"
    try:
        # Opening some devices has effects, so look before.
        _require_disk(name, os.stat(path))
        # O_NONBLOCK: it may have become a FIFO meanwhile, and opening would hang.
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name
        raise ConfigError(f"{name}: {error}") from error
    try:
        _require_disk(name, os.fstat(fd))
        os.set_blocking(fd, True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _require_disk(name: str, status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode):
        return
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
    raise ConfigError(f"{name}: is {kind}, not a file or block device")
