"""stdin, stdout and stderr: those that are missing, and those that nobody reads."""

import os
import sys


def open_missing() -> None:
    """Let /dev/null stand for what was closed before we began (`>&-`).

    Whatever is opened next, an image or a socket, would otherwise get its number, and
    what is meant for people would be written there.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def point_to_nowhere(fd: int) -> None:
    """Let what is still buffered for `fd`, and all that follows, go to /dev/null."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, fd)
    os.close(nowhere)


class LogFile:
    """stderr of a server, which goes on when its log can't be written.

    Its reader may have left (`nbdserve serve ... 2>&1 | head`), the disk of a log may
    be full: no reason to take the disks away from their guests.
    """

    def write(self, text: str) -> None:
        """Write some text, if that is possible."""
        try:
            sys.stderr.write(text)
        except OSError as error:
            self._forget(error)

    def flush(self) -> None:
        """Write what is buffered, if that is possible."""
        try:
            sys.stderr.flush()
        except OSError as error:
            self._forget(error)

    @staticmethod
    def _forget(error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            point_to_nowhere(sys.stderr.fileno())
