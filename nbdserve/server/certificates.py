"""Certificates and keys from files, for both roles, and what is wrong with them.

OpenSSL says of most mistakes no more than that there is one; so files are judged one
by one before they are used together.
"""

import ssl
from typing import NoReturn

from nbdserve.errors import ConfigError
from nbdserve.storage.names import shown

#: Of keys that don't belong to the certificate: of the same kind, or of another one.
_MISMATCHES = {
    "KEY_VALUES_MISMATCH",
    "KEY_TYPE_MISMATCH",
    "NO_CERTIFICATE_ASSIGNED",
}


def load_own(context: ssl.SSLContext, certificate: str, key: str) -> None:
    """Let a context show a certificate.

    Args:
        context: Of a server or a client.
        certificate: A PEM file with the certificate and its chain.
        key: A PEM file with its private key, not encrypted; may be the same.

    Raises:
        ConfigError: A file can't be read or used, or the key belongs elsewhere.
    """
    judge_certificates(certificate)
    if b"PRIVATE KEY-----" not in _content(key):
        raise ConfigError(f"TLS: {shown(key)} is not PEM with a private key")

    def no_password() -> NoReturn:
        raise ConfigError(f"TLS: {shown(key)} is encrypted; decrypt it first")

    try:
        context.load_cert_chain(certificate, key, no_password)
    except ssl.SSLError as error:
        text = f"{shown(key)}: the private key can't be used"
        if error.reason in _MISMATCHES:
            text = f"{shown(key)} is not the key of {shown(certificate)}"
        raise ConfigError(f"TLS: {text}") from error


def judge_certificates(path: str) -> None:
    """Refuse a file without certificates, or with broken ones.

    Raises:
        ConfigError: It is one, or can't be read.
    """
    if b"CERTIFICATE-----" not in _content(path):
        raise ConfigError(f"TLS: {shown(path)} is not PEM with a certificate")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except ssl.SSLError as error:
        raise ConfigError(
            f"TLS: {shown(path)}: a certificate in it is broken"
        ) from error


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"TLS: {shown(path)}: {error.strerror}") from error
