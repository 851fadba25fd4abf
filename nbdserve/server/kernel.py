"""Attach an export to this machine's own /dev/nbdN, without a network in between.

One end of a pair of sockets is a client of the server like any other, the other end
becomes the kernel's once an export is chosen on it.
"""

import asyncio
import socket
from typing import Final

import structlog

from nbdserve.errors import ConfigError
from nbdserve.server.netlink import connect_device, disconnect_device
from nbdserve.server.server import Server
from nbdserve.storage.executor import run
from nbdserve.wire.client_handshake import (
    ClientHandshake,
    ExportDetails,
    OptionRefused,
    info_data,
)
from nbdserve.wire.constants import Info, Option

_RECEIVE: Final = 16 << 10


class KernelDevice:
    """/dev/nbdN, attached to an export of a server in this process."""

    def __init__(self, server: Server, index: int) -> None:
        self._server = server
        self._index = index
        self._attached = False

    async def attach(self, name: str) -> None:
        """Let the kernel use an export.

        Raises:
            ConfigError: It can't; the message says why.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.setblocking(False)
            _ = self._server.welcome(ours, "")
            try:
                details = await _choose(theirs, name)
                # the kernel waits for the socket in blocking calls of its own
                theirs.setblocking(True)
                # in a thread: if the kernel looks for partitions, this loop answers
                await run(
                    connect_device,
                    self._index,
                    details.size,
                    details.transmission_flags,
                    [theirs],
                )
            except OptionRefused as error:
                raise ConfigError(str(error)) from error
        self._attached = True

    async def detach(self) -> None:
        """Take the device back, unless somebody has done so already."""
        if not self._attached:
            return
        self._attached = False
        try:
            await run(disconnect_device, self._index)
        except ConfigError as error:
            structlog.get_logger().debug("was detached already", error=str(error))


async def _choose(sock: socket.socket, name: str) -> ExportDetails:
    """Choose an export with NBD_OPT_GO.

    Raises:
        OptionRefused: The server did not let us.
    """
    loop = asyncio.get_running_loop()
    handshake = ClientHandshake()
    handshake.ask(Option.GO, info_data(name, (Info.BLOCK_SIZE,)))
    while (outcome := handshake.outcome()) is None:
        await loop.sock_sendall(sock, handshake.data_to_send())
        received = await loop.sock_recv(sock, _RECEIVE)
        if not received:
            raise ConfigError("the server hung up during the handshake")
        handshake.feed(received)
    if outcome.details is None:
        raise ConfigError("the server did not say what it exports")
    return outcome.details
