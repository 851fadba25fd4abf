"""TLS: credentials that can be replaced while serving, and a socket that encrypts.

An encrypted connection takes the same way as a plain one: `TlsSocket` has those
methods of a non-blocking socket that the rest of the server uses, with the same errors.
"""

import asyncio
import re
import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, NoReturn, Protocol

from nbdserve.config.tls import TlsConfig
from nbdserve.server.certificates import judge_certificates, load_own
from nbdserve.server.psk import PskKeys, load_psk
from nbdserve.server.readiness import readable, writable
from nbdserve.wire.handshake import TlsMode

#: RFC 8446, 5.1: the most bytes of plaintext in one record.
RECORD: Final = 16 << 10
#: What is encrypted in one call. The same bytes have to be offered again if
#: the peer does not take them, so this must never depend on anything.
_PIECE: Final = 256 << 10
#: With pre-shared keys up to TLS 1.2; those of TLS 1.3 know no key exchange.
_PSK_CIPHERS: Final = "ECDHE-PSK+AESGCM:ECDHE-PSK+CHACHA20:DHE-PSK+AESGCM:PSK+AESGCM"

_MODES: Final = {
    "off": TlsMode.OFF,
    "allow": TlsMode.ALLOWED,
    "require": TlsMode.REQUIRED,
}


class ByteStream(Protocol):
    """What the server needs of a socket, encrypted or not; it never blocks."""

    def fileno(self) -> int:
        """Return the file descriptor, to wait for it."""

    def recv(self, size: int, /) -> bytes:
        """Receive up to `size` bytes."""

    def recv_into(self, buffer: memoryview, /) -> int:
        """Receive into memory."""

    def send(self, data: memoryview | bytes, /) -> int:
        """Send some of `data`."""

    def sendmsg(self, pieces: Sequence[memoryview], /) -> int:
        """Send some of `pieces`, in order."""

    def shutdown(self, how: int, /) -> None:
        """Tell the peer that nothing more will come."""

    def close(self) -> None:
        """Close."""


class TlsSocket:
    """The encrypted side of a connection whose TLS handshake is done.

    Errors are those of sockets: `BlockingIOError` where OpenSSL waits.
    """

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._socket = sock
        self._ended = False

    def fileno(self) -> int:
        """Return the file descriptor."""
        return self._socket.fileno()

    def pending(self) -> int:
        """Return how many bytes wait in memory, where no event tells of them.

        None do after a `recv_into` with room for at least a record.
        """
        return self._socket.pending()

    def recv(self, size: int, /) -> bytes:
        """Receive up to `size` bytes; all of a record if that is `RECORD` or more.

        After `shutdown` what comes is of no interest, and not decrypted.
        """
        if self._ended:
            return socket.socket.recv(self._socket, size)
        try:
            return self._socket.recv(size)
        except ssl.SSLWantReadError:
            raise BlockingIOError from None
        except ssl.SSLWantWriteError:
            _refuse_deaf_peer()

    def recv_into(self, buffer: memoryview, /) -> int:
        """Receive as many records as have come and fit."""
        room = len(buffer)
        received = 0
        try:
            while True:
                count = self._socket.recv_into(buffer[received:])
                received += count
                if not count or room - received < RECORD:
                    return received
        except ssl.SSLWantReadError:
            if received:
                return received
            raise BlockingIOError from None
        except ssl.SSLWantWriteError:
            _refuse_deaf_peer()

    def send(self, data: memoryview | bytes, /) -> int:
        """Encrypt and send as much as the kernel takes.

        After a `BlockingIOError` or less than all, what follows must begin with what
        is left of `data`: OpenSSL may have encrypted it.
        """
        sent = 0
        try:
            while sent < len(data):
                sent += self._socket.send(data[sent : sent + _PIECE])
        except ssl.SSLWantWriteError:
            if not sent:
                raise BlockingIOError from None
        return sent

    def sendmsg(self, pieces: Sequence[memoryview], /) -> int:
        """Send pieces; short ones at the front share a record.

        Whatever is appended to `pieces` after an unfinished call, the next one offers
        the same bytes first.
        """
        count = total = 0
        for piece in pieces:
            if total + len(piece) > RECORD:
                break
            total += len(piece)
            count += 1
        if count > 1:
            return self.send(b"".join(pieces[:count]))
        return self.send(pieces[0])

    def shutdown(self, how: int, /) -> None:
        """Say goodbye (close_notify), then close our half of the connection."""
        self._say_goodbye()
        self._ended = True
        socket.socket.shutdown(self._socket, how)

    def close(self) -> None:
        """Say goodbye if the peer can still hear it, and close."""
        if self._socket.fileno() >= 0:
            self._say_goodbye()
        self._socket.close()

    def _say_goodbye(self) -> None:
        # whether the peer hears it or answers is of no consequence here
        with suppress(OSError, ValueError):
            self._socket.unwrap()


def _refuse_deaf_peer() -> NoReturn:
    """End a connection whose peer wants an answer of TLS itself, and reads none."""
    raise ConnectionAbortedError("TLS: the client does not read")


class TlsCredentials:
    """What new connections encrypt with, until it is replaced.

    Attributes:
        mode: What clients may and must do.
    """

    def __init__(self, config: TlsConfig) -> None:
        """Read the files.

        Raises:
            ConfigError: One can't be used.
        """
        self.mode = TlsMode.OFF
        self._context: ssl.SSLContext | None = None
        self._keys = PskKeys({})
        self.replace(config)

    def replace(self, config: TlsConfig) -> None:
        """Read files anew, for those who connect from now on.

        Raises:
            ConfigError: One can't be used; nothing has changed.
        """
        context, keys = None, PskKeys({})
        if config.mode != "off":
            context = _context()
            if config.psk is not None:
                keys = load_psk(config.psk)
                keys.install(context)
                context.set_ciphers(_PSK_CIPHERS)
            else:
                _load_certificates(context, config)
        self.mode = _MODES[config.mode]
        self._context = context
        self._keys = keys

    async def start(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket
    ) -> tuple[ssl.SSLSocket, str | None]:
        """Do the TLS handshake on a socket, which then belongs to what is returned.

        Returns:
            The encrypted socket, and whose pre-shared key the client has.

        Raises:
            OSError: It failed; `explain` says why.
        """
        if self._context is None:
            raise ConnectionAbortedError("TLS was switched off")
        keys = self._keys
        encrypted = self._context.wrap_socket(
            sock, server_side=True, do_handshake_on_connect=False
        )
        user: str | None = None
        try:
            while True:
                keys.forget()
                try:
                    encrypted.do_handshake()
                except ssl.SSLWantReadError:
                    user = keys.user or user
                    await readable(loop, encrypted.fileno())
                except ssl.SSLWantWriteError:
                    user = keys.user or user
                    await writable(loop, encrypted.fileno())
                else:
                    return encrypted, keys.user or user
        except BaseException:
            encrypted.close()
            raise


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    # Connections last, so resuming them saves nothing. And who resumes shows no
    # certificate again: one that is refused by now would still open the door.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    return context


def _load_certificates(context: ssl.SSLContext, config: TlsConfig) -> None:
    load_own(context, config.certificate or "", config.key or "")
    if config.ca is not None:
        judge_certificates(config.ca)
        context.load_verify_locations(config.ca)
        required = config.verify_client
        context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL


def certificate_names(sock: ssl.SSLSocket) -> tuple[str | None, str | None]:
    """Return the common name and the whole subject of a verified certificate."""
    certificate: dict[str, Any] = dict(sock.getpeercert() or {})
    pairs = [pair for part in certificate.get("subject", ()) for pair in part]
    if not pairs:
        return None, None
    names = [value for kind, value in pairs if kind == "commonName"]
    # the most specific part first, as people write it (RFC 4514)
    subject = ",".join(
        f"{_SHORT.get(kind, kind)}={_escaped(value)}" for kind, value in reversed(pairs)
    )
    return (names[-1] if names else None), subject


def _escaped(value: str) -> str:
    """Return a value as RFC 4514, 2.4 writes it, so that it can't look like two."""
    text = re.sub(r'([,+"\\<>;])', r"\\\1", value).replace("\0", "\\00")
    if text.startswith((" ", "#")):
        text = f"\\{text}"
    if value.endswith(" ") and len(value) > 1:
        text = f"{text[:-1]}\\ "
    return text


_SHORT: Final = {
    "commonName": "CN",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "localityName": "L",
    "stateOrProvinceName": "ST",
    "countryName": "C",
}

#: What OpenSSL calls the usual failures, in words for the operator.
_REASONS: Final = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the client has no certificate",
    "TLSV1_ALERT_UNKNOWN_CA": "the client does not know who signed our certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the client refuses our certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "the client refuses our certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the client finds our certificate expired",
    "BINDER_DOES_NOT_VERIFY": "the client has a wrong pre-shared key",
    "DECRYPTION_FAILED_OR_BADRECORD_MAC": "the client has a wrong key",
    "NO_SHARED_CIPHER": "no cipher or key that both sides know",
    "NO_SUITABLE_SIGNATURE_ALGORITHM": "no signature algorithm that both sides know",
    "UNSUPPORTED_PROTOCOL": "the client offers no TLS 1.2 or 1.3",
    "WRONG_VERSION_NUMBER": "what the client sent is not TLS",
    "HTTP_REQUEST": "what the client sent is not TLS",
}


def explain(error: OSError) -> str:
    """Return in one line why a TLS handshake failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the client's certificate: {error.verify_message}"
    if isinstance(error, ssl.SSLEOFError) or not isinstance(error, ssl.SSLError):
        return "the client closed the connection during the TLS handshake"
    reason = error.reason or ""
    return _REASONS.get(reason) or reason.replace("_", " ").lower() or str(error)
