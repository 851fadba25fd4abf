"""The cipher of an open image: what stands between its clusters and a guest."""

from typing import TYPE_CHECKING, Final

from nbdserve.errors import ConfigError
from nbdserve.formats.crypto.luks import SECTOR, CipherSpec
from nbdserve.storage.base import Buffer
from nbdserve.storage.executor import run

if TYPE_CHECKING:
    from nbdserve.formats.crypto.sector_cipher import SectorCipher

#: What is more goes to a thread: this much takes about 150 us, and the way to a thread
#: and back 100. While it is there the loop serves others, on another core.
_INLINE: Final = 256 << 10


def make_cipher(spec: CipherSpec, key: bytes) -> "SectorCipher":
    """Return a cipher for sectors.

    Raises:
        ConfigError: The packages for it are not installed.
        ImageFormatError: It is not at hand.
    """
    try:
        # late: an image that is not encrypted needs none of it
        from nbdserve.formats.crypto.sector_cipher import (  # noqa: PLC0415
            sector_cipher,
        )
    except ImportError as error:
        raise ConfigError(
            f"encrypted images need more packages ({error.name} is missing): pip install"
            " 'nbdserve[crypto]'"
        ) from error
    return sector_cipher(spec, key)


class ImageCipher:
    """Encrypts and decrypts guest data, whole sectors of 512 bytes.

    Attributes:
        by_guest: Whether sectors are numbered by guest offsets (legacy AES); otherwise
            by host offsets (LUKS).
        key: The master key.
    """

    def __init__(self, spec: CipherSpec, key: bytes, *, by_guest: bool) -> None:
        """Prepare for one caller; more are made when calls overlap.

        Raises:
            ConfigError: The packages for it are not installed.
            ImageFormatError: The cipher is not at hand.
        """
        self.by_guest = by_guest
        self._spec = spec
        self.key = key
        self._idle = [make_cipher(spec, key)]

    async def decrypt(
        self, view: memoryview, guest_offset: int, host_offset: int
    ) -> None:
        """Decrypt in place; the offsets are where `view` was read from."""
        sector = self._sector(guest_offset, host_offset)
        if len(view) <= _INLINE:
            self._decrypt(view, sector)
        else:
            await run(self._decrypt, view, sector)

    async def encrypt(
        self, data: Buffer, guest_offset: int, host_offset: int
    ) -> memoryview:
        """Return `data` encrypted; the offsets are where it will be written."""
        encrypted = memoryview(bytearray(data))
        sector = self._sector(guest_offset, host_offset)
        if len(encrypted) <= _INLINE:
            self._encrypt(encrypted, sector)
        else:
            await run(self._encrypt, encrypted, sector)
        return encrypted

    def _sector(self, guest_offset: int, host_offset: int) -> int:
        return (guest_offset if self.by_guest else host_offset) // SECTOR

    def _decrypt(self, view: memoryview, sector: int) -> None:
        cipher = self._take()
        cipher.decrypt(view, sector)
        self._idle.append(cipher)

    def _encrypt(self, view: memoryview, sector: int) -> None:
        cipher = self._take()
        cipher.encrypt(view, sector)
        self._idle.append(cipher)

    def _take(self) -> "SectorCipher":
        """Return a cipher that nobody uses."""
        try:
            return self._idle.pop()
        except IndexError:
            return make_cipher(self._spec, self.key)
