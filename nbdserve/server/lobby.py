"""Connections whose client has said nothing yet: greeted, and otherwise left alone.

A handshake is a task, a state machine and a timer, 100 us and 6 KiB in all. Whoever opens
thousands of connections and is silent must not make the server spend that on each of
them while others wait. In here one costs a system call or two, and its socket.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

from nbdserve.wire.handshake import GREETING


class Lobby:
    """Waits for the first word of each client.

    Attributes:
        on_word: Called with socket, address and deadline (in loop time) of a
            client that has said something; the socket is then the callee's.
        on_leave: Called when a client has gone by itself, or was silent for too long.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        patience_s: float,
        on_word: Callable[[socket.socket, Any, float], object],
        on_leave: Callable[[], object],
    ) -> None:
        """Begin empty; `patience_s` is how long a client may be silent."""
        self._loop = loop
        self._patience_s = patience_s
        self._on_word = on_word
        self._on_leave = on_leave
        # in the order of their coming, so the first has waited for longest
        self._waiting: dict[socket.socket, tuple[Any, float]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """How many there are."""
        return len(self._waiting)

    def admit(self, sock: socket.socket, address: Any) -> None:
        """Greet a client, and wait for its answer.

        Args:
            sock: Not blocking, and closed if nothing comes of it.
            address: As accept() returned it.
        """
        try:
            # 18 bytes fit the empty buffer of any socket
            sock.send(GREETING)
        except OSError:
            sock.close()  # gone already
            return
        self._waiting[sock] = address, self._loop.time() + self._patience_s
        self._loop.add_reader(sock.fileno(), self._hear, sock)
        if self._timer is None:
            self._timer = self._loop.call_later(self._patience_s, self._end_silent)

    def drop_oldest(self) -> bool:
        """Close the connection of the client that has been silent for longest.

        Returns:
            Whether there was one.
        """
        if not self._waiting:
            return False
        self._close(next(iter(self._waiting)))
        return True

    def close(self) -> None:
        """Close all connections."""
        while self.drop_oldest():
            pass
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _hear(self, sock: socket.socket) -> None:
        try:
            word = sock.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            word = b""
        if not word:  # a probe, or a port scan
            self._close(sock)
            self._on_leave()
            return
        self._loop.remove_reader(sock.fileno())
        address, deadline_s = self._waiting.pop(sock)
        self._on_word(sock, address, deadline_s)

    def _end_silent(self) -> None:
        """Close those whose time is over, and come back for the next one."""
        self._timer = None
        now_s = self._loop.time()
        while self._waiting:
            sock, (_, deadline_s) = next(iter(self._waiting.items()))
            if deadline_s > now_s:
                self._timer = self._loop.call_at(deadline_s, self._end_silent)
                return
            self._close(sock)
            self._on_leave()

    def _close(self, sock: socket.socket) -> None:
        del self._waiting[sock]
        self._loop.remove_reader(sock.fileno())
        sock.close()
