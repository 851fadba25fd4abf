"""Clients that mean harm, each kind a process: ``python -m tests.bench.attackers``.

They keep to the protocol as far as it takes to be a burden. Each says "ready" once its
burden is there, and goes on until it is killed.
"""

import argparse
import errno
import resource
import socket
import struct
import sys
import time
from collections.abc import Callable

from nbdserve.wire.client_handshake import info_data
from nbdserve.wire.constants import IHAVEOPT, REQUEST_MAGIC, Command, Option
from nbdserve.wire.options import OPTION
from nbdserve.wire.requests import REQUEST

KIB = 1 << 10
MIB = 1 << 20

#: Of the greatest size that is allowed; more than any limit lets in.
UNREAD_READ = 64 * MIB
UNREAD_CLIENTS = 32
#: Between two of them that hang up and come again.
UNREAD_PAUSE_S = 0.25

HALF_OPEN = 10_000
#: How fast half-open connections that the server has dropped are opened again.
AGAIN_PER_S = 1000

SLOW_READERS = 16
SLOW_SENDERS = 100
#: Between two moves of each slow client.
PAUSE_S = 0.02


def connect(path: str) -> socket.socket:
    """A connection whose handshake has not begun."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return sock


def choose(path: str, export: str) -> socket.socket:
    """A connection in the transmission phase."""
    sock = connect(path)
    data = info_data(export)
    option = OPTION.pack(IHAVEOPT, Option.GO, len(data)) + data
    sock.sendall(struct.pack(">I", 3) + option)
    received = b""
    # up to NBD_REP_ACK of NBD_OPT_GO, which has no data
    while not received.endswith(struct.pack(">III", Option.GO, 1, 0)):
        piece = sock.recv(4096)
        if not piece:
            raise ConnectionError("refused")
        received += piece
    return sock


def request(command: Command, length: int) -> bytes:
    """The header of a request at the start of the disk."""
    return REQUEST.pack(REQUEST_MAGIC, 0, command, 1, 0, length)


def half_open(path: str, _export: str) -> None:
    """Connect thousands of times and say nothing."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sockets = [connect(path) for _ in range(min(HALF_OPEN, hard - 100))]
    for sock in sockets:
        sock.setblocking(False)
    ready()
    while True:
        for number, sock in enumerate(sockets):
            if not _dropped(sock):
                continue
            sock.close()
            sockets[number] = connect(path)
            sockets[number].setblocking(False)
            time.sleep(1 / AGAIN_PER_S)
        time.sleep(0.05)


def _dropped(sock: socket.socket) -> bool:
    """Whether the server has closed its end; its greeting is left where it is."""
    try:
        # the greeting has 18 bytes, and only the end can follow it
        peeked = sock.recv(64)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return not peeked


def slow_readers(path: str, export: str) -> None:
    """Ask for much, and take a page at a time."""
    sockets = [choose(path, export) for _ in range(SLOW_READERS)]
    for sock in sockets:
        sock.setblocking(False)
        _send_some(sock, request(Command.READ, 64 * KIB) * 128)
    ready()
    while True:
        for sock in sockets:
            try:
                taken = len(sock.recv(4 * KIB))
            except BlockingIOError:
                continue
            # as many bytes again as were taken, so that it never ends
            if taken:
                _send_some(sock, request(Command.READ, 4 * KIB))
        time.sleep(PAUSE_S)


def slow_senders(path: str, export: str) -> None:
    """Send headers byte by byte, and payloads a little at a time."""
    header = request(Command.READ, 4 * KIB)
    sockets = [choose(path, export) for _ in range(SLOW_SENDERS)]
    for sock in sockets:
        sock.setblocking(False)
    for sock in sockets[::2]:
        sock.sendall(request(Command.WRITE, MIB))
    ready()
    sent = 0
    while True:
        for number, sock in enumerate(sockets):
            if number % 2:
                position = sent % len(header)
                _send_some(sock, header[position : position + 1])
                _throw_away(sock)
            else:
                _send_some(sock, bytes(100))
        sent += 1
        time.sleep(PAUSE_S)


def unread_replies(path: str, export: str) -> None:
    """Ask for 64 MiB several times and read no reply; hang up at some time, and again."""
    asked = request(Command.READ, UNREAD_READ) * 4
    sockets = [choose(path, export) for _ in range(UNREAD_CLIENTS)]
    for sock in sockets:
        sock.sendall(asked)
    ready()
    turn = 0
    while True:
        time.sleep(UNREAD_PAUSE_S)
        sockets[turn].close()
        sockets[turn] = choose(path, export)
        sockets[turn].sendall(asked)
        turn = (turn + 1) % len(sockets)


def _send_some(sock: socket.socket, data: bytes) -> None:
    try:
        sock.send(data)
    except OSError as error:
        if error.errno != errno.EAGAIN:
            raise


def _throw_away(sock: socket.socket) -> None:
    try:
        sock.recv(64 * KIB)
    except BlockingIOError:
        return


def ready() -> None:
    """Tell whoever started the process."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()


ATTACKS: dict[str, Callable[[str, str], None]] = {
    "half-open": half_open,
    "slow-readers": slow_readers,
    "slow-senders": slow_senders,
    "unread-64m": unread_replies,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench.attackers")
    parser.add_argument("attack", choices=ATTACKS)
    parser.add_argument("path")
    parser.add_argument("export")
    arguments = parser.parse_args()
    ATTACKS[arguments.attack](arguments.path, arguments.export)
