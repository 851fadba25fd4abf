"""From a passphrase to the master key of a LUKS header, and back into a key slot.

As in the "LUKS1 On-Disk Format Specification": PBKDF2 makes a key of the passphrase, which
decrypts the slot's key material, which the anti-forensic splitter merges into the master
key, which the header's digest confirms. Everything here takes time (seconds, by
intent) and is called in threads; PBKDF2 releases the GIL.
"""

import hashlib
import hmac
import secrets
import time
import uuid
from dataclasses import dataclass
from typing import Final

from nbdserve.errors import ImageFormatError
from nbdserve.formats.crypto.image_cipher import make_cipher
from nbdserve.formats.crypto.luks import (
    DIGEST_LENGTH,
    MAX_ITERATIONS,
    SALT_LENGTH,
    SECTOR,
    SLOTS,
    STRIPES,
    CipherSpec,
    KeySlot,
    LuksHeader,
    new_layout,
)

#: As in qemu, which also takes an eighth of a passphrase's time for the digest.
_MIN_ITERATIONS: Final = 1000
#: Long enough to time PBKDF2, in seconds of this thread.
_TRIAL_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class NewSlot:
    """A slot that holds the master key, and its key material."""

    slot: KeySlot
    material: bytes


def pbkdf2(
    hash_name: str, passphrase: bytes, salt: bytes, iterations: int, length: int
) -> bytes:
    """Return a key of `length` bytes.

    Raises:
        ImageFormatError: This Python does not have the hash.
    """
    try:
        return hashlib.pbkdf2_hmac(hash_name, passphrase, salt, iterations, length)
    except ValueError as error:
        raise ImageFormatError(
            f"the hash {hash_name!r} is not supported: this Python does not have it"
        ) from error


def open_slot(
    header: LuksHeader, slot: KeySlot, material: bytes, passphrase: bytes
) -> bytes | None:
    """Return the master key if the passphrase opens this slot.

    Args:
        header: The header.
        slot: An active slot of it.
        material: Its key material, as it is in the file.
        passphrase: To try.

    Raises:
        ConfigError: The packages for it are not installed.
        ImageFormatError: The cipher or the hash is not at hand.
    """
    key_bytes = header.cipher.key_bytes
    key = pbkdf2(header.hash_name, passphrase, slot.salt, slot.iterations, key_bytes)
    padded = bytearray(material.ljust(_whole_sectors(len(material)), b"\0"))
    make_cipher(header.cipher, key).decrypt(memoryview(padded), 0)
    master = merge(bytes(padded[: len(material)]), key_bytes, header.hash_name)
    made = _digest(header, master)
    return master if hmac.compare_digest(made, header.digest) else None


def fill_slot(
    header: LuksHeader, number: int, master: bytes, passphrase: bytes, iter_time_ms: int
) -> NewSlot:
    """Return slot `number` with the master key under a passphrase.

    Raises:
        ConfigError: The packages for it are not installed.
        ImageFormatError: The cipher or the hash is not at hand.
    """
    salt = secrets.token_bytes(SALT_LENGTH)
    iterations = iterations_for(header.hash_name, len(master), iter_time_ms)
    key = pbkdf2(header.hash_name, passphrase, salt, iterations, len(master))
    split_key = split(master, header.hash_name)
    padded = bytearray(split_key.ljust(_whole_sectors(len(split_key)), b"\0"))
    make_cipher(header.cipher, key).encrypt(memoryview(padded), 0)
    sector = header.slots[number].sector
    return NewSlot(
        KeySlot(
            active=True,
            iterations=iterations,
            salt=salt,
            sector=sector,
            stripes=STRIPES,
        ),
        bytes(padded[: len(split_key)]),
    )


def new_header(
    cipher: CipherSpec, hash_name: str, passphrase: bytes, iter_time_ms: int
) -> tuple[LuksHeader, bytes, bytes]:
    """Make a master key and keep it in slot 0 of a new header.

    Returns:
        The header, the key material of slot 0, and the master key.

    Raises:
        ConfigError: The packages for it are not installed.
        ImageFormatError: The cipher or the hash is not at hand.
    """
    master = secrets.token_bytes(cipher.key_bytes)
    places, payload_sector = new_layout(cipher.key_bytes)
    salt = secrets.token_bytes(SALT_LENGTH)
    iterations = iterations_for(hash_name, DIGEST_LENGTH, iter_time_ms // 8)
    unused = [KeySlot(False, 0, bytes(SALT_LENGTH), each, STRIPES) for each in places]
    header = LuksHeader(
        cipher=cipher,
        hash_name=hash_name,
        payload_sector=payload_sector,
        digest=pbkdf2(hash_name, master, salt, iterations, DIGEST_LENGTH),
        digest_salt=salt,
        digest_iterations=iterations,
        uuid=str(uuid.uuid4()),
        slots=tuple(unused[:SLOTS]),
    )
    made = fill_slot(header, 0, master, passphrase, iter_time_ms)
    return header.with_slot(0, made.slot), made.material, master


def iterations_for(hash_name: str, length: int, time_ms: int) -> int:
    """Return how many iterations of PBKDF2 take `time_ms` on this machine."""
    count = _MIN_ITERATIONS
    while True:
        start_s = time.thread_time()
        pbkdf2(hash_name, b"passphrase", b"salt", count, length)
        taken_s = time.thread_time() - start_s
        if taken_s >= min(_TRIAL_S, time_ms / 1000) or count >= MAX_ITERATIONS:
            break
        count *= 4
    wanted = int(count * time_ms / 1000 / max(taken_s, 1e-6))
    return min(max(wanted, _MIN_ITERATIONS), MAX_ITERATIONS)


def _digest(header: LuksHeader, master: bytes) -> bytes:
    return pbkdf2(
        header.hash_name,
        master,
        header.digest_salt,
        header.digest_iterations,
        DIGEST_LENGTH,
    )


def _whole_sectors(length: int) -> int:
    return -(-length // SECTOR) * SECTOR


# -- the anti-forensic splitter


def split(key: bytes, hash_name: str) -> bytes:
    """Spread a key over `STRIPES` times its length, all of which is needed to merge it."""
    length = len(key)
    material = secrets.token_bytes(length * (STRIPES - 1))
    block = _condensed(material, length, hash_name)
    return material + _xor(block, key)


def merge(material: bytes, key_bytes: int, hash_name: str) -> bytes:
    """Return the key that `split` has spread."""
    last = len(material) - key_bytes
    block = _condensed(material[:last], key_bytes, hash_name)
    return _xor(block, material[last:])


def _condensed(stripes: bytes, length: int, hash_name: str) -> bytes:
    """XOR each stripe to what came before, and let that diffuse: hash it piece by piece.

    Each piece is as long as a digest, the last one shorter, and has its number before it.
    """
    empty = hashlib.new(hash_name)
    size = empty.digest_size
    numbered = [
        (number.to_bytes(4, "big"), start)
        for number, start in enumerate(range(0, length, size))
    ]
    block = bytes(length)
    for offset in range(0, len(stripes), length):
        block = _xor(block, stripes[offset : offset + length])
        pieces = []
        for number, start in numbered:
            hashed = empty.copy()
            hashed.update(number + block[start : start + size])
            pieces.append(hashed.digest())
        # only the last digest can be longer than its piece
        block = b"".join(pieces)[:length]
    return block


def _xor(one: bytes, other: bytes) -> bytes:
    mixed = int.from_bytes(one, "little") ^ int.from_bytes(other, "little")
    return mixed.to_bytes(len(one), "little")
