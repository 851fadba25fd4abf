"""Unlocking an image: from its header and the operator's passphrases to its cipher."""

from collections.abc import Sequence
from typing import Final

from nbdserve.errors import ImageCorruptError, ImageLockedError
from nbdserve.formats.crypto.image_cipher import ImageCipher, make_cipher
from nbdserve.formats.crypto.luks import (
    LENGTH,
    CipherSpec,
    LuksHeader,
    parse_luks_header,
)
from nbdserve.formats.crypto.secret import Secret
from nbdserve.storage.base import Storage
from nbdserve.storage.executor import run

#: The encryption of before LUKS (crypt_method 1), in qcow and qcow2: the passphrase is
#: the key, and the sectors are those of the guest.
LEGACY: Final = CipherSpec("aes", "cbc", "plain64", "", 16)


async def read_luks_header(
    storage: Storage, host_offset: int, length: int
) -> LuksHeader:
    """Read and judge the LUKS header of an image.

    Args:
        storage: The image.
        host_offset: Where it begins.
        length: Bytes of header and key material.

    Raises:
        ImageError: It is broken.
        OSError: It can't be read.
    """
    if host_offset + length > storage.size:
        raise ImageCorruptError(
            f"the encryption header at {host_offset:#x} with {length} bytes runs past the"
            f" end of the file ({storage.size} bytes)"
        )
    data = bytearray(min(LENGTH, length))
    await storage.read(host_offset, memoryview(data))
    return parse_luks_header(bytes(data), length)


async def luks_cipher(
    storage: Storage, host_offset: int, length: int, secrets: Sequence[Secret]
) -> ImageCipher:
    """Unlock an image with a LUKS header; see `read_luks_header`.

    Args:
        storage: The image.
        host_offset: Where its LUKS header begins.
        length: Bytes of header and key material.
        secrets: Tried in turn on each active key slot.

    Raises:
        ConfigError: The packages for it are not installed.
        ImageLockedError: None of the passphrases is right.
        ImageError: The header is broken, or asks for what is not at hand.
        OSError: It can't be read.
    """
    header = await read_luks_header(storage, host_offset, length)
    key = await _find_key(storage, host_offset, header, secrets)
    return ImageCipher(header.cipher, key, by_guest=False)


async def _find_key(
    storage: Storage, host_offset: int, header: LuksHeader, secrets: Sequence[Secret]
) -> bytes:
    """Return the master key; see `luks_cipher`."""
    _require_some(storage, "LUKS", secrets)
    # before seconds of work, and where it says what is missing
    make_cipher(header.cipher, bytes(header.cipher.key_bytes))
    active = [number for number, slot in enumerate(header.slots) if slot.active]
    for secret in secrets:
        for number in active:
            key = await try_slot(storage, host_offset, header, number, secret)
            if key is not None:
                return key
    raise ImageLockedError(
        f"{storage.name}: none of its {len(active)} key slots opens with"
        f" {' or '.join(secret.name + secret.hint for secret in secrets)}"
    )


async def try_slot(
    storage: Storage,
    host_offset: int,
    header: LuksHeader,
    number: int,
    secret: Secret,
) -> bytes | None:
    """Return the master key if the passphrase opens an active slot; see `luks_cipher`."""
    from nbdserve.formats.crypto.keys import open_slot  # noqa: PLC0415 -- hashlib and uuid

    slot = header.slots[number]
    material = bytearray(header.material_bytes)
    await storage.read(host_offset + slot.offset, memoryview(material))
    # in a thread: it takes seconds, by intent
    return await run(open_slot, header, slot, bytes(material), secret.value)


def legacy_cipher(storage: Storage, secrets: Sequence[Secret]) -> ImageCipher:
    """Unlock an image with crypt_method 1, for which every passphrase seems right.

    Raises:
        ConfigError: The packages for it are not installed.
        ImageLockedError: There is not exactly one passphrase.
    """
    _require_some(storage, "legacy AES", secrets)
    if len(secrets) > 1:
        raise ImageLockedError(
            f"{storage.name}: legacy AES can't tell which of {len(secrets)} passphrases"
            " is right: give one only"
        )
    key = secrets[0].value[: LEGACY.key_bytes].ljust(LEGACY.key_bytes, b"\0")
    return ImageCipher(LEGACY, key, by_guest=True)


def _require_some(storage: Storage, what: str, secrets: Sequence[Secret]) -> None:
    if not secrets:
        raise ImageLockedError(
            f"{storage.name}: is encrypted ({what}): name the file that has its"
            " passphrase, with --secret-file FILE"
        )
