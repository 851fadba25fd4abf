"""NBD URIs, read and written as doc/uri.md of NetworkBlockDevice/nbd defines them."""

from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from nbdserve.errors import ConfigError
from nbdserve.wire.constants import MAX_NAME

DEFAULT_PORT: Final = 10809

_SCHEMES: Final = ("nbd", "nbds", "nbd+unix", "nbds+unix")
_PARAMETERS: Final = ("socket", "tls-type", "tls-hostname", "tls-verify-peer")


@dataclass(frozen=True, slots=True)
class NbdUri:
    """Where an export is.

    Attributes:
        export_name: "" is the default export.
        host: A name or an address, without brackets; None with a Unix socket.
        port: Of TCP.
        socket_path: Of the Unix socket; None with TCP. A leading NUL means the
            abstract namespace.
        tls: Whether the connection has to be encrypted.
        user: For TLS with pre-shared keys.
        tls_type: "anon", "x509" or "psk".
        tls_hostname: What the server's certificate should say.
        tls_verify_peer: Whether the server's certificate is to be verified.
    """

    export_name: str = ""
    host: str | None = None
    port: int = DEFAULT_PORT
    socket_path: str | None = None
    tls: bool = False
    user: str | None = None
    tls_type: str | None = None
    tls_hostname: str | None = None
    tls_verify_peer: bool = True

    def __str__(self) -> str:
        """Return the URI, with everything quoted that needs it."""
        scheme = "nbds" if self.tls else "nbd"
        name = quote(self.export_name, safe="/")
        query = []
        if self.socket_path is not None:
            scheme += "+unix"
            # "+" would be a space to those who read the query as a form
            path = quote(self.socket_path, safe="/", errors="surrogateescape")
            query.append(f"socket={path}")
        if self.tls_type:
            query.append("tls-type=" + quote(self.tls_type, safe=""))
        if self.tls_hostname:
            query.append("tls-hostname=" + quote(self.tls_hostname, safe=""))
        if not self.tls_verify_peer:
            query.append("tls-verify-peer=0")
        slash = "/" if name or self.socket_path is not None else ""
        return f"{scheme}://{self._authority()}{slash}{name}" + (
            "?" + "&".join(query) if query else ""
        )

    def _authority(self) -> str:
        if self.socket_path is not None:
            return ""
        host = self.host or "localhost"
        user = f"{quote(self.user, safe='')}@" if self.user else ""
        # zone ids (RFC 6874) have a percent sign of their own
        bracketed = f"[{host.replace('%', '%25')}]" if ":" in host else host
        # the default port too: people look for it, and paste it elsewhere
        return f"{user}{bracketed}:{self.port}"


def parse_uri(text: str) -> NbdUri:
    """Parse an NBD URI.

    Raises:
        ConfigError: It is none; the message says why.
    """
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as problem:
        raise ConfigError(f"{text}: not a URI: {problem}") from problem
    if parts.scheme not in _SCHEMES:
        raise ConfigError(
            f"{text}: an NBD URI begins with nbd://, nbds:// or nbd+unix://"
        )
    if parts.fragment:
        raise ConfigError(f"{text}: '#' has to be written %23 in a URI")
    parameters = _parameters(text, parts.query)
    socket_path = parameters.get("socket")
    if parts.scheme.endswith("+unix"):
        if not socket_path:
            raise ConfigError(f"{text}: ?socket=PATH is missing")
        if parts.netloc:
            raise ConfigError(f"{text}: a Unix socket has no host; write nbd+unix:///")
        host = None
    elif socket_path is not None:
        raise ConfigError(f"{text}: ?socket= needs nbd+unix:// or nbds+unix://")
    elif not host:
        raise ConfigError(f"{text}: the host is missing")
    return NbdUri(
        export_name=_export_name(text, parts.path),
        host=unquote(host) if host else None,
        port=DEFAULT_PORT if port is None else port,
        socket_path=socket_path,
        tls=parts.scheme.startswith("nbds"),
        user=unquote(parts.username) if parts.username else None,
        tls_type=parameters.get("tls-type"),
        tls_hostname=parameters.get("tls-hostname"),
        tls_verify_peer=parameters.get("tls-verify-peer", "1") != "0",
    )


def _parameters(text: str, query: str) -> dict[str, str]:
    # a form's "+" is a space, a URI's is a plus sign
    # and a path is bytes, as os.fsencode() takes them
    pairs = parse_qsl(
        query.replace("+", "%2B"), keep_blank_values=True, errors="surrogateescape"
    )
    for key, _ in pairs:
        if key not in _PARAMETERS and not key.startswith("x-"):
            raise ConfigError(f"{text}: unknown parameter {key!r}")
    return dict(pairs)


def _export_name(text: str, path: str) -> str:
    """Return the path without its first slash, decoded."""
    try:
        name = unquote(path.removeprefix("/"), errors="strict")
    except UnicodeDecodeError as problem:
        raise ConfigError(f"{text}: the export name is not UTF-8") from problem
    if "\0" in name or len(name.encode()) > MAX_NAME:
        raise ConfigError(
            f"{text}: an export name has no NUL and at most {MAX_NAME} bytes"
        )
    return name
