"""Locks on image files that qemu's tools understand.

Two writers destroy an image, so qemu locks single bytes of it by open file
description locks (block/file-posix.c there), and so do we:

- byte 100 + p: somebody uses permission p;
- byte 200 + p: somebody does not share permission p with others.

All locks are shared ones (F_RDLCK), so that any number of processes can say the same.
A process first takes its own, then asks (F_OFD_GETLK) whether anybody holds the
opposite byte of one of them.

The locks belong to the open file description: closing it gives them up, however the
process ends.
"""

import errno
import fcntl
import os
import struct

from nbdserve.errors import ConfigError, ImageInUseError

PERMISSION_BASE = 100
UNSHARED_BASE = 200

#: Permissions of a block node in qemu, as bit numbers.
CONSISTENT_READ = 0
WRITE = 1
RESIZE = 3

_VERBS = {CONSISTENT_READ: "reading", WRITE: "writing", RESIZE: "resizing"}

#: struct flock: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi4x")


def take(fd: int, name: str, *, write: bool) -> None:
    """Lock an open image until `fd` is closed.

    Readers share with readers. A writer shares with nobody who relies on the content,
    and nobody who reads consistently shares with a writer.

    Args:
        fd: An open descriptor.
        name: What to call the image in the error.
        write: Whether it will be changed.

    Raises:
        ImageInUseError: Another process excludes this.
        ConfigError: This file system has no locks.
    """
    used = (CONSISTENT_READ, WRITE, RESIZE) if write else (CONSISTENT_READ,)
    unshared = (WRITE, RESIZE)
    try:
        for permission in used:
            _lock(fd, PERMISSION_BASE + permission)
        for permission in unshared:
            _lock(fd, UNSHARED_BASE + permission)
        for permission in used:
            if _held_elsewhere(fd, UNSHARED_BASE + permission):
                raise ImageInUseError(
                    f"{name}: in use by another process that excludes"
                    f" {_VERBS[permission]}"
                )
        for permission in unshared:
            if _held_elsewhere(fd, PERMISSION_BASE + permission):
                raise ImageInUseError(
                    f"{name}: in use by another process that is {_VERBS[permission]} it"
                )
    except OSError as error:
        if error.errno in {errno.EAGAIN, errno.EACCES}:
            raise ImageInUseError(f"{name}: locked by another process") from error
        raise ConfigError(
            f"{name}: can't be locked: {os.strerror(error.errno or errno.EIO)}"
        ) from error


def _lock(fd: int, byte: int) -> None:
    request = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)


def _held_elsewhere(fd: int, byte: int) -> bool:
    """Whether another open file description holds any lock on `byte`."""
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
