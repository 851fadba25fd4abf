"""The connection to one client before it is served, and who that is.

It starts in plain text and may become encrypted; what has been found out about the
client is kept beside the socket.
"""

import asyncio
import contextlib
import socket
import struct
from dataclasses import replace
from typing import Any, Final

from nbdserve.errors import ProtocolError
from nbdserve.exports.access import Client, client_address
from nbdserve.server.readiness import readable, writable
from nbdserve.server.tls import (
    ByteStream,
    TlsCredentials,
    TlsSocket,
    certificate_names,
    explain,
)

#: Most handshakes of a client fit into one packet. 256 options in here take a millisecond.
_RECEIVE: Final = 4 << 10
#: struct ucred of unix(7): pid, uid, gid
_PEER_CREDENTIALS: Final = struct.Struct("=iII")


class Line:
    """A non-blocking socket, perhaps encrypted, and the client at its other end.

    Attributes:
        sock: What to send and receive with. The line owns it.
        client: What is known of the client.
        peer: Its name for logs.
        security: What else logs say of an encrypted connection.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, address: Any
    ) -> None:
        """Take over a socket; `address` as accept() returned it."""
        client, peer = _identify(sock, address)
        self._begin(loop, sock, client, peer)

    def _begin(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        client: Client,
        peer: str,
    ) -> None:
        self.client, self.peer = client, peer
        self._loop = loop
        self._plain = sock
        self.sock: ByteStream = sock
        self.security: dict[str, str] = {}

    @classmethod
    def handed_over(
        cls,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        client: Client,
        peer: str,
    ) -> "Line":
        """Take over a socket from a process that knows the client."""
        line = cls.__new__(cls)
        line._begin(loop, sock, client, peer)  # noqa: SLF001 -- another __init__
        return line

    @property
    def plain(self) -> socket.socket | None:
        """The socket if it is not encrypted, and so can be handed over."""
        return self._plain if self.sock is self._plain else None

    async def receive(self) -> bytes:
        """Wait for bytes; none at the end of the stream."""
        while True:
            try:
                return self.sock.recv(_RECEIVE)
            except (BlockingIOError, InterruptedError):
                await readable(self._loop, self.sock.fileno())

    async def send(self, data: bytes) -> None:
        """Send all of `data`."""
        view = memoryview(data)
        while view:
            try:
                view = view[self.sock.send(view) :]
            except (BlockingIOError, InterruptedError):
                await writable(self._loop, self.sock.fileno())

    async def start_tls(self, credentials: TlsCredentials) -> None:
        """Encrypt from now on, and learn who the client is.

        Raises:
            ProtocolError: The TLS handshake failed; the message says why.
        """
        try:
            encrypted, user = await credentials.start(self._loop, self._plain)
        except OSError as error:
            raise ProtocolError(f"TLS: {explain(error)}") from error
        self.sock = TlsSocket(encrypted)
        name, subject = certificate_names(encrypted)
        self.client = replace(
            self.client, tls=True, common_name=name, subject=subject, psk_user=user
        )
        self.security = {"tls": encrypted.version() or "unknown"}
        if subject is not None:
            self.security["certificate"] = subject
        if user is not None:
            self.security["psk_user"] = user

    def close(self) -> None:
        """Close the connection."""
        self.sock.close()


def _identify(sock: socket.socket, address: Any) -> tuple[Client, str]:
    """Return what the kernel says of a client, and its name for logs."""
    if sock.family == socket.AF_INET6:
        client = Client(address=client_address(address[0]))
        return client, f"[{address[0]}]:{address[1]}"
    if sock.family == socket.AF_INET:
        client = Client(address=client_address(address[0]))
        return client, f"{address[0]}:{address[1]}"
    if sock.family == socket.AF_VSOCK:
        return Client(), f"vsock:{address[0]}:{address[1]}"
    with contextlib.suppress(OSError):
        credentials = sock.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size
        )
        pid, uid, _ = _PEER_CREDENTIALS.unpack(credentials)
        return Client(uid=uid), f"unix:pid={pid}"
    return Client(), "unix"
