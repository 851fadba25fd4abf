"""What a worker process does: open images as it is told, and serve the clients it is handed.

Started by `server.workers`, never by a person, with a descriptor as its argument. It ends
when the other end of its channel is closed, be it that the process there has
crashed: what is in flight is answered and every image closed in order.
"""

import asyncio
import resource
import signal
import socket
import sys
from contextlib import suppress
from functools import partial
from typing import Any

import structlog
import uvloop

from nbdserve.errors import ConfigError, ImageError
from nbdserve.exports.access import OPEN
from nbdserve.exports.opening import open_export
from nbdserve.exports.registry import Registry
from nbdserve.observe.logs import configure
from nbdserve.server.channel import (
    Answer,
    Begin,
    Call,
    Channel,
    Facts,
    Gone,
    LetGo,
    Serve,
)
from nbdserve.server.line import Line
from nbdserve.server.negotiation import Chosen
from nbdserve.server.server import Served, Server


def main() -> int:
    """Work until the channel is closed."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # systemd sends them to all processes; what they mean is decided by the first
        signal.signal(number, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return uvloop.run(_Work(socket.socket(fileno=int(sys.argv[1]))).run())


class _Work:
    """A server without listeners, and who tells it what to do."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._server: Server | None = None
        self._connections: dict[int, Served] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Work to the end, and return the exit code."""
        self._loop = asyncio.get_running_loop()
        self._sock.set_inheritable(False)
        stop = asyncio.Event()
        self._channel = Channel(self._loop, self._sock, self._on_message, stop.set)
        await stop.wait()
        await asyncio.gather(*self._tasks)
        try:
            if self._server is not None:
                await self._server.shut_down()
        except (OSError, ImageError):
            return 1  # the server has told it
        return 0

    def _on_message(self, message: object, fds: list[int]) -> None:
        if isinstance(message, Begin):
            configure(message.log_format, message.log_level)
            self._state_dir = message.state_dir
            self._server = Server(Registry(), [], message.limits)
            self._server.start()
        elif isinstance(message, Call):
            task = self._loop.create_task(self._carry_out(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif isinstance(message, Serve):
            if fds:
                self._serve(message, fds[0])
            else:  # the kernel drops those for which there is no room
                self._refuse(message, "no file descriptor left in the worker")
        elif isinstance(message, LetGo):
            connection = self._connections.get(message.number)
            if connection is None:
                return
            if message.at_once:
                connection.abort()
            else:
                connection.shut_down()

    async def _carry_out(self, call: Call) -> None:
        """Do what is asked, and tell the outcome."""
        try:
            answer = Answer(
                call.number, await self._do(call.what, call.name, call.image)
            )
        except (ConfigError, ImageError, OSError) as error:
            answer = Answer(call.number, error=error)
        except Exception as error:  # noqa: BLE001 -- a bug, and somebody waits
            structlog.get_logger().exception(
                "a call failed unexpectedly", export=call.name
            )
            # not itself: what it is made of need not survive the way
            text = f"the export {call.name!r}: {type(error).__name__}: {error}"
            answer = Answer(call.number, error=ImageError(text))
        try:
            self._channel.send(answer)
        except OSError as error:
            if call.what == "open":
                await self._do("close", call.name, None)
            text = f"the export {call.name!r}: the answer of a worker does not fit into"
            failure = ImageError(f"{text} a message: {error.strerror}")
            self._channel.send(Answer(call.number, error=failure))

    async def _do(self, what: str, name: str, image: Any) -> Facts | None:
        server = self._server
        if server is None:
            raise ImageError("the worker was not told to begin")
        if what == "answer":
            return None
        if what == "open":
            export = await open_export(image, OPEN, self._state_dir)
            try:
                server.registry.add(export)
            except ConfigError:
                await export.close()
                raise
            return Facts(export.info(), export.info(read_only=True))
        found = server.registry.get(name)
        if found is None:
            raise ImageError(f"the export {name!r} is not open")
        if what == "flush":
            await found.flush()
        else:
            await server.withdraw(found)
        return None

    def _refuse(self, message: Serve, reason: str) -> None:
        self._channel.send(Gone(message.number, reason, None, {}))

    def _serve(self, message: Serve, fd: int) -> None:
        """Serve a client that has been negotiated with."""
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        export = self._server and self._server.registry.get(message.name)
        if self._server is None or not export:
            sock.close()
            self._refuse(message, "export withdrawn")
            return
        line = Line.handed_over(self._loop, sock, message.client, message.peer)
        chosen = Chosen(export, message.access, message.negotiated, message.leftover)
        log = structlog.get_logger().bind(peer=message.peer, export=export.name)
        connection = self._server.take_over(line, chosen, log)
        self._connections[message.number] = connection
        connection.closed.add_done_callback(
            partial(self._on_closed, message.number, connection)
        )

    def _on_closed(
        self, number: int, connection: Served, closed: asyncio.Future[str]
    ) -> None:
        del self._connections[number]
        blame = None if connection.blame is None else str(connection.blame)
        self._channel.send(Gone(number, closed.result(), blame, connection.story))
