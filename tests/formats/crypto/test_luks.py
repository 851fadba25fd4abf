"""The LUKS header: read, judged, written."""

import contextlib
import struct
from dataclasses import replace

import pytest

from nbdserve.errors import ImageCorruptError, ImageError, ImageFormatError
from nbdserve.formats.crypto.keys import fill_slot, merge, open_slot, split
from nbdserve.formats.crypto.luks import (
    LENGTH,
    MAX_ITERATIONS,
    SLOTS,
    encode_luks_header,
    parse_luks_header,
    slot_fields,
    slot_state,
)
from tests.helpers.encrypted import PASSPHRASE, quick_luks


@pytest.fixture(scope="module")
def encoded() -> bytes:
    return encode_luks_header(quick_luks().header)


def test_a_header_survives_the_way_to_bytes_and_back() -> None:
    made = quick_luks()
    data = encode_luks_header(made.header)
    assert len(data) == LENGTH
    assert parse_luks_header(data, made.length) == made.header
    assert parse_luks_header(data + bytes(100), made.length + 512) == made.header


def test_truncated_headers_are_refused(encoded: bytes) -> None:
    for length in range(LENGTH):
        with pytest.raises(ImageError):
            parse_luks_header(encoded[:length], 4 << 20)


def slot(number: int, field: int) -> int:
    return 208 + 48 * number + field


HOSTILE = {
    "magic": (0, b"LUKS\0\0", ImageFormatError, "no magic"),
    "version": (6, b"\0\2", ImageFormatError, "version 2"),
    "cipher": (8, b"a" * 32, ImageCorruptError, "cipher is no text"),
    "mode": (40, b"\xff\0", ImageCorruptError, "mode is no text"),
    "hash": (72, b"sha\n\0", ImageCorruptError, "hash is no text"),
    "payload": (104, 0xFFFFFFFF, ImageCorruptError, "ends at sector 4294967295"),
    "no payload": (104, 0, ImageCorruptError, "ends at sector 0"),
    "key": (108, 1 << 31, ImageCorruptError, "key of 2147483648 bytes"),
    "no key": (108, 0, ImageCorruptError, "key of 0 bytes"),
    "digest": (164, MAX_ITERATIONS + 1, ImageCorruptError, "digest.*iterations"),
    "no digest": (164, 0, ImageCorruptError, "digest asks for 0"),
    "state": (slot(3, 0), 1, ImageCorruptError, "key slot 3 is neither"),
    "iterations": (slot(0, 4), 0xFFFFFFFF, ImageCorruptError, "slot 0 asks.*seconds"),
    "stripes": (slot(7, 44), 0xFFFFFFFF, ImageCorruptError, "slot 7 has 4294967295"),
    "no stripes": (slot(0, 44), 0, ImageCorruptError, "slot 0 has 0 stripes"),
    "in header": (slot(0, 40), 1, ImageCorruptError, "slot 0 at sector 1 overlaps"),
    "past end": (slot(5, 40), 0xFFFFFFFF, ImageCorruptError, "slot 5.*overlaps"),
    "overlap": (slot(1, 40), 9, ImageCorruptError, "slot 1.*overlaps"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_numbers_are_refused(encoded: bytes, case: str) -> None:
    offset, value, kind, words = HOSTILE[case]
    field = value if isinstance(value, bytes) else struct.pack(">I", value)
    data = encoded[:offset] + field + encoded[offset + len(field) :]
    with pytest.raises(kind, match=words):
        parse_luks_header(data, 4 << 20)


def test_every_changed_byte_is_either_read_or_refused(encoded: bytes) -> None:
    for offset in range(LENGTH):
        for value in (0, 0xFF):
            data = bytearray(encoded)
            data[offset] = value
            with contextlib.suppress(ImageError):
                parse_luks_header(bytes(data), 4 << 20)


@pytest.mark.parametrize("length", [16, 24, 32, 48, 64])
@pytest.mark.parametrize("name", ["sha1", "sha256", "sha512"])
def test_a_split_key_can_be_merged_again(length: int, name: str) -> None:
    key = bytes(range(length))
    spread = split(key, name)
    assert len(spread) == 4000 * length
    assert merge(spread, length, name) == key
    harmed = spread[:5000] + bytes([spread[5000] ^ 1]) + spread[5001:]
    assert merge(harmed, length, name) != key


def test_any_slot_opens_with_its_passphrase() -> None:
    made = quick_luks()
    header = made.header
    key = open_slot(header, header.slots[0], made.material, PASSPHRASE)
    assert key == made.key
    other = fill_slot(header, 6, key, b"other", 1)
    header = header.with_slot(6, other.slot)
    assert open_slot(header, other.slot, other.material, b"other") == key
    assert open_slot(header, other.slot, other.material, PASSPHRASE) is None
    assert open_slot(header, header.slots[0], other.material, PASSPHRASE) is None


def test_a_slot_is_written_in_pieces_that_make_the_whole() -> None:
    header = quick_luks().header
    for number in range(SLOTS):
        filled = replace(
            header.slots[number], active=True, iterations=7, salt=bytes(range(32))
        )
        data = bytearray(encode_luks_header(header))
        for offset, piece in (
            slot_fields(number, filled),
            slot_state(number, active=True),
        ):
            data[offset : offset + len(piece)] = piece
            # what makes it count is within one sector
            assert len(piece) > 4 or offset // 512 == (offset + 3) // 512
        assert data == encode_luks_header(header.with_slot(number, filled))


def test_unknown_hashes_are_named() -> None:
    made = quick_luks()
    header = replace(made.header, hash_name="whirlpool2")
    with pytest.raises(ImageFormatError, match="'whirlpool2' is not supported"):
        open_slot(header, header.slots[0], made.material, PASSPHRASE)
