"""Letting a new file appear whole or not at all.

It is filled under a temporary name in the folder where it will be, made durable, and
then gets its name by a hard link, which never replaces anything. Blocking calls, a
few system calls each.
"""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from nbdserve.errors import NbdserveError
from nbdserve.storage.names import shown

#: What file systems without hard links say (vfat, some FUSE).
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})


def require_new(path: str) -> None:
    """Make sure that nothing has this name.

    Raises:
        FileExistsError: Something has, be it a link that leads nowhere.
        FileNotFoundError: It is empty, which no file can be called.
    """
    if not path:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)


@contextmanager
def temporary_name(path: str) -> Iterator[str]:
    """Give a name to fill a file under; what has it in the end is removed.

    Errors name `path` instead: nobody knows the other one.
    """
    name = f".nbdserve-{secrets.token_hex(8)}.new"
    temporary = os.path.join(os.path.dirname(path), name)
    try:
        yield temporary
    except (NbdserveError, OSError) as error:
        if isinstance(error, OSError) and error.filename == temporary:
            error.filename = path
        error.args = tuple(
            each.replace(shown(temporary), shown(path))
            if isinstance(each, str)
            else each
            for each in error.args
        )
        raise
    finally:
        if os.path.lexists(temporary):
            os.unlink(temporary)


def publish(temporary: str, path: str) -> None:
    """Give a durable file its name, durably; `temporary` may go or stay.

    Raises:
        FileExistsError: The name is taken.
    """
    add_name(temporary, path)
    sync_folder(path)


def add_name(old: str, new: str) -> None:
    """Let a file have a second name; where there are no hard links, it moves.

    Raises:
        FileExistsError: The name is taken.
    """
    try:
        os.link(old, new)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Take the name first, then replace our own file.
        os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
        os.rename(old, new)


def sync_folder(path: str) -> None:
    """Make the names in the folder of `path` durable."""
    folder = os.path.dirname(path) or os.curdir
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
