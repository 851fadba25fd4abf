"""Carry plaintext between an encrypted client and the worker that serves it.

The keys of a TLS connection can't be handed over, so the process that has accepted the
client encrypts for as long as the connection lasts.
"""

import asyncio
import socket
from contextlib import suppress
from typing import Final

from nbdserve.server.readiness import readable, writable
from nbdserve.server.tls import ByteStream

#: Moved at once: as much as a worker sends at once.
PIECE: Final = 256 << 10


class _Way:
    """Bytes on their way from one side to the other.

    Only what the other side does not take at once is kept: most connections are idle.

    Attributes:
        moved: How many bytes it has taken, ever.
        held: How many are kept for it.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        source: ByteStream,
        sink: ByteStream,
        memory: memoryview,
    ) -> None:
        """Carry nothing yet; `memory` is where all receive, `PIECE` bytes."""
        self._loop = loop
        self._source = source
        self._sink = sink
        self._memory = memory
        self.moved = self.held = 0

    async def go(self) -> None:
        """Carry bytes, and the end of the stream."""
        with suppress(OSError):  # whoever is lost, the other side sees the end
            while count := await self._receive():
                piece = self._memory[:count]
                if (sent := self._send(piece)) < count:
                    await self._send_rest(bytes(piece[sent:]))
                await asyncio.sleep(0)  # a quick pair must not keep the loop to itself
        with suppress(OSError):
            self._sink.shutdown(socket.SHUT_WR)

    async def _receive(self) -> int:
        while True:
            try:
                return self._source.recv_into(self._memory)
            except (BlockingIOError, InterruptedError):
                await readable(self._loop, self._source.fileno())

    def _send(self, piece: memoryview) -> int:
        try:
            sent = self._sink.send(piece)
        except (BlockingIOError, InterruptedError):
            sent = 0
        self.moved += sent
        self.held = len(piece) - sent
        return sent

    async def _send_rest(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            await writable(self._loop, self._sink.fileno())
            rest = rest[self._send(rest) :]


class Relay:
    """Carries bytes both ways until the worker closes its end.

    Attributes:
        ended: When that is done; who does not wait for the rest cancels it.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        client: ByteStream,
        worker: socket.socket,
        memory: memoryview,
    ) -> None:
        """Begin.

        Args:
            loop: The running loop.
            client: The encrypted connection; not closed here.
            worker: Our end of a pair; closed in the end.
            memory: For all relays of the loop, `PIECE` bytes.
        """
        worker.setblocking(False)
        self._loop = loop
        self._worker = worker
        self._requests = _Way(loop, client, worker, memory)
        self._replies = _Way(loop, worker, client, memory)
        self.ended = loop.create_task(self._run())

    @property
    def moved(self) -> int:
        """How many bytes the client has taken, ever."""
        return self._replies.moved

    @property
    def held(self) -> int:
        """How many bytes are kept until the client takes them."""
        return self._replies.held

    async def _run(self) -> None:
        to_worker = self._loop.create_task(self._requests.go())
        try:
            await self._replies.go()
        finally:
            to_worker.cancel()
            with suppress(asyncio.CancelledError):
                await to_worker
            self._worker.close()
