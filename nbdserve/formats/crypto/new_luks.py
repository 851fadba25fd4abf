"""The LUKS header of a new image: chosen, made once, and put into clusters."""

from dataclasses import dataclass, field
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


@dataclass(frozen=True, slots=True)
class NewLuks:
    """A LUKS header whose slot 0 opens with the operator's passphrase.

    Attributes:
        header: It.
        material: The key material of slot 0.
        key: The master key.
    """

    header: LuksHeader
    material: bytes = field(repr=False)
    key: bytes = field(repr=False)

    @property
    def length(self) -> int:
        """Bytes of header and key material."""
        return self.header.length

    def encode(self) -> bytes:
        """Return the bytes up to the end of slot 0; zeros follow."""
        data = encode_luks_header(self.header)
        return data.ljust(self.header.slots[0].offset, b"\0") + self.material

    def cipher(self) -> ImageCipher:
        """Return the cipher of the image."""
        return ImageCipher(self.header.cipher, self.key, by_guest=False)


def luks_bytes(cipher: str = DEFAULT_CIPHER) -> int:
    """Return how long header and key material of a new image are.

    Raises:
        ConfigError: There is no such cipher.
    """
    _, end = new_layout(_spec(cipher).key_bytes)
    return end * SECTOR


def new_luks(
    secret: Secret,
    *,
    cipher: str | None = None,
    iter_time_ms: int | None = None,
) -> NewLuks:
    """Make a master key, and lock it with a passphrase. Takes `iter_time_ms` and a bit.

    Args:
        secret: The passphrase.
        cipher: One of `CIPHERS`; aes-256 unless given.
        iter_time_ms: How long trying a passphrase shall take on this machine; 2000
            unless given.

    Raises:
        ConfigError: There is no such cipher, the passphrase is nothing for qemu, or
            packages are missing.
    """
    from nbdserve.formats.crypto.keys import new_header  # noqa: PLC0415 -- hashlib, uuid

    spec = _spec(cipher or DEFAULT_CIPHER)
    time_ms = DEFAULT_ITER_TIME_MS if iter_time_ms is None else iter_time_ms
    judge_iter_time(time_ms)
    secret.require_text()
    return NewLuks(*new_header(spec, _HASH, secret.value, time_ms))


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
