"""Messages between the process that accepts clients and its workers.

Each message is one record of a SOCK_SEQPACKET pair, perhaps with a file descriptor beside it
(SCM_RIGHTS of unix(7)). Both ends are ours: the pair has no name, and only the worker
inherits it, so that pickle meets nothing but what it has made itself.
"""

import asyncio
import errno
import os
import pickle
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from nbdserve.exports.access import Access, Client
from nbdserve.server.limits import Limits
from nbdserve.wire.handshake import ExportInfo, Negotiated

#: The kernel allows about 200 KiB. Most messages are small: the largest is a `Serve` with what
#: a client has sent beyond its handshake, at most 16 KiB, and the names of its contexts.
_LARGEST: Final = 1 << 18
#: What the kernel needs of a send buffer for itself (unix_dgram_sendmsg).
_OVERHEAD: Final = 32


@dataclass(frozen=True, slots=True)
class Begin:
    """To a worker, first: how to work.

    Attributes:
        limits: Of clients; those of bytes are for each worker.
        state_dir: Where redo records go.
        log_format: As in `observe.logs`.
        log_level: The same.
    """

    limits: Limits
    state_dir: str | None
    log_format: Any
    log_level: str


@dataclass(frozen=True, slots=True)
class Call:
    """To a worker: open (with the configuration of an image), flush or close an export.

    Or only answer.
    """

    number: int
    what: str
    name: str
    image: Any = None


@dataclass(frozen=True, slots=True)
class Answer:
    """From a worker: the outcome of a call, or the error to be raised."""

    number: int
    outcome: "Facts | None" = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What a worker says of an export that it has opened."""

    read_write: ExportInfo
    read_only: ExportInfo


@dataclass(frozen=True, slots=True)
class Serve:
    """To a worker, with a socket: a client that has chosen one of its exports."""

    number: int
    name: str
    access: Access
    negotiated: Negotiated
    leftover: bytes
    client: Client
    peer: str


@dataclass(frozen=True, slots=True)
class LetGo:
    """To a worker: end the connection of a client, politely or at once."""

    number: int
    at_once: bool = False


@dataclass(frozen=True, slots=True)
class Gone:
    """From a worker: a client is gone."""

    number: int
    reason: str
    blame: str | None
    story: dict[str, int]


class Channel:
    """One end of the pair."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        on_message: Callable[[Any, list[int]], None],
        on_end: Callable[[], None],
    ) -> None:
        """Take over a socket, and begin to receive.

        Args:
            loop: The running loop.
            sock: One of `socketpair(AF_UNIX, SOCK_SEQPACKET)`.
            on_message: Called with each message, and descriptors that the callee owns.
            on_end: Called once, when the other end is gone.
        """
        sock.setblocking(False)
        self._loop = loop
        self._sock = sock
        self._on_message = on_message
        self._on_end = on_end
        self._queue: deque[tuple[bytes, int | None]] = deque()
        self._open = True
        room = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) - _OVERHEAD
        self._largest = min(room, _LARGEST)
        loop.add_reader(sock.fileno(), self._receive)

    def send(self, message: object, fd: int | None = None) -> None:
        """Send a message; a duplicate of `fd` goes with it, so it may be closed at once.

        Raises:
            OSError: There is no descriptor for the duplicate, or the message is too long;
                nothing was sent.
        """
        if not self._open:
            return
        data = pickle.dumps(message)
        if len(data) > self._largest:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        kept = None if fd is None else os.dup(fd)
        self._queue.append((data, kept))
        if len(self._queue) == 1:
            self._send()

    def _send(self) -> None:
        while self._queue:
            data, fd = self._queue[0]
            try:
                socket.send_fds(self._sock, [data], [] if fd is None else [fd])
            except (BlockingIOError, InterruptedError):
                self._loop.add_writer(self._sock.fileno(), self._send)
                return
            except OSError:
                self.close()
                self._loop.call_soon(self._on_end)
                return
            self._queue.popleft()
            if fd is not None:
                os.close(fd)
        self._loop.remove_writer(self._sock.fileno())

    def _receive(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(
                self._sock, _LARGEST, 1, socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, fds = b"", []
        if data:
            self._on_message(pickle.loads(data), list(fds))  # noqa: S301 -- our own
        elif self._open:
            self.close()
            self._on_end()

    def close(self) -> None:
        """Close this end."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()
            while self._queue:
                _, fd = self._queue.popleft()
                if fd is not None:
                    os.close(fd)
