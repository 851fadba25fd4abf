"""How connections are encrypted, as the operator put it."""

import os
from dataclasses import dataclass
from typing import Literal, get_args

from nbdserve.errors import ConfigError

#: Section "TLS support" of doc/proto.md: NOTLS, SELECTIVETLS and FORCEDTLS.
TlsChoice = Literal["off", "allow", "require"]
TLS_CHOICES: tuple[str, ...] = get_args(TlsChoice)

#: The files of a folder as qemu and nbdkit look for them.
_CA_FILE = "ca-cert.pem"
_CERTIFICATE_FILE = "server-cert.pem"
_KEY_FILE = "server-key.pem"


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """Certificates or pre-shared keys, and whether clients have to use them.

    Certificates and pre-shared keys exclude each other, as in qemu: a server with both
    would have to decide which of them a client has proven.

    Attributes:
        mode: Whether clients may, or must, use TLS.
        certificate: PEM file of the server's certificate and its chain.
        key: PEM file of its private key, not encrypted.
        ca: PEM file of the authorities whose client certificates are valid; with it,
            clients are asked for one.
        verify_client: Whether clients must have one.
        psk: File of pre-shared keys: lines of `USER:KEY`, the key in hexadecimal.
    """

    mode: TlsChoice = "off"
    certificate: str | None = None
    key: str | None = None
    ca: str | None = None
    verify_client: bool = False
    psk: str | None = None

    def __post_init__(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            ConfigError: Something is missing, or two things exclude each other.
        """
        if self.psk is not None and (self.certificate or self.key or self.ca):
            raise ConfigError(
                "TLS: pre-shared keys and certificates exclude each other"
            )
        if bool(self.certificate) != bool(self.key):
            raise ConfigError(
                "TLS: a certificate needs its key, and a key its certificate"
            )
        if self.verify_client and not self.ca:
            raise ConfigError(
                "TLS: to verify client certificates, name the authority with --tls-ca"
            )
        if self.mode != "off" and not (self.certificate or self.psk):
            raise ConfigError(
                f"--tls {self.mode} needs --tls-cert and --tls-key, --tls-certificates"
                " or --tls-psk"
            )

    @classmethod
    def build(  # noqa: PLR0913 -- keywords, one for each option
        cls,
        *,
        mode: TlsChoice | None = None,
        certificates: str | None = None,
        certificate: str | None = None,
        key: str | None = None,
        ca: str | None = None,
        verify_client: bool = False,
        psk: str | None = None,
    ) -> "TlsConfig":
        """Put options together.

        Args:
            mode: None is "require" if there is something to encrypt with: whoever
                names certificates does not want plain connections by accident.
            certificates: A folder with server-cert.pem, server-key.pem and, if there
                are to be client certificates, ca-cert.pem.
            certificate: Instead of the folder's, as all that follow.
            key: Of the server.
            ca: Of client certificates.
            verify_client: Whether clients must have one.
            psk: Pre-shared keys.

        Raises:
            ConfigError: Something is missing, or two things exclude each other.
        """
        if certificates is not None:
            certificate = certificate or os.path.join(certificates, _CERTIFICATE_FILE)
            key = key or os.path.join(certificates, _KEY_FILE)
            authority = os.path.join(certificates, _CA_FILE)
            if ca is None and (verify_client or os.path.exists(authority)):
                ca = authority
        if mode is None:
            mode = "require" if certificate or psk else "off"
        return cls(mode, certificate, key, ca, verify_client, psk)
