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
_PIECE: Final = 256 << 10


async def relay(
    loop: asyncio.AbstractEventLoop, client: ByteStream, worker: socket.socket
) -> None:
    """Carry bytes both ways until the worker closes its end.

    Args:
        loop: The running loop.
        client: The encrypted connection; not closed here.
        worker: Our end of a pair, not blocking; closed in the end.
    """
    worker.setblocking(False)
    to_worker = loop.create_task(_pump(loop, client, worker))
    try:
        await _pump(loop, worker, client)
    finally:
        to_worker.cancel()
        with suppress(asyncio.CancelledError):
            await to_worker
        worker.close()


async def _pump(
    loop: asyncio.AbstractEventLoop, source: ByteStream, sink: ByteStream
) -> None:
    """Carry bytes one way, and the end of the stream."""
    memory = memoryview(bytearray(_PIECE))
    with suppress(OSError):  # whoever is lost, the other side sees the end
        while True:
            try:
                count = source.recv_into(memory)
            except (BlockingIOError, InterruptedError):
                await readable(loop, source.fileno())
                continue
            if not count:
                break
            piece = memory[:count]
            while piece:
                try:
                    piece = piece[sink.send(piece) :]
                except (BlockingIOError, InterruptedError):
                    await writable(loop, sink.fileno())
            await asyncio.sleep(0)  # a quick pair must not keep the loop to itself
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
