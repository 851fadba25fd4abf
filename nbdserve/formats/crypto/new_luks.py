"""The LUKS header of a new image: chosen, made once, and put into clusters."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from nbdserve.errors import ConfigError
from nbdserve.formats.crypto.image_cipher import ImageCipher
from nbdserve.formats.crypto.luks import (
    SECTOR,
    CipherSpec,
    LuksHeader,
    encode_luks_header,
    new_layout,
)
from nbdserve.formats.crypto.secret import Secret

#: By the name of the option. New images always have XTS with plain64, as qemu's have
#: by default; other modes are only opened.
CIPHERS: Final = {
    f"aes-{bits}": CipherSpec("aes", "xts", "plain64", "", bits // 4)
    for bits in (128, 192, 256)
}
DEFAULT_CIPHER: Final = "aes-256"
_HASH: Final = "sha256"
_MAX_ITER_TIME_MS: Final = 60_000
#: qemu's default.
DEFAULT_ITER_TIME_MS: Final = 2000


@dataclass(frozen=True)
class NewLuks:
    """A LUKS header whose slot 0 opens with the operator's passphrase.

    It is made when it is first asked for, which takes seconds by intent: so whatever can
    be wrong with the image that is to have it is refused before.

    Attributes:
        spec: How guest data and key material are encrypted.
        hash_name: Of PBKDF2 and the anti-forensic splitter.
        passphrase: Every byte of it.
        iter_time_ms: How long trying it shall take on this machine.
    """

    spec: CipherSpec
    hash_name: str
    passphrase: bytes = field(repr=False)
    iter_time_ms: int

    @property
    def length(self) -> int:
        """Bytes of header and key material; known at once."""
        return _bytes(self.spec)

    @property
    def header(self) -> LuksHeader:
        """The header."""
        return self._made[0]

    @property
    def material(self) -> bytes:
        """The key material of slot 0."""
        return self._made[1]

    @property
    def key(self) -> bytes:
        """The master key."""
        return self._made[2]

    def encode(self) -> bytes:
        """Return the bytes up to the end of slot 0; zeros follow."""
        data = encode_luks_header(self.header)
        return data.ljust(self.header.slots[0].offset, b"\0") + self.material

    def cipher(self) -> ImageCipher:
        """Return the cipher of the image."""
        return ImageCipher(self.spec, self.key, by_guest=False)

    @cached_property
    def _made(self) -> tuple[LuksHeader, bytes, bytes]:
        from nbdserve.formats.crypto.keys import new_header  # noqa: PLC0415 -- hashlib

        return new_header(self.spec, self.hash_name, self.passphrase, self.iter_time_ms)


def luks_bytes(cipher: str = DEFAULT_CIPHER) -> int:
    """Return how long header and key material of a new image are.

    Raises:
        ConfigError: There is no such cipher.
    """
    return _bytes(_spec(cipher))


def _bytes(spec: CipherSpec) -> int:
    _, end = new_layout(spec.key_bytes)
    return end * SECTOR


def new_luks(
    secret: Secret,
    *,
    cipher: str | None = None,
    iter_time_ms: int | None = None,
) -> NewLuks:
    """Judge what a new header is to be; it is made when it is first used.

    Args:
        secret: The passphrase.
        cipher: One of `CIPHERS`; aes-256 unless given.
        iter_time_ms: How long trying a passphrase shall take on this machine; 2000
            unless given.

    Raises:
        ConfigError: There is no such cipher, or the passphrase is nothing for qemu.
    """
    spec = _spec(cipher or DEFAULT_CIPHER)
    time_ms = DEFAULT_ITER_TIME_MS if iter_time_ms is None else iter_time_ms
    judge_iter_time(time_ms)
    secret.require_text()
    return NewLuks(spec, _HASH, secret.value, time_ms)


def judge_iter_time(time_ms: int) -> None:
    """Refuse a time that nobody wants to wait.

    Raises:
        ConfigError: Names what is allowed.
    """
    if not 1 <= time_ms <= _MAX_ITER_TIME_MS:
        raise ConfigError(
            f"iter time {time_ms}: must be 1 to {_MAX_ITER_TIME_MS} milliseconds"
        )


def _spec(cipher: str) -> CipherSpec:
    try:
        return CIPHERS[cipher]
    except KeyError:
        raise ConfigError(
            f"cipher {cipher!r}: must be one of {', '.join(CIPHERS)}"
        ) from None
