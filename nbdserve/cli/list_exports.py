"""`nbdserve list`: what a server, ours or another, exports."""

import argparse
import json
import socket
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from nbdserve.cli.parser import judged
from nbdserve.config.units import format_size
from nbdserve.errors import ConfigError, ProtocolError
from nbdserve.storage.names import shown
from nbdserve.wire.client_handshake import (
    ClientHandshake,
    ExportDetails,
    OptionRefused,
    Outcome,
    contexts_data,
    info_data,
)
from nbdserve.wire.constants import Info, Option, TransmissionFlag
from nbdserve.wire.uri import NbdUri, parse_uri

if TYPE_CHECKING:
    import ssl

TAKES = "URI"

DESCRIPTION = """\
Show the exports of an NBD server: sizes, descriptions, abilities, meta contexts.
With a name in the URI, show that export only."""

EXAMPLES = """\
examples:
  nbdserve list nbd://127.0.0.1
  nbdserve list nbd://storage.example:10809/disk --json
  nbdserve list 'nbd+unix:///?socket=/run/nbdserve.sock'
  nbdserve list nbds://storage.example --tls-ca ca-cert.pem"""

#: An answer to an option takes a server no disk access worth mentioning.
TIMEOUT_S = 15.0

#: X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT to X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE.
_UNKNOWN_AUTHORITY = range(18, 22)

#: nbdinfo's words for what an export can do.
_ABILITIES = {
    "can_cache": TransmissionFlag.SEND_CACHE,
    "can_df": TransmissionFlag.SEND_DF,
    "can_fast_zero": TransmissionFlag.SEND_FAST_ZERO,
    "can_flush": TransmissionFlag.SEND_FLUSH,
    "can_fua": TransmissionFlag.SEND_FUA,
    "can_multi_conn": TransmissionFlag.CAN_MULTI_CONN,
    "can_trim": TransmissionFlag.SEND_TRIM,
    "can_zero": TransmissionFlag.SEND_WRITE_ZEROES,
}


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "uri",
        metavar="URI",
        type=judged(_uri),
        help="nbd://HOST[:PORT][/NAME] or nbd+unix:///[NAME]?socket=PATH; nbds://"
        " and nbds+unix:// encrypt",
    )
    parser.add_argument(
        "--tls-ca",
        metavar="FILE",
        help="authorities that may have signed the server's certificate (default:"
        " those of this machine)",
    )
    parser.add_argument(
        "--tls-cert", metavar="FILE", help="our certificate, if the server wants one"
    )
    parser.add_argument("--tls-key", metavar="FILE", help="its private key")
    parser.add_argument(
        "--json", action="store_true", help="for programs, with nbdinfo's field names"
    )


def run(arguments: argparse.Namespace) -> int:
    """Ask the server, and print what it says."""
    uri: NbdUri = arguments.uri
    exports = listed_exports(arguments)
    if arguments.json:
        print(json.dumps({"exports": [_as_json(uri, export) for export in exports]}))
    elif exports:
        print("\n\n".join(_as_text(uri, export) for export in exports))
    else:
        print(f"{_server(uri)} exports nothing")
    return 0


def listed_exports(arguments: argparse.Namespace) -> "list[ListedExport]":
    """Return the export that the URI names, or all of its server.

    Raises:
        ConfigError: The server can't be asked, or refuses.
    """
    uri: NbdUri = arguments.uri
    if not uri.tls:
        for name in ("tls_ca", "tls_cert", "tls_key"):
            if getattr(arguments, name) is not None:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} needs a URI that encrypts: nbds://")
    context = _context(arguments, uri) if uri.tls else None
    try:
        with _Connection(uri) as connection:
            if context is not None:
                connection.start_tls(context, _hostname(uri))
            return connection.exports(uri.export_name or None)
    except (ProtocolError, OptionRefused) as error:
        raise ConfigError(f"{uri}: {error}") from error
    except TimeoutError:
        raise ConfigError(
            f"{_server(uri)}: no answer within {TIMEOUT_S:.0f} seconds"
        ) from None
    except OSError as error:
        raise ConfigError(f"{_server(uri)}: {_reason(error, arguments)}") from None


def _reason(error: OSError, arguments: argparse.Namespace) -> str:
    """Return why a server could not be asked."""
    import ssl

    if not isinstance(error, ssl.SSLCertVerificationError):
        return error.strerror or str(error)
    if error.verify_code not in _UNKNOWN_AUTHORITY:
        return error.verify_message
    if arguments.tls_ca is None:
        return f"{error.verify_message}; add --tls-ca with the authority's certificate"
    return f"{error.verify_message}; {shown(arguments.tls_ca)} has not signed it"


@dataclass(frozen=True, slots=True)
class ListedExport:
    """What one server told about one export."""

    name: str
    description: str
    details: ExportDetails
    contexts: tuple[str, ...]


class _Connection:
    """A blocking connection that never leaves the handshake."""

    def __init__(self, uri: NbdUri) -> None:
        if uri.socket_path is not None:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(TIMEOUT_S)
            try:
                self._socket.connect(uri.socket_path)
            except BaseException:
                self._socket.close()
                raise
        else:
            address = (uri.host or "localhost", uri.port)
            self._socket = socket.create_connection(address, TIMEOUT_S)
        self._handshake = ClientHandshake()

    def start_tls(self, context: "ssl.SSLContext", hostname: str) -> None:
        """Encrypt from now on."""
        self._ask(Option.STARTTLS)
        self._socket = context.wrap_socket(self._socket, server_hostname=hostname)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def exports(self, name: str | None) -> list[ListedExport]:
        """Return the export of that name, or all that the server lists."""
        # base:allocation exists only once structured replies do
        self._ask_if_known(Option.STRUCTURED_REPLY)
        listed = self._ask(Option.LIST).exports if name is None else [(name, "")]
        exports = [self._describe(*entry) for entry in listed]
        # nbd-server 3.24 resets the connection instead of an answer
        with suppress(OSError, ProtocolError, OptionRefused):
            self._ask(Option.ABORT)
        return exports

    def _describe(self, name: str, description: str) -> ListedExport:
        wanted = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)
        details = self._ask(Option.INFO, info_data(name, wanted)).details
        if details is None:
            raise ProtocolError("NBD_OPT_INFO: no NBD_INFO_EXPORT")
        contexts = self._ask_if_known(Option.LIST_META_CONTEXT, contexts_data(name, ()))
        names = tuple(context.name for context in contexts.contexts)
        return ListedExport(name, details.description or description, details, names)

    def _ask_if_known(self, option: int, data: bytes = b"") -> Outcome:
        """Ask what a server may well refuse, and take that as an empty answer."""
        try:
            return self._ask(option, data)
        except OptionRefused:
            return Outcome(option)

    def _ask(self, option: int, data: bytes = b"") -> Outcome:
        self._handshake.ask(option, data)
        while True:
            # the client's flags go first, and depend on the greeting
            if self._handshake.greeted:
                self._socket.sendall(self._handshake.data_to_send())
            outcome = self._handshake.outcome()
            if outcome is not None:
                return outcome
            received = self._socket.recv(65536)
            if not received:
                raise ProtocolError("the server closed the connection")
            self._handshake.feed(received)


def _uri(text: str) -> NbdUri:
    return parse_uri(text)


def _hostname(uri: NbdUri) -> str:
    """Return what the server's certificate has to say."""
    return uri.tls_hostname or uri.host or "localhost"


def _context(arguments: argparse.Namespace, uri: NbdUri) -> "ssl.SSLContext":
    """Return how to encrypt.

    Raises:
        ConfigError: A file can't be used.
    """
    import ssl

    from nbdserve.server.certificates import judge_certificates, load_own

    if arguments.tls_ca is not None:
        judge_certificates(arguments.tls_ca)
    context = ssl.create_default_context(cafile=arguments.tls_ca)
    if arguments.tls_cert is not None:
        key = arguments.tls_key or arguments.tls_cert
        load_own(context, arguments.tls_cert, key)
    elif arguments.tls_key is not None:
        raise ConfigError("--tls-key needs --tls-cert")
    if not uri.tls_verify_peer:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _server(uri: NbdUri) -> str:
    """Return the server as a message names it."""
    return str(replace(uri, export_name=""))


def _as_json(uri: NbdUri, export: ListedExport) -> dict[str, Any]:
    flags = export.details.transmission_flags
    fields: dict[str, Any] = {
        "export-name": export.name,
        "description": export.description,
        "uri": str(replace(uri, export_name=export.name)),
        "contexts": list(export.contexts),
        "is_rotational": bool(flags & TransmissionFlag.ROTATIONAL),
        "is_read_only": bool(flags & TransmissionFlag.READ_ONLY),
    }
    fields |= {name: bool(flags & flag) for name, flag in _ABILITIES.items()}
    if export.details.minimum_block is not None:
        fields |= {
            "block_size_minimum": export.details.minimum_block,
            "block_size_preferred": export.details.preferred_block,
            "block_size_maximum": export.details.maximum_payload,
        }
    return fields | {"export-size": export.details.size}


def _as_text(uri: NbdUri, export: ListedExport) -> str:
    details = export.details
    flags = details.transmission_flags
    access = "read-only" if flags & TransmissionFlag.READ_ONLY else "read-write"
    title = f'"{shown(export.name)}"'
    if export.description:
        title += f": {shown(export.description)}"
    size = format_size(details.size)
    exact = "" if size.endswith(("byte", "bytes")) else f" ({details.size} bytes)"
    lines = [
        title,
        f"  {replace(uri, export_name=export.name)}",
        f"  {size}{exact}, {access}",
    ]
    able = [
        name.removeprefix("can_") for name, flag in _ABILITIES.items() if flags & flag
    ]
    if able:
        lines.append(f"  can: {', '.join(able)}")
    if details.minimum_block is not None:
        lines.append(
            f"  block sizes: minimum {details.minimum_block},"
            f" preferred {details.preferred_block},"
            f" maximum {details.maximum_payload}"
        )
    if export.contexts:
        contexts = ", ".join(shown(name) for name in export.contexts)
        lines.append(f"  meta contexts: {contexts}")
    return "\n".join(lines)
