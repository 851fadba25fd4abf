"""Drive the handshake over a socket, and look up what clients ask for."""

import asyncio
import socket
from dataclasses import dataclass

from nbdserve.exports.export import Export
from nbdserve.exports.registry import Registry
from nbdserve.wire.constants import Option, OptionReply
from nbdserve.wire.handshake import (
    Ask,
    ExportAsked,
    ExportsAsked,
    HandshakeState,
    Negotiated,
    ServerHandshake,
)

#: Most handshakes of a client fit into one packet.
_RECEIVE = 16 << 10


@dataclass(frozen=True, slots=True)
class Chosen:
    """A client that has chosen its export.

    Attributes:
        export: The one.
        negotiated: On which terms.
        leftover: What it has sent beyond the handshake.
    """

    export: Export
    negotiated: Negotiated
    leftover: bytes


async def negotiate(
    loop: asyncio.AbstractEventLoop,
    sock: socket.socket,
    handshake: ServerHandshake,
    registry: Registry,
    most_clients: int,
) -> Chosen | str:
    """Talk to a client until it has chosen an export, or goes away.

    There is no deadline in here; that is the caller's.

    Args:
        loop: The running one.
        sock: The client.
        handshake: Its handshake.
        registry: What it may choose from.
        most_clients: Of one export: another one is refused.

    Returns:
        The choice, or why there is none.

    Raises:
        ProtocolError: The client broke the protocol.
        OSError: The connection was lost.
    """
    chosen: Export | None = None
    await _send(loop, sock, handshake)
    while True:
        received = await loop.sock_recv(sock, _RECEIVE)
        if not received:
            return "closed by the client during the handshake"
        handshake.feed(received)
        while (ask := handshake.next_ask()) is not None:
            chosen = _answer(ask, handshake, registry, most_clients)
            await _send(loop, sock, handshake)
        await _send(loop, sock, handshake)
        if handshake.negotiated is not None and chosen is not None:
            return Chosen(chosen, handshake.negotiated, handshake.leftover())
        if handshake.state is HandshakeState.CLOSED:
            return handshake.closed_because or "handshake closed"


async def _send(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, handshake: ServerHandshake
) -> None:
    data = handshake.data_to_send()
    if data:
        await loop.sock_sendall(sock, data)


def _answer(
    ask: Ask, handshake: ServerHandshake, registry: Registry, most_clients: int
) -> Export | None:
    """Answer one option; return the export that it is about."""
    if isinstance(ask, ExportsAsked):
        handshake.answer_list((export.name, export.description) for export in registry)
        return None
    export = registry.find(ask.name)
    if export is None:
        name = ask.name or "(the default export)"
        handshake.refuse(OptionReply.ERR_UNKNOWN, f"there is no export {name!r}")
    elif isinstance(ask, ExportAsked):
        if ask.option != Option.INFO and export.clients >= most_clients:
            handshake.refuse(
                OptionReply.ERR_POLICY, f"the export has {export.clients} clients"
            )
        else:
            handshake.answer_export(export.info())
    else:
        handshake.answer_contexts(export.info())
    return export
