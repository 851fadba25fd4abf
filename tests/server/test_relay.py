"""What lies between an encrypted client and its worker."""

import asyncio
import random
import socket
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from nbdserve.server.relay import PIECE, Relay

MIB = 1 << 20


@asynccontextmanager
async def relayed(
    memory: memoryview,
) -> AsyncIterator[tuple[socket.socket, socket.socket]]:
    """A client and a worker with a relay between them."""
    loop = asyncio.get_running_loop()
    pairs = [socket.socketpair(), socket.socketpair()]
    for sock in (*pairs[0], *pairs[1]):
        sock.setblocking(False)
    (client, ours), (worker, other) = pairs
    relay = Relay(loop, ours, other, memory)
    with client, ours, worker:
        yield client, worker
        relay.ended.cancel()
        with suppress(asyncio.CancelledError):
            await relay.ended


async def exchange(
    client: socket.socket, worker: socket.socket, size: int, seed: int = 0
) -> None:
    """Send much both ways, and look that it arrives."""
    loop = asyncio.get_running_loop()
    data = [random.Random(seed + n).randbytes(size) for n in range(2)]

    async def receive(sock: socket.socket, expected: bytes) -> None:
        received = bytearray()
        while len(received) < len(expected):
            received += await loop.sock_recv(sock, 70_000)
        assert received == expected

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(loop.sock_sendall(client, data[0]))
        group.create_task(loop.sock_sendall(worker, data[1]))
        group.create_task(receive(worker, data[0]))
        group.create_task(receive(client, data[1]))


async def test_relays_share_their_memory_and_mix_nothing_up() -> None:
    memory = memoryview(bytearray(PIECE))
    async with AsyncExitStack() as stack:
        ends = [await stack.enter_async_context(relayed(memory)) for _ in range(4)]
        async with asyncio.TaskGroup() as group:
            for number, (client, worker) in enumerate(ends):
                group.create_task(exchange(client, worker, 3 * MIB, 10 * number))


async def test_idle_connections_hold_no_memory() -> None:
    memory = memoryview(bytearray(PIECE))
    async with AsyncExitStack() as stack:
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        for _ in range(8):
            client, worker = await stack.enter_async_context(relayed(memory))
            await exchange(client, worker, MIB // 4)
        held, _ = tracemalloc.get_traced_memory()
        assert held < 8 * (64 << 10)
