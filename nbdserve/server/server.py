"""The server: listeners, the clients that they bring, and an orderly end."""

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from contextlib import closing
from functools import partial
from typing import Any, Final, Protocol

import structlog
from structlog.typing import FilteringBoundLogger

from nbdserve.block.device import BlockDevice
from nbdserve.block.dirty_bitmap import DirtyBitmap
from nbdserve.block.layers.absent import Absent
from nbdserve.config.tls import TlsConfig
from nbdserve.errors import ImageError, ProtocolError, RequestError, explain
from nbdserve.exports.access import Access, Client
from nbdserve.exports.closing import close_all
from nbdserve.exports.export import Export
from nbdserve.exports.registry import Registry
from nbdserve.server.budget import Budget
from nbdserve.server.buffers import BufferPool
from nbdserve.server.bulk import Turnstile
from nbdserve.server.busy_poll import BusyPoll
from nbdserve.server.connection import RECEIVE_ARENA, Connection
from nbdserve.server.intake import Pipe
from nbdserve.server.limits import Limits
from nbdserve.server.line import Line
from nbdserve.server.listeners import Endpoint, Listener
from nbdserve.server.lobby import Lobby
from nbdserve.server.negotiation import Chosen, negotiate
from nbdserve.server.notify import (
    feed_watchdog,
    notify_ready,
    notify_stopping,
    watchdog_interval_s,
)
from nbdserve.server.outbox import REPLY_ARENA, Arena
from nbdserve.server.shared import Shared
from nbdserve.server.tls import TlsCredentials
from nbdserve.wire.handshake import HandshakeLimits, ServerHandshake

#: Clients accepted in one go, 20 us each; the loop comes back for more, and others have
#: their turn in between.
_ACCEPTED_PER_TURN: Final = 2
#: How long to wait when there are no file descriptors left.
_ACCEPT_PAUSE_S: Final = 0.2
#: The most between two looks for clients that hold memory and do nothing with it.
_MOST_BETWEEN_LOOKS_S: Final = 5.0
#: Of Unix sockets: some large replies, so that what is lent need not be copied because the
#: socket is full: 1 MiB reads at depth 8 are 1.2 times as many as with half of it, for 140 us
#: of CPU instead of 190 (Linux counts about twice the data, and net.core.wmem_max, 208 KiB by
#: default, is the most it allows). TCP finds its own.
_UNIX_BUFFER: Final = 2 << 20
#: Probes of keepalive that stay unanswered before a peer counts as gone.
_PROBES: Final = 6
_OUT_OF_RESOURCES: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
)


class Served(Protocol):
    """What serves one client that has chosen its export.

    Attributes:
        closed: Done when everything is over; the result says why it ended.
        blame: The error of the client that ended it, if it was one.
    """

    closed: asyncio.Future[str]
    blame: ProtocolError | None

    @property
    def in_flight(self) -> int:
        """How many requests wait."""

    @property
    def story(self) -> dict[str, int]:
        """What was done, by name."""

    def start(self, leftover: bytes) -> None:
        """Begin with what came behind the handshake."""

    def shut_down(self) -> None:
        """Refuse new requests, answer those in flight, then close."""

    def abort(self) -> None:
        """Close at once."""

    def end_if_stalled(self) -> None:
        """Close if the client makes the server hold memory, and moves nothing."""


class Server:
    """Serves the exports of a registry on some listeners, in one loop.

        server = Server(registry, listeners)
        server.start()
        await server.serve_until(stop)

    Attributes:
        registry: The exports. `serve_until` closes their devices in the end.
        listeners: Where clients come from.
        on_last_client_gone: Called each time nobody is connected any more after a
            client that had chosen an export.
        on_end: Awaited when the end begins, with all disks still open.
    """

    on_last_client_gone: Callable[[], None] | None = None
    on_end: Callable[[], Awaitable[None]] | None = None

    def __init__(
        self,
        registry: Registry,
        listeners: Iterable[Listener],
        limits: Limits | None = None,
        credentials: TlsCredentials | None = None,
        *,
        at_once: int | None = None,
    ) -> None:
        """Begin nothing yet; whoever exceeds `at_once` waits in the backlog."""
        self.registry = registry
        self.listeners = list(listeners)
        self._limits = limits or Limits()
        self._log = structlog.get_logger()
        self._pool = BufferPool(self._limits.idle_buffer_bytes)
        self._clients: set[asyncio.Task[Any]] = set()
        self._handshakes: dict[ServerHandshake, asyncio.Task[None]] = {}
        self._credentials = credentials or TlsCredentials(TlsConfig())
        self._connections: dict[Served, tuple[Chosen, Client]] = {}
        self._stopping = False
        self._at_once = at_once
        self._full = False  # somebody was refused since the last one was let in

    @property
    def endpoints(self) -> list[Endpoint]:
        """Where clients find the server."""
        return [listener.endpoint for listener in self.listeners]

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._clients) + len(self._lobby)

    @property
    def stopping(self) -> bool:
        """Whether the end has begun."""
        return self._stopping

    def start(self) -> None:
        """Begin to accept clients; call it in the running loop."""
        self._loop = asyncio.get_running_loop()
        self._shared = Shared(
            self._limits,
            incoming=Arena(self._pool, RECEIVE_ARENA),
            outgoing=Arena(self._pool, REPLY_ARENA),
            budget=Budget(self._limits.total_bytes_in_flight),
            turnstile=Turnstile(self._loop),
            pipe=Pipe(),
            busy_poll=BusyPoll(self._loop, self._limits.busy_poll_s),
        )
        self._lobby = Lobby(
            self._loop,
            self._limits.handshake_timeout_s,
            partial(self._negotiate_with, greeted=True),
            self._accept_again,
        )
        for listener in self.listeners:
            self._accept_from(listener)
        self._look_for_stalled()

    async def serve_until(self, stop: asyncio.Event) -> None:
        """Serve, tell systemd about it, and shut down once `stop` is set."""
        watchdog = None
        interval_s = watchdog_interval_s()
        if interval_s is not None:
            watchdog = asyncio.create_task(feed_watchdog(interval_s))
        try:
            notify_ready(f"Serving {len(self.registry)} export(s)")
            await stop.wait()
            notify_stopping()
            await self.shut_down()
        finally:
            if watchdog is not None:
                watchdog.cancel()

    # Clients come

    def _accept_from(self, listener: Listener) -> None:
        if not self._stopping and not self._enough():
            self._loop.add_reader(listener.sock.fileno(), self._on_client, listener)

    def _on_client(self, listener: Listener) -> None:
        """Accept who has connected."""
        for _ in range(_ACCEPTED_PER_TURN):
            if self._enough():
                for each in self.listeners:
                    self._loop.remove_reader(each.sock.fileno())
                return
            try:
                sock, address = listener.sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _OUT_OF_RESOURCES:
                    # accept(2): errors of the network that hit this one client
                    self._log.debug("a client was lost", error=error.strerror)
                    return
                self._log.warning("cannot accept a client", error=error.strerror)
                self._make_room()
                self._loop.remove_reader(listener.sock.fileno())
                self._loop.call_later(_ACCEPT_PAUSE_S, self._accept_from, listener)
                return
            if self.connections >= self._limits.connections and not self._make_room():
                if not self._full:
                    self._full = True  # once: whoever knocks could fill the log
                    self._log.warning(
                        "too many clients, one is refused",
                        limit=self._limits.connections,
                    )
                sock.close()
                continue
            self._full = False
            sock.setblocking(False)
            self._lobby.admit(sock, address)

    def welcome(self, sock: socket.socket, address: Any) -> asyncio.Task[None]:
        """Serve the client of a connected socket, which is closed in the end.

        Returns:
            Done when the client is gone.
        """
        sock.setblocking(False)
        deadline_s = self._loop.time() + self._limits.handshake_timeout_s
        return self._negotiate_with(sock, address, deadline_s)

    def _negotiate_with(
        self,
        sock: socket.socket,
        address: Any,
        deadline_s: float,
        *,
        greeted: bool = False,
    ) -> asyncio.Task[None]:
        """Begin the handshake."""
        handshake = ServerHandshake(
            tls=self._credentials.mode,
            limits=HandshakeLimits(options=self._limits.options),
            greeted=greeted,
        )
        line = Line(self._loop, sock, address)
        client = self._loop.create_task(
            self._serve_client(sock, line, handshake, deadline_s)
        )
        self._handshakes[handshake] = client
        self._clients.add(client)
        client.add_done_callback(partial(self._on_client_gone, handshake, line))
        return client

    def _enough(self) -> bool:
        """Tell whether who comes now has to wait until somebody has gone."""
        return self._at_once is not None and self.connections >= self._at_once

    def _on_client_gone(
        self, handshake: ServerHandshake, line: Line, client: asyncio.Task[None]
    ) -> None:
        # a task that was cancelled before its first step has not done these
        self._handshakes.pop(handshake, None)
        line.close()
        self._clients.discard(client)
        self._accept_again()

    def _accept_again(self) -> None:
        """Let somebody in who had to wait."""
        if self._at_once is not None:
            for listener in self.listeners:
                self._accept_from(listener)

    def _make_room(self) -> bool:
        """Let go of the client that has been silent, or in its handshake, for longest.

        Most handshakes take milliseconds. So whoever holds connections open without a
        word can't keep anybody out.

        Returns:
            Whether there was one.
        """
        if self._lobby.drop_oldest():
            return True
        if not self._handshakes:
            return False
        oldest = next(iter(self._handshakes))
        self._handshakes.pop(oldest).cancel()
        return True

    def _look_for_stalled(self) -> None:
        """End connections that hold memory and do nothing with it, now and then."""
        if self._stopping:
            return
        for connection in list(self._connections):
            connection.end_if_stalled()
        self._loop.call_later(
            min(
                _MOST_BETWEEN_LOOKS_S,
                self._limits.stall_timeout_s / 4,
                self._limits.idle_timeout_s / 4,
            ),
            self._look_for_stalled,
        )

    async def _serve_client(
        self,
        sock: socket.socket,
        line: Line,
        handshake: ServerHandshake,
        deadline_s: float,
    ) -> None:
        """See a client through from its handshake to its end."""
        log = self._log.bind(peer=line.peer)
        with closing(line):
            try:
                _tune(sock, self._limits.keepalive_s)
                async with asyncio.timeout_at(deadline_s):
                    outcome = await negotiate(
                        line,
                        handshake,
                        self.registry,
                        self._credentials,
                        self._limits.connections_per_export,
                    )
            except TimeoutError:
                log.info("handshake took too long")
                return
            except ProtocolError as error:
                log.info("handshake failed", reason=str(error))
                return
            except OSError as error:
                # port scans, nbd-client's probes: nothing is wrong with us
                log.debug("handshake abandoned", reason=error.strerror)
                return
            finally:
                self._handshakes.pop(handshake, None)
            if isinstance(outcome, Chosen):
                await self._transmit(line, outcome, log.bind(**line.security))
            else:
                log.debug("handshake ended", reason=outcome)

    async def _transmit(
        self, line: Line, chosen: Chosen, log: FilteringBoundLogger
    ) -> None:
        """Serve a client that has chosen its export, and tell its story."""
        started_s = self._loop.time()
        log = log.bind(export=chosen.export.name)
        if not _still_right(chosen, line.client):
            log.info("the export was withdrawn while it was being chosen")
            return
        connection = self._connect(line, chosen, log)
        log.info("connection opened")
        reason = await self._see_through(connection, chosen, line.client)
        tell = log.info if connection.blame is None else log.warning
        tell(
            "connection closed",
            **connection.story,
            duration_s=round(self._loop.time() - started_s, 3),
            reason=reason,
        )

    def _connect(self, line: Line, chosen: Chosen, log: FilteringBoundLogger) -> Served:
        """Make what serves a client; the front of several workers has another one."""
        return Connection(
            self._loop, line.sock, chosen.export, chosen.negotiated, self._shared, log
        )

    async def _see_through(
        self, connection: Served, chosen: Chosen, client: Client
    ) -> str:
        """Serve until the end, and return its reason."""
        self._connections[connection] = (chosen, client)
        chosen.export.clients += 1
        try:
            connection.start(chosen.leftover)
            if self._stopping:
                connection.shut_down()
            reason: str = await connection.closed
        finally:
            chosen.export.clients -= 1
            del self._connections[connection]
            if self.connections == 1 and self.on_last_client_gone is not None:
                self.on_last_client_gone()
        return reason

    def take_over(
        self, line: Line, chosen: Chosen, log: FilteringBoundLogger
    ) -> Served:
        """Serve a client with whom another process has negotiated.

        Returns:
            What serves it; the socket is closed in the end.
        """
        connection = self._connect(line, chosen, log)
        client = self._loop.create_task(
            self._see_through(connection, chosen, line.client)
        )
        self._clients.add(client)
        client.add_done_callback(self._clients.discard)
        return connection

    # Exports go

    async def withdraw(self, export: Export) -> None:
        """Offer an export no longer, let its clients go, and close its disk.

        Raises:
            OSError: The image could not be made durable.
            ImageError: The same, found by its engine.
        """
        self.registry.remove(export)
        await self.recheck(export)
        failures = await close_all([export], self._limits.close_timeout_s)
        if failures:
            raise failures[export]

    async def exchange_disk(
        self,
        export: Export,
        open_disk: Callable[[], Awaitable[tuple[BlockDevice, Iterable[DirtyBitmap]]]],
    ) -> None:
        """Close the disk of an export and open it anew, while its clients wait.

        What they ask for meanwhile is answered by the new disk. If there is none, all of it is
        answered with an error, until another exchange succeeds.

        Args:
            export: Whose disk; `change` is held.
            open_disk: Opens the new one, and finds its own bitmaps.

        Raises:
            RequestError: EBUSY, requests that are under way do not end: nothing changed.
            ConfigError: There is no such disk any more.
            ImageError: It can't be used.
            OSError: It can't be read.
        """
        old = export.disk
        between = Absent(old)
        self._put(export, between)
        deadline_s = self._limits.drain_timeout_s
        # payloads arrive meanwhile, but a client that stays silent must not keep the disk
        patience = self._loop.call_later(deadline_s / 2, self._end_on_old_disk, export)
        try:
            async with asyncio.timeout(deadline_s):
                for connection in list(self._connections_of(export)):
                    await connection.session.left_old()
        except TimeoutError:
            self._put(export, old)
            between.end(old)
            raise RequestError(
                errno.EBUSY,
                f"requests have not ended for {deadline_s:g} s; the disk stays open",
            ) from None
        finally:
            patience.cancel()
        await self._close_failed(export, old)
        try:
            new, bitmaps = await open_disk()
        except BaseException as error:
            between.fail(error)
            raise
        self._put(export, new, bitmaps)
        between.end(new)

    def _put(
        self,
        export: Export,
        device: BlockDevice,
        bitmaps: Iterable[DirtyBitmap] | None = None,
    ) -> None:
        export.put(device, bitmaps)
        for connection in self._connections_of(export):
            connection.session.attach(export)

    def _end_on_old_disk(self, export: Export) -> None:
        for connection in list(self._connections_of(export)):
            connection.end_if_on_old_disk()

    def _connections_of(self, export: Export) -> Iterator[Connection]:
        for connection, (chosen, _) in self._connections.items():
            if chosen.export is export and isinstance(connection, Connection):
                yield connection

    async def _close_failed(self, export: Export, device: BlockDevice) -> None:
        """Close a disk of which clients know already that it has failed."""
        try:
            await device.close()
        except (OSError, ImageError) as error:
            self._log.warning(
                "closed with an error, to be opened anew",
                export=export.name,
                error=explain(error),
            )

    async def recheck(self, export: Export) -> None:
        """Let those clients of an export go that were told something else about it."""
        leaving = [
            connection
            for connection, (chosen, client) in self._connections.items()
            if chosen.export is export and not _still_right(chosen, client)
        ]
        await self._let_go(leaving)

    async def _let_go(self, connections: Collection[Served]) -> None:
        """Answer what is in flight, then close; at once after a deadline."""
        for connection in connections:
            connection.shut_down()
        if connections:
            closed = [connection.closed for connection in connections]
            await asyncio.wait(closed, timeout=self._limits.drain_timeout_s)
        for connection in connections:
            if not connection.closed.done():
                self._log.warning(
                    "gave up on requests in flight",
                    requests=connection.in_flight,
                )
                connection.abort()

    # The end

    async def shut_down(self) -> None:
        """Stop in phases, each with a deadline.

        1. No new clients; options get NBD_REP_ERR_SHUTDOWN.
        2. Requests in flight are answered, later ones get NBD_ESHUTDOWN, and clients
           are let go.
        3. Every device is flushed and closed.

        Raises:
            OSError: An image could not be made durable.
            ImageError: The same, found by its engine.
        """
        if self._stopping:
            return
        self._stopping = True
        self._refuse_clients()
        if self.on_end is not None:
            await self.on_end()
        await self._let_clients_go()
        await self._close_devices()

    def _refuse_clients(self) -> None:
        for listener in self.listeners:
            self._loop.remove_reader(listener.sock.fileno())
            listener.close()
        self._lobby.close()
        for handshake in self._handshakes:
            handshake.shut_down()

    async def _let_clients_go(self) -> None:
        """Wait for clients, first politely."""
        await self._let_go(list(self._connections))
        if self._handshakes:
            # a client in the middle of an option may still read why it is refused
            await asyncio.wait(self._handshakes.values(), timeout=self._limits.linger_s)
        for client in list(self._handshakes.values()):
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        self._shared.incoming.close()
        self._shared.outgoing.close()
        self._shared.pipe.close()

    async def _close_devices(self) -> None:
        """Close every device, also after one has failed."""
        failures = await close_all(self.registry, self._limits.close_timeout_s)
        for export, error in failures.items():
            self._log.error(
                "could not close an image cleanly",
                export=export.name,
                error=explain(error) or type(error).__name__,
            )
        if failures:
            raise next(iter(failures.values()))


def _tune(sock: socket.socket, keepalive_s: float) -> None:
    """Set what makes small requests quick, and lost peers noticed."""
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER)
        return
    if sock.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, max(round(keepalive_s), 1)),
        (socket.TCP_KEEPINTVL, max(round(keepalive_s / _PROBES), 1)),
        (socket.TCP_KEEPCNT, _PROBES),
        # no probes are sent while replies are not acknowledged: the same limit for those
        (socket.TCP_USER_TIMEOUT, round(2000 * keepalive_s)),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _still_right(chosen: Chosen, client: Client) -> bool:
    """Tell whether what a client was told of its export is still true."""
    export = chosen.export
    access: Access = export.policy.access_of(client)
    return not export.retired and access is chosen.access
