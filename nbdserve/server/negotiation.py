"""Drive the handshake over a socket, and look up what clients ask for."""

import asyncio
from dataclasses import dataclass
from typing import Final

import structlog

from nbdserve.errors import ConfigError, ImageError
from nbdserve.exports.access import Access, Client
from nbdserve.exports.export import Export
from nbdserve.exports.registry import Registry
from nbdserve.server.line import Line
from nbdserve.server.tls import TlsCredentials
from nbdserve.wire.constants import Option, OptionReply
from nbdserve.wire.handshake import (
    ContextsAsked,
    ExportAsked,
    ExportsAsked,
    HandshakeState,
    Negotiated,
    ServerHandshake,
)

#: Exports that are listed between two turns of the loop: 0.1 ms.
_NAMES: Final = 64


@dataclass(frozen=True, slots=True)
class Chosen:
    """A client that has chosen its export.

    Attributes:
        export: The one.
        access: What it was told that it may do.
        negotiated: On which terms.
        leftover: What it has sent beyond the handshake.
    """

    export: Export
    access: Access
    negotiated: Negotiated
    leftover: bytes


async def negotiate(
    line: Line,
    handshake: ServerHandshake,
    registry: Registry,
    credentials: TlsCredentials,
    most_clients: int,
) -> Chosen | str:
    """Talk to a client until it has chosen an export, or goes away.

    There is no deadline in here; that is the caller's.

    Args:
        line: To the client.
        handshake: Its handshake.
        registry: What it may choose from.
        credentials: For STARTTLS.
        most_clients: Of one export: another one is refused.

    Returns:
        The choice, or why there is none.

    Raises:
        ProtocolError: The client broke the protocol, or TLS.
        OSError: The connection was lost.
    """
    chosen: Export | None = None
    await line.send(handshake.data_to_send())
    while True:
        received = await line.receive()
        if not received:
            return "closed by the client during the handshake"
        await asyncio.sleep(0)  # others first: some clients never stop sending
        handshake.feed(received)
        while (ask := handshake.next_ask()) is not None:
            if isinstance(ask, ExportsAsked):
                await _list(handshake, registry, line)
            else:
                chosen = await _answer(
                    ask, handshake, registry, line.client, most_clients
                )
            await line.send(handshake.data_to_send())
            await asyncio.sleep(0)
        await line.send(handshake.data_to_send())
        if handshake.state is HandshakeState.STARTING_TLS:
            await line.start_tls(credentials)
            handshake.tls_started()
        if handshake.negotiated is not None and chosen is not None:
            access = chosen.policy.access_of(line.client)
            leftover = handshake.leftover()
            return Chosen(chosen, access, handshake.negotiated, leftover)
        if handshake.state is HandshakeState.CLOSED:
            return handshake.closed_because or "handshake closed"


async def _list(handshake: ServerHandshake, registry: Registry, line: Line) -> None:
    """Answer NBD_OPT_LIST a few names at a time: there may be thousands."""
    for listed, export in enumerate(registry.visible_to(line.client), 1):
        handshake.list_exports([(export.name, export.description)])
        if not listed % _NAMES:
            await line.send(handshake.data_to_send())
            await asyncio.sleep(0)
    handshake.end_list()


async def _answer(
    ask: ExportAsked | ContextsAsked,
    handshake: ServerHandshake,
    registry: Registry,
    client: Client,
    most_clients: int,
) -> Export | None:
    """Answer one option; return the export that it is about."""
    export = registry.find(ask.name, client)
    if export is None:
        name = ask.name or "(the default export)"
        if (
            isinstance(ask, ExportAsked)
            and handshake.tls_would_help
            and (registry.has_tls_only)
        ):
            # "SELECTIVETLS mode": so for a TLS-only export, and allowed for one that
            # does not exist; only so are they not told apart
            text = f"there is no export {name!r} without TLS"
            handshake.refuse(OptionReply.ERR_TLS_REQD, text)
        else:
            handshake.refuse(OptionReply.ERR_UNKNOWN, f"there is no export {name!r}")
        return None
    try:
        await export.ready()
    except (ConfigError, ImageError) as error:
        structlog.get_logger().error(
            "could not open an image", export=export.name, error=str(error)
        )
        handshake.refuse(OptionReply.ERR_UNKNOWN, "the export's image can't be opened")
        return None
    if export.retired:
        handshake.refuse(OptionReply.ERR_UNKNOWN, f"there is no export {ask.name!r}")
        return None
    read_only = export.policy.access_of(client) is Access.READ_ONLY
    if isinstance(ask, ExportAsked):
        if ask.option != Option.INFO and export.clients >= most_clients:
            handshake.refuse(
                OptionReply.ERR_POLICY, f"the export has {export.clients} clients"
            )
        else:
            handshake.answer_export(export.info(read_only=read_only))
    else:
        handshake.answer_contexts(export.info(read_only=read_only))
    return export
