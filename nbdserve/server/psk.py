"""TLS with pre-shared keys, which Python offers from 3.13 on."""

import re
import ssl
from collections.abc import Mapping
from typing import Final

from nbdserve.errors import ConfigError
from nbdserve.storage.names import shown

_LINE: Final = re.compile(r"([^:\s][^:]*):((?:[0-9A-Fa-f]{2})+)")
#: GnuTLS and OpenSSL take no more; below 16 bytes a key can be guessed.
_KEY_BYTES: Final = range(16, 257)


class PskKeys:
    """Keys by user, and whose one was asked for.

    OpenSSL tells the callback of a key no connection. But it asks during a call
    of `do_handshake`, so whoever makes that call looks here before and after it.

    Attributes:
        user: Whose key was handed out last.
    """

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._keys = keys
        self.user: str | None = None

    def forget(self) -> None:
        """Forget whose key was handed out."""
        self.user = None

    def install(self, context: ssl.SSLContext) -> None:
        """Let a context ask here.

        Raises:
            ConfigError: This Python can't.
        """
        if not getattr(ssl, "HAS_PSK", False):
            raise ConfigError(
                "TLS with pre-shared keys needs Python 3.13 or newer; use certificates,"
                " or install nbdserve with another Python"
            )
        set_callback = getattr(context, "set_psk_server_callback")  # noqa: B009
        set_callback(self._key_of)

    def _key_of(self, user: str | None) -> bytes:
        key = self._keys.get(user or "", b"")
        self.user = user if key else None
        return key


def load_psk(path: str) -> PskKeys:
    """Read a file of pre-shared keys as GnuTLS's psktool writes it.

    Raises:
        ConfigError: It can't be read, or a line of it is not `USER:HEX`.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise ConfigError(f"TLS: {shown(path)}: {reason}") from error
    keys: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None or len(found[2]) // 2 not in _KEY_BYTES:
            # never the line itself: it is a secret
            raise ConfigError(
                f"TLS: {shown(path)}, line {number}: is not USER:KEY with a key of"
                f" {_KEY_BYTES.start} to {_KEY_BYTES.stop - 1} bytes in hexadecimal"
            )
        keys[found[1]] = bytes.fromhex(found[2])
    if not keys:
        raise ConfigError(f"TLS: {shown(path)}: there is no key in it")
    return PskKeys(keys)
