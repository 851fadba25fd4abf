"""An asyncio client over the client role of `nbdserve.wire`, strict about replies."""

import asyncio
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from nbdserve.errors import ProtocolError
from nbdserve.wire.client_handshake import (
    ClientHandshake,
    ExportDetails,
    Outcome,
    contexts_data,
    info_data,
)
from nbdserve.wire.client_transmission import ClientTransmission, Reply
from nbdserve.wire.constants import (
    BASE_ALLOCATION,
    Command,
    CommandFlag,
    Info,
    NbdError,
    Option,
)

_RECEIVE = 1 << 20


class NbdRequestFailed(Exception):  # noqa: N818
    """The server answered a request with an error."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(f"error {reply.error}: {reply.text}")
        self.error = reply.error
        self.text = reply.text
        self.reply = reply


@dataclass
class _Connected:
    details: ExportDetails
    transmission: ClientTransmission


class NbdClient:
    """One connection. Every method waits for its reply; run several in tasks to pipeline.

    async with await NbdClient.connect_unix(path) as client:
        await client.go("disk")
        await client.write(0, b"x" * 512)
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.handshake = ClientHandshake()
        self._connected: _Connected | None = None
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._receiver: asyncio.Task[None] | None = None
        self._send_lock = asyncio.Lock()

    @classmethod
    async def connect_unix(cls, path: str | Path) -> Self:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        await _connect(sock, str(path))
        return cls(sock)

    @classmethod
    async def connect_tcp(cls, host: str, port: int) -> Self:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        await _connect(sock, (host, port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(sock)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    # Handshake

    async def option(self, option: int, data: bytes = b"") -> Outcome:
        """Ask one option; raises OptionRefused."""
        self.handshake.ask(option, data)
        while True:
            outcome = self.handshake.outcome()
            if outcome is not None:
                return outcome
            await self._send_raw(self.handshake.data_to_send())
            self.handshake.feed(await self._receive_raw())

    async def list_exports(self) -> list[tuple[str, str]]:
        return (await self.option(Option.LIST)).exports

    async def info(self, name: str = "") -> ExportDetails:
        outcome = await self.option(
            Option.INFO, info_data(name, (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE))
        )
        assert outcome.details is not None
        return outcome.details

    async def go(
        self,
        name: str = "",
        *,
        structured: bool = True,
        extended: bool = False,
        contexts: Iterable[str] = (BASE_ALLOCATION,),
    ) -> ExportDetails:
        """Choose an export, and begin the transmission phase."""
        if extended and not self.handshake.extended:
            await self.option(Option.EXTENDED_HEADERS)
        elif structured and not self.handshake.structured:
            await self.option(Option.STRUCTURED_REPLY)
        wanted = list(contexts)
        if structured and wanted:
            await self.option(Option.SET_META_CONTEXT, contexts_data(name, wanted))
        outcome = await self.option(
            Option.GO, info_data(name, (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE))
        )
        assert outcome.details is not None
        await self._send_raw(self.handshake.data_to_send())
        transmission = ClientTransmission(
            structured=self.handshake.structured,
            extended=self.handshake.extended,
            context_ids=[context.context_id for context in self.handshake.contexts],
        )
        transmission.feed(self.handshake.leftover())
        self._connected = _Connected(outcome.details, transmission)
        self._receiver = asyncio.create_task(self._receive_replies())
        return outcome.details

    @property
    def details(self) -> ExportDetails:
        assert self._connected is not None
        return self._connected.details

    @property
    def transmission(self) -> ClientTransmission:
        """The codec itself: queue requests in it, then `send_queued`."""
        assert self._connected is not None
        return self._connected.transmission

    # Requests

    async def read(self, offset: int, length: int, *, flags: int = 0) -> bytes:
        return bytes((await self.read_reply(offset, length, flags=flags)).data)

    async def read_reply(self, offset: int, length: int, *, flags: int = 0) -> Reply:
        return await self._ask(self.transmission.read(offset, length, flags=flags))

    async def write(
        self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False
    ) -> None:
        flags = CommandFlag.FUA if fua else 0
        await self._ask(self.transmission.write(offset, data, flags=flags))

    async def flush(self) -> None:
        await self._ask(self.transmission.flush())

    async def trim(self, offset: int, length: int, *, flags: int = 0) -> None:
        await self._ask(self.transmission.trim(offset, length, flags=flags))

    async def cache(self, offset: int, length: int) -> None:
        await self._ask(self.transmission.cache(offset, length))

    async def write_zeroes(self, offset: int, length: int, *, flags: int = 0) -> None:
        await self._ask(self.transmission.write_zeroes(offset, length, flags=flags))

    async def block_status(
        self, offset: int, length: int, *, flags: int = 0
    ) -> list[tuple[int, int]]:
        """Return the extents of the first selected context."""
        statuses = await self.block_statuses(offset, length, flags=flags)
        return next(iter(statuses.values()))

    async def block_statuses(
        self,
        offset: int,
        length: int,
        *,
        flags: int = 0,
        contexts: Iterable[str] | None = None,
    ) -> dict[str, list[tuple[int, int]]]:
        """Return the extents by the names of the selected contexts, or only some of them."""
        ids = {context.name: context.context_id for context in self.handshake.contexts}
        cookie = self.transmission.block_status(
            offset,
            length,
            flags=flags,
            context_ids=None if contexts is None else [ids[name] for name in contexts],
        )
        statuses = (await self._ask(cookie)).statuses
        return {name: statuses[key] for name, key in ids.items() if key in statuses}

    async def request(
        self,
        command: int,
        *,
        flags: int = 0,
        offset: int = 0,
        length: int = 0,
        payload: bytes = b"",
    ) -> Reply:
        """Send any request; raises NbdRequestFailed."""
        cookie = self.transmission.request(
            command, flags=flags, offset=offset, length=length, payload=payload
        )
        return await self._ask(cookie)

    def reply_to(self, cookie: int) -> asyncio.Future[Reply]:
        """Return a future of the reply to a request queued in `transmission`."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[cookie] = future
        return future

    async def send_queued(self) -> None:
        """Send what was queued in `transmission`."""
        await self._send_raw(self.transmission.data_to_send())

    async def _ask(self, cookie: int) -> Reply:
        future = self.reply_to(cookie)
        await self.send_queued()
        reply = await future
        if reply.error:
            raise NbdRequestFailed(reply)
        return reply

    # The end

    async def disconnect(self) -> None:
        """Send NBD_CMD_DISC, and wait for the server to close."""
        self.transmission.request(Command.DISC)
        await self.send_queued()
        await self.wait_closed()

    async def wait_closed(self) -> None:
        """Wait for the server to close its end."""
        assert self._receiver is not None
        await self._receiver

    async def close(self) -> None:
        """Close without a word."""
        if self._receiver is not None:
            self._receiver.cancel()
            await asyncio.gather(self._receiver, return_exceptions=True)
        self.sock.close()

    # Bytes

    async def _send_raw(self, data: bytes) -> None:
        if data:
            async with self._send_lock:
                await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def _receive_raw(self) -> bytes:
        data = await asyncio.get_running_loop().sock_recv(self.sock, _RECEIVE)
        if not data:
            raise ConnectionResetError("closed by the server")
        return data

    async def _receive_replies(self) -> None:
        transmission = self.transmission
        failure: Exception = ConnectionResetError("closed by the server")
        try:
            while True:
                while (reply := transmission.next_reply()) is not None:
                    future = self._waiting.pop(reply.request.cookie, None)
                    if future is not None and not future.done():
                        future.set_result(reply)
                transmission.feed(await self._receive_raw())
        except ConnectionError as error:
            failure = error
        except ProtocolError as error:
            failure = error
            raise
        finally:
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(failure)
                    future.exception()  # whoever waits sees it; nobody has to
            self._waiting.clear()


async def _connect(sock: socket.socket, address: str | tuple[str, int]) -> None:
    try:
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise


def error_name(failure: NbdRequestFailed) -> str:
    return NbdError(failure.error).name
