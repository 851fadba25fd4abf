"""Clients that have not said a word cost nothing, and are let go in their time."""

import asyncio
import socket
from collections.abc import MutableMapping
from typing import Any

import pytest

from nbdserve.server.limits import Limits
from nbdserve.wire.handshake import GREETING
from tests.server.conftest import Running, until

Logs = list[MutableMapping[str, Any]]


def knock(running: Running) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(str(running.path))
    return sock


async def received(sock: socket.socket) -> bytes:
    return await asyncio.to_thread(sock.recv, 100)


async def test_the_greeting_comes_without_a_word(running: Running) -> None:
    with knock(running) as sock:
        assert await received(sock) == GREETING
        assert running.server._clients == set()
        assert running.server.connections == 1
        sock.sendall(b"\0\0\0\3IHAVEOPT\0\0\0\2\0\0\0\0")  # NBD_OPT_ABORT
        assert await received(sock)
        assert await received(sock) == b""


@pytest.mark.parametrize("limits", [Limits(handshake_timeout_s=0.2, linger_s=0.1)])
async def test_each_is_let_go_in_its_time(running: Running, logs: Logs) -> None:
    with knock(running) as first:
        assert await received(first) == GREETING
        await asyncio.sleep(0.1)
        with knock(running) as second:
            assert await received(second) == GREETING
            assert await received(first) == b""
            assert running.server.connections == 1
            assert await received(second) == b""
    assert logs == []


@pytest.mark.parametrize("limits", [Limits(connections=3, linger_s=0.1)])
async def test_who_is_silent_makes_room_before_who_talks(running: Running) -> None:
    with knock(running) as slow, knock(running) as silent, knock(running) as second:
        for sock in (slow, silent, second):
            assert await received(sock) == GREETING
        slow.sendall(b"\0\0\0\3")
        await until(lambda: len(running.server._handshakes) == 1)
        client = await running.client()
        assert await client.read(0, 1) == b"\0"
        assert await received(silent) == b""
        slow.sendall(b"IHAVEOPT\0\0\0\2\0\0\0\0")
        assert await received(slow)


@pytest.mark.parametrize("limits", [Limits(connections=1, linger_s=0.1)])
async def test_a_handshake_that_never_began_leaves_nothing(running: Running) -> None:
    """The fixture looks for file descriptors that were left open."""
    ours, theirs = socket.socketpair()
    with theirs:
        task = running.server.welcome(ours, "")
        assert running.server._make_room()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: running.server.connections == 0)
        assert await received(theirs) == b""
        assert ours.fileno() == -1


async def test_the_end_of_the_server_is_theirs(running: Running) -> None:
    with knock(running) as sock:
        assert await received(sock) == GREETING
        await running.stop()
        assert await received(sock) == b""
