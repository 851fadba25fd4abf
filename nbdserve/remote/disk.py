"""An export of an NBD server as a disk.

    async with await connect(parse_uri("nbd://127.0.0.1/disk")) as disk: ...

The protocol is `wire.client_handshake` and `wire.client_transmission`; what is added
here is a connection. Any number of requests may be in flight: each waits for
the reply with its cookie, whatever the order of the replies.
"""

import asyncio
import errno
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Final, Self

from nbdserve.block.device import BlockDevice, Hole
from nbdserve.block.extents import Extent, merged
from nbdserve.errors import ConfigError, ProtocolError, RequestError
from nbdserve.wire.client_handshake import (
    ClientHandshake,
    ExportDetails,
    OptionRefused,
    Outcome,
    contexts_data,
    info_data,
)
from nbdserve.wire.client_transmission import ClientTransmission, Reply
from nbdserve.wire.constants import (
    Command,
    CommandFlag,
    Info,
    Option,
    State,
    TransmissionFlag,
)
from nbdserve.wire.uri import NbdUri

#: A server that does not answer within this is not there.
CONNECT_TIMEOUT_S: Final = 15.0
#: Requests larger than this are split; every server takes 32 MiB if it says nothing.
_MAX_PAYLOAD: Final = 2 << 20
#: Status, trim and zeroes carry no payload, but 32 bits of length.
_MAX_LENGTH: Final = 1 << 30
_RECEIVED: Final = 1 << 20
_ALLOCATION: Final = "base:allocation"


async def connect(uri: NbdUri, *, read_only: bool = True) -> "RemoteDisk":
    """Connect to an export.

    Args:
        uri: Where it is.
        read_only: Whether to refuse changes; if not, the export has to take them.

    Raises:
        ConfigError: The server can't be reached, refuses, or exports no such thing.
    """
    if uri.tls:
        raise ConfigError(f"{uri}: TLS is not supported: use nbd:// or nbd+unix://")
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            reader, writer = await _open_connection(uri)
            try:
                disk = await _negotiate(uri, reader, writer)
            except BaseException:
                writer.close()
                raise
    except TimeoutError:
        raise ConfigError(
            f"{replace(uri, export_name='')}: no answer within"
            f" {CONNECT_TIMEOUT_S:.0f} seconds"
        ) from None
    except (ProtocolError, OptionRefused) as error:
        raise ConfigError(f"{uri}: {error}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno is not None and not isinstance(error, socket.gaierror):
            reason = os.strerror(error.errno)  # asyncio's text has the address as well
        raise ConfigError(f"{replace(uri, export_name='')}: {reason}") from None
    if not read_only and disk.read_only:
        await disk.close()
        raise ConfigError(f"{uri}: the export is read-only")
    disk.read_only = read_only
    return disk


async def _open_connection(
    uri: NbdUri,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if uri.socket_path is not None:
        return await asyncio.open_unix_connection(uri.socket_path)
    return await asyncio.open_connection(uri.host or "localhost", uri.port)


@dataclass(frozen=True, slots=True)
class _Negotiation:
    """A connection in its handshake."""

    handshake: ClientHandshake
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(self, option: int, data: bytes = b"") -> Outcome:
        """Return the server's answer to one option."""
        handshake = self.handshake
        handshake.ask(option, data)
        while True:
            # the client's flags go first, and depend on the greeting
            if handshake.greeted:
                self.writer.write(handshake.data_to_send())
                await self.writer.drain()
            outcome = handshake.outcome()
            if outcome is not None:
                return outcome
            received = await self.reader.read(_RECEIVED)
            if not received:
                raise ProtocolError("the server closed the connection")
            handshake.feed(received)

    async def ask_if_known(self, option: int, data: bytes = b"") -> Outcome:
        """Ask what a server may well refuse, and take that as an empty answer."""
        try:
            return await self.ask(option, data)
        except OptionRefused:
            return Outcome(option)


async def _negotiate(
    uri: NbdUri, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> "RemoteDisk":
    handshake = ClientHandshake()
    negotiation = _Negotiation(handshake, reader, writer)
    name = uri.export_name
    await negotiation.ask_if_known(Option.STRUCTURED_REPLY)
    if handshake.structured:
        await negotiation.ask_if_known(
            Option.SET_META_CONTEXT, contexts_data(name, [_ALLOCATION])
        )
    outcome = await negotiation.ask(Option.GO, info_data(name, [Info.BLOCK_SIZE]))
    if outcome.details is None:
        raise ProtocolError("NBD_OPT_GO: no NBD_INFO_EXPORT")
    transmission = ClientTransmission(
        structured=handshake.structured,
        context_ids=[context.context_id for context in handshake.contexts],
    )
    transmission.feed(handshake.leftover())
    context_id = next(
        (
            context.context_id
            for context in handshake.contexts
            if context.name == _ALLOCATION
        ),
        None,
    )
    return RemoteDisk(
        uri, outcome.details, _Connection(uri, transmission, reader, writer), context_id
    )


class _Connection:
    """Requests out, replies in, in whatever order they come."""

    def __init__(
        self,
        uri: NbdUri,
        transmission: ClientTransmission,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._uri = uri
        self._transmission = transmission
        self._reader = reader
        self._writer = writer
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._failure: Exception | None = None
        self._receiving = asyncio.get_running_loop().create_task(self._receive())

    async def request(
        self,
        command: int,
        *,
        flags: int = 0,
        offset: int = 0,
        length: int = 0,
        payload: bytes | bytearray | memoryview = b"",
    ) -> Reply:
        """Send a request and return its reply.

        Raises:
            RequestError: The server answered with an error.
            ProtocolError: The server broke the protocol.
            OSError: The connection is lost.
        """
        if self._failure is not None:
            raise self._failure
        cookie = self._transmission.request(
            command, flags=flags, offset=offset, length=length, payload=payload
        )
        waiter = asyncio.get_running_loop().create_future()
        self._waiting[cookie] = waiter
        self._writer.write(self._transmission.data_to_send())
        # an error here is one of the connection: receiving ends with it as well
        try:
            await self._writer.drain()
        except OSError as error:
            self._fail(self._lost(str(error)))
        reply: Reply = await waiter
        if reply.error:
            text = reply.text or os.strerror(reply.error)
            raise RequestError(reply.error, f"{self._uri}: {text}")
        return reply

    async def _receive(self) -> None:
        try:
            while True:
                while (reply := self._transmission.next_reply()) is not None:
                    waiter = self._waiting.pop(reply.request.cookie, None)
                    if waiter is not None and not waiter.done():
                        waiter.set_result(reply)
                received = await self._reader.read(_RECEIVED)
                if not received:
                    break
                self._transmission.feed(received)
            self._fail(self._lost("the server closed it"))
        except OSError as error:
            self._fail(self._lost(str(error)))
        except ProtocolError as error:
            self._fail(ProtocolError(f"{self._uri}: {error}"))

    def _lost(self, reason: str) -> OSError:
        text = f"the connection is lost: {reason}"
        return ConnectionResetError(errno.ECONNRESET, text, str(self._uri))

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error
        waiting, self._waiting = self._waiting, {}
        for waiter in waiting.values():
            if not waiter.done():
                waiter.set_exception(error)

    async def close(self) -> None:
        """Say goodbye, if there is still somebody to hear it."""
        if self._failure is None:
            self._transmission.disconnect()
            self._writer.write(self._transmission.data_to_send())
        self._receiving.cancel()
        await asyncio.gather(self._receiving, return_exceptions=True)
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:
            # What was written is flushed: how the connection ends does not matter.
            return


class RemoteDisk(BlockDevice):
    """An export of a server; see `connect`.

    Attributes:
        minimum_block: Bytes; requests have to be multiples of it.
    """

    def __init__(
        self,
        uri: NbdUri,
        details: ExportDetails,
        connection: _Connection,
        context_id: int | None,
    ) -> None:
        flags = details.transmission_flags
        self.size = details.size
        self.read_only = bool(flags & TransmissionFlag.READ_ONLY)
        self.minimum_block = details.minimum_block or 1
        self.preferred_block = max(details.preferred_block or 4096, self.minimum_block)
        self.can_trim = bool(flags & TransmissionFlag.SEND_TRIM)
        self.can_fast_zero = bool(flags & TransmissionFlag.SEND_FAST_ZERO)
        self._uri = uri
        self._flags = flags
        self._connection = connection
        self._context_id = context_id
        most = min(details.maximum_payload or _MAX_PAYLOAD, _MAX_PAYLOAD)
        self._most = max(most // self.minimum_block, 1) * self.minimum_block

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def read_into(self, offset: int, buffer: memoryview) -> Sequence[Hole]:
        """See `BlockDevice.read_into`."""
        minimum = self.minimum_block
        position = 0
        while position < len(buffer):
            # a server with large blocks is asked for all of the first and last one
            skip = (offset + position) % minimum
            start = offset + position - skip
            wanted = min(skip + len(buffer) - position, self._most)
            length = min(-(-wanted // minimum) * minimum, self.size - start)
            reply = await self._connection.request(
                Command.READ, offset=start, length=length
            )
            piece = min(length - skip, len(buffer) - position)
            buffer[position : position + piece] = memoryview(reply.data)[
                skip : skip + piece
            ]
            position += piece
        return ()

    async def write(
        self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False
    ) -> None:
        """See `BlockDevice.write`; a multiple of `minimum_block`, aligned to it."""
        self._require_writable()
        view = memoryview(data)
        for start in range(0, len(view), self._most):
            piece = view[start : start + self._most]
            await self._connection.request(
                Command.WRITE, offset=offset + start, length=len(piece), payload=piece
            )
        await self._settle(fua=fua)

    async def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        may_unmap: bool = True,
        fast_only: bool = False,
        fua: bool = False,
    ) -> None:
        """See `BlockDevice.write_zeroes`; a server that has no such command gets zeros."""
        self._require_writable()
        if not self._flags & TransmissionFlag.SEND_WRITE_ZEROES:
            if fast_only:
                raise RequestError(errno.ENOTSUP, f"{self._uri}: no quick zeroes")
            await self._write_zeros(offset, length)
        else:
            flags = 0 if may_unmap else CommandFlag.NO_HOLE
            if fast_only:
                flags |= CommandFlag.FAST_ZERO
            await self._in_pieces(Command.WRITE_ZEROES, offset, length, flags)
        await self._settle(fua=fua)

    async def _write_zeros(self, offset: int, length: int) -> None:
        zeros = bytes(min(length, self._most))
        for start in range(0, length, self._most):
            piece = memoryview(zeros)[: length - start]
            await self.write(offset + start, piece)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """See `BlockDevice.trim`."""
        self._require_writable()
        if self.can_trim:
            await self._in_pieces(Command.TRIM, offset, length, 0)
        await self._settle(fua=fua)

    async def _in_pieces(
        self, command: int, offset: int, length: int, flags: int
    ) -> None:
        for start in range(0, length, _MAX_LENGTH):
            await self._connection.request(
                command,
                flags=flags,
                offset=offset + start,
                length=min(_MAX_LENGTH, length - start),
            )

    async def flush(self) -> None:
        """See `BlockDevice.flush`; without the command, the server has no cache."""
        if self._flags & TransmissionFlag.SEND_FLUSH and not self.read_only:
            await self._connection.request(Command.FLUSH)

    async def block_status(
        self, offset: int, length: int, *, max_extents: int = 1 << 20
    ) -> list[Extent]:
        """See `BlockDevice.block_status`; one request is asked, so it may end early."""
        if self._context_id is None:
            return [Extent(length, data=True, zero=False)]
        skip = offset % self.minimum_block
        start = offset - skip
        # rounded down unless that leaves nothing: the end of the disk is aligned
        wanted = min(skip + length, _MAX_LENGTH)
        wanted = -(-wanted // self.minimum_block) * self.minimum_block
        wanted = min(wanted, self.size - start)
        reply = await self._connection.request(
            Command.BLOCK_STATUS, offset=start, length=wanted
        )
        result: list[Extent] = []
        left = length
        for size, status in reply.statuses.get(self._context_id, ()):
            cut = min(size - skip, left)
            skip = max(skip - size, 0)
            if cut <= 0:
                continue
            zero = bool(status & State.ZERO)
            result.append(Extent(cut, data=not status & State.HOLE, zero=zero))
            left -= cut
            if not left:
                break
        return merged(result)[:max_extents] or [Extent(length, data=True, zero=False)]

    async def close(self) -> None:
        """See `BlockDevice.close`."""
        try:
            await self.flush()
        finally:
            await self._connection.close()

    async def _settle(self, *, fua: bool) -> None:
        if fua:
            await self.flush()

    def _require_writable(self) -> None:
        if self.read_only:
            raise RequestError(errno.EPERM, f"{self._uri}: is read-only")
