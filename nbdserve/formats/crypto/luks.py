"""The LUKS header, version 1: bytes in, a judged value out, and back.

The layout is that of the "LUKS1 On-Disk Format Specification" (cryptsetup), whose terms
are used here. A qcow2 image has such a header in clusters of its own; all offsets
in it are sectors of 512 bytes from its own beginning. Only the master key that it keeps is
used: guest data lie where the image's tables say.

A hostile number is refused where it enters. What is well formed, and asks for a cipher
that is not at hand, is refused where it is used (`CipherSpec`), so that such an
image can still be described.
"""

import struct
from dataclasses import dataclass, replace
from typing import Final

from nbdserve.errors import ImageCorruptError, ImageFormatError

MAGIC: Final = b"LUKS\xba\xbe"
LENGTH: Final = 592
SECTOR: Final = 512
SLOTS: Final = 8
#: Both qemu and cryptsetup split keys into this many stripes, and qemu takes no others.
STRIPES: Final = 4000
DIGEST_LENGTH: Final = 20
SALT_LENGTH: Final = 32
KEY_LENGTHS: Final = (16, 24, 32, 48, 64)
#: PBKDF2 makes about 3 million iterations of SHA-256 in a second. cryptsetup takes two
#: seconds' worth by default; with this bound a hostile header costs about twenty a slot
#: and passphrase, ten of them for the digest that judges the key.
MAX_ITERATIONS: Final = 1 << 25

_ACTIVE: Final = 0x00AC71F3
_INACTIVE: Final = 0x0000DEAD
_FIXED = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")
#: qemu and cryptsetup align key material to pages.
_PAGE: Final = 4096


@dataclass(frozen=True, slots=True)
class CipherSpec:
    """What a LUKS header says of its cipher.

    Attributes:
        name: The block cipher, such as "aes".
        mode: How it is used: "xts", "cbc", "ecb".
        iv_generator: "plain", "plain64", "essiv"; empty if there are no IVs.
        iv_hash: The hash for "essiv", else empty.
        key_bytes: Length of the key; XTS uses two halves.
    """

    name: str
    mode: str
    iv_generator: str
    iv_hash: str
    key_bytes: int

    @property
    def algorithm(self) -> str:
        """The cipher in qemu's words, such as aes-256."""
        halves = 2 if self.mode == "xts" else 1
        return f"{self.name}-{self.key_bytes * 8 // halves}"

    def __str__(self) -> str:
        """Spell it as cryptsetup does, with the length of one key."""
        parts = (self.algorithm, self.mode, self.iv_generator)
        text = "-".join(part for part in parts if part)
        return f"{text}:{self.iv_hash}" if self.iv_hash else text


@dataclass(frozen=True, slots=True)
class KeySlot:
    """One place for a passphrase.

    Attributes:
        active: Whether it holds the master key.
        iterations: Of PBKDF2; 0 in slots that were never used.
        salt: 32 bytes.
        sector: Where its key material begins.
        stripes: Copies of the key's length that the material has.
    """

    active: bool
    iterations: int
    salt: bytes
    sector: int
    stripes: int

    @property
    def offset(self) -> int:
        """Where its key material begins, in bytes from the header."""
        return self.sector * SECTOR


@dataclass(frozen=True, slots=True)
class LuksHeader:
    """A LUKS header.

    Attributes:
        cipher: What guest data and key material are encrypted with.
        hash_name: The hash of PBKDF2 and of the anti-forensic splitter.
        payload_sector: Where the header with all key material ends.
        digest: Tells whether a master key is the right one.
        digest_salt: 32 bytes.
        digest_iterations: Of PBKDF2.
        uuid: As text.
        slots: Always eight.
    """

    cipher: CipherSpec
    hash_name: str
    payload_sector: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    slots: tuple[KeySlot, ...]

    @property
    def length(self) -> int:
        """Bytes of the header with all key material."""
        return self.payload_sector * SECTOR

    @property
    def material_bytes(self) -> int:
        """Bytes of one slot's key material."""
        return self.cipher.key_bytes * STRIPES

    def with_slot(self, number: int, slot: KeySlot) -> "LuksHeader":
        """Return the header with another slot `number`."""
        slots = list(self.slots)
        slots[number] = slot
        return replace(self, slots=tuple(slots))


def parse_luks_header(data: bytes, length: int) -> LuksHeader:
    """Read and judge a header.

    Args:
        data: Its first bytes; `LENGTH` are enough.
        length: Bytes that the image gives to header and key material.

    Raises:
        ImageFormatError: It is no LUKS header, or not of version 1.
        ImageCorruptError: A field is out of range or contradicts another one.
    """
    if data[:6] != MAGIC:
        raise ImageFormatError("the LUKS header has no magic")
    if len(data) < LENGTH:
        raise ImageCorruptError(
            f"the LUKS header has {len(data)} bytes: {LENGTH} are needed"
        )
    (
        _magic,
        version,
        name,
        mode,
        hash_spec,
        payload_sector,
        key_bytes,
        digest,
        digest_salt,
        digest_iterations,
        uuid,
    ) = _FIXED.unpack_from(data)
    if version != 1:
        raise ImageFormatError(
            f"the LUKS header has version {version}: only 1 is known"
        )
    if key_bytes not in KEY_LENGTHS:
        raise ImageCorruptError(
            f"the LUKS header asks for a key of {key_bytes} bytes: allowed are"
            f" {', '.join(map(str, KEY_LENGTHS))}"
        )
    if not 0 < payload_sector * SECTOR <= length:
        raise ImageCorruptError(
            f"the LUKS header ends at sector {payload_sector}, but the image has"
            f" {length} bytes for it"
        )
    header = LuksHeader(
        cipher=_parse_cipher(_text(name, "cipher"), _text(mode, "mode"), key_bytes),
        hash_name=_text(hash_spec, "hash"),
        payload_sector=payload_sector,
        digest=digest,
        digest_salt=digest_salt,
        digest_iterations=digest_iterations,
        uuid=_text(uuid, "UUID"),
        slots=tuple(
            _parse_slot(number, *_SLOT.unpack_from(data, _slot_offset(number)))
            for number in range(SLOTS)
        ),
    )
    _check_iterations("the master key's digest", digest_iterations)
    _check_slots(header)
    return header


def _text(field: bytes, what: str) -> str:
    text, end, _ = field.partition(b"\0")
    if not end or not text.isascii() or not text.decode("ascii").isprintable():
        raise ImageCorruptError(f"the LUKS header's {what} is no text: {field!r}")
    return text.decode("ascii")


def _parse_cipher(name: str, mode: str, key_bytes: int) -> CipherSpec:
    mode, _, generator = mode.partition("-")
    generator, _, iv_hash = generator.partition(":")
    if mode == "ecb":
        # qemu names a generator here too, for IVs that nobody uses
        generator = iv_hash = ""
    return CipherSpec(name, mode, generator, iv_hash, key_bytes)


def _parse_slot(
    number: int, state: int, iterations: int, salt: bytes, sector: int, stripes: int
) -> KeySlot:
    if state not in (_ACTIVE, _INACTIVE):
        raise ImageCorruptError(
            f"key slot {number} is neither active nor inactive: {state:#010x}"
        )
    return KeySlot(state == _ACTIVE, iterations, salt, sector, stripes)


def _check_iterations(what: str, iterations: int) -> None:
    if not 0 < iterations <= MAX_ITERATIONS:
        raise ImageCorruptError(
            f"{what} asks for {iterations} iterations: must be 1 to {MAX_ITERATIONS}, so"
            " that opening the image takes seconds"
        )


def _check_slots(header: LuksHeader) -> None:
    sectors = -(-header.material_bytes // SECTOR)
    end_of_last = -(-LENGTH // SECTOR)
    for number, slot in sorted(
        enumerate(header.slots), key=lambda each: each[1].sector
    ):
        if slot.stripes != STRIPES:
            raise ImageCorruptError(
                f"key slot {number} has {slot.stripes} stripes: must be {STRIPES}"
            )
        if slot.sector < end_of_last or slot.sector + sectors > header.payload_sector:
            raise ImageCorruptError(
                f"the material of key slot {number} at sector {slot.sector} overlaps"
                " the header, another slot's, or its end"
            )
        end_of_last = slot.sector + sectors
        if slot.active:
            _check_iterations(f"key slot {number}", slot.iterations)


def new_layout(key_bytes: int) -> tuple[tuple[int, ...], int]:
    """Return where a new header has its key material, and where it ends, in sectors."""
    step = -(-key_bytes * STRIPES // _PAGE) * _PAGE
    places = range(_PAGE, _PAGE + SLOTS * step, step)
    return tuple(place // SECTOR for place in places), (_PAGE + SLOTS * step) // SECTOR


def encode_luks_header(header: LuksHeader) -> bytes:
    """Return the `LENGTH` bytes of a header."""
    cipher = header.cipher
    # qemu does not read a mode without an IV generator
    mode = f"{cipher.mode}-{cipher.iv_generator or 'plain64'}"
    if cipher.iv_hash:
        mode += f":{cipher.iv_hash}"
    fixed = _FIXED.pack(
        MAGIC,
        1,
        cipher.name.encode(),
        mode.encode(),
        header.hash_name.encode(),
        header.payload_sector,
        cipher.key_bytes,
        header.digest,
        header.digest_salt,
        header.digest_iterations,
        header.uuid.encode(),
    )
    return fixed + b"".join(_encode_slot(slot) for slot in header.slots)


def _encode_slot(slot: KeySlot) -> bytes:
    state = _ACTIVE if slot.active else _INACTIVE
    return _SLOT.pack(state, slot.iterations, slot.salt, slot.sector, slot.stripes)


def _slot_offset(number: int) -> int:
    return _FIXED.size + number * _SLOT.size


def slot_state(number: int, *, active: bool) -> tuple[int, bytes]:
    """Return offset and bytes of what makes a slot active or not; within one sector."""
    return _slot_offset(number), (_ACTIVE if active else _INACTIVE).to_bytes(4, "big")


def slot_fields(number: int, slot: KeySlot) -> tuple[int, bytes]:
    """Return offset and bytes of the rest of a slot. Slot 6 lies across two sectors."""
    return _slot_offset(number) + 4, _encode_slot(slot)[4:]
