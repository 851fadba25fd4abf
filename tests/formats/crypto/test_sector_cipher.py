"""Batches of sectors come out as OpenSSL's own modes make them, one by one."""

import hashlib
import random
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, modes
from cryptography.hazmat.primitives.ciphers.algorithms import AES

from nbdserve.errors import ImageFormatError
from nbdserve.formats.crypto.luks import SECTOR, CipherSpec
from nbdserve.formats.crypto.sector_cipher import sector_cipher


def plain64(number: int, _key: bytes) -> bytes:
    return number.to_bytes(16, "little")


def plain(number: int, _key: bytes) -> bytes:
    return (number & 0xFFFFFFFF).to_bytes(16, "little")


def essiv(number: int, key: bytes) -> bytes:
    salt = hashlib.sha256(key).digest()
    return Cipher(AES(salt), modes.ECB()).encryptor().update(plain64(number, key))


Ivs = Callable[[int, bytes], bytes]

XTS = (CipherSpec("aes", "xts", "plain64", "", 64), plain64)
VARIANTS = {
    "xts-256": XTS,
    "xts-128": (CipherSpec("aes", "xts", "plain64", "", 32), plain64),
    "xts-plain": (CipherSpec("aes", "xts", "plain", "", 64), plain),
    "xts-essiv": (CipherSpec("aes", "xts", "essiv", "sha256", 64), essiv),
    "cbc-128": (CipherSpec("aes", "cbc", "plain64", "", 16), plain64),
    "cbc-192": (CipherSpec("aes", "cbc", "plain64", "", 24), plain64),
    "cbc-256-essiv": (CipherSpec("aes", "cbc", "essiv", "sha256", 32), essiv),
    "ecb": (CipherSpec("aes", "ecb", "", "", 32), plain64),
}


def by_openssl(spec: CipherSpec, key: bytes, iv: bytes, data: bytes) -> bytes:
    if spec.mode == "ecb":
        return Cipher(AES(key), modes.ECB()).encryptor().update(data)
    if spec.mode == "cbc":
        return Cipher(AES(key), modes.CBC(iv)).encryptor().update(data)
    return Cipher(AES(key), modes.XTS(iv)).encryptor().update(data)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sectors", [1, 2, 255, 256, 257, 600])
def test_sectors_are_as_openssl_makes_them(variant: str, sectors: int) -> None:
    spec, ivs = VARIANTS[variant]
    chance = random.Random(sectors)
    key = chance.randbytes(spec.key_bytes)
    data = chance.randbytes(sectors * SECTOR)
    # a number of more than 32 bits, which "plain" cuts
    first = (1 << 32) - 5
    cipher = sector_cipher(spec, key)
    made = bytearray(data)
    cipher.encrypt(memoryview(made), first)
    for index in {0, sectors // 2, sectors - 1}:
        start = index * SECTOR
        plain_text = data[start : start + SECTOR]
        wanted = by_openssl(spec, key, ivs(first + index, key), plain_text)
        assert made[start : start + SECTOR] == wanted
    cipher.decrypt(memoryview(made), first)
    assert made == data


def test_each_tweak_has_all_its_carries() -> None:
    """Tweaks with every high bit: the shortcut for x^0 to x^31 must not lose one."""
    spec, _ = XTS
    for seed in range(200):
        key = random.Random(seed).randbytes(spec.key_bytes)
        made = bytearray(SECTOR)
        sector_cipher(spec, key).encrypt(memoryview(made), seed)
        assert made == by_openssl(spec, key, plain64(seed, key), bytes(SECTOR))


REFUSED = {
    "serpent": (CipherSpec("serpent", "xts", "plain64", "", 64), "has serpent"),
    "twofish": (CipherSpec("twofish", "cbc", "plain64", "", 32), "has twofish"),
    "ctr": (CipherSpec("aes", "ctr", "plain64", "", 32), "known modes"),
    "iv": (CipherSpec("aes", "xts", "benbi", "", 64), "known IV generators"),
    "key": (CipherSpec("aes", "xts", "plain64", "", 16), "key of 16 bytes"),
    "essiv": (CipherSpec("aes", "cbc", "essiv", "sha1", 32), "20 bytes"),
    "hash": (CipherSpec("aes", "cbc", "essiv", "whirl", 32), "'whirl' is not"),
    "hash without end": (
        CipherSpec("aes", "cbc", "essiv", "shake_128", 32),
        "no fixed length",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_at_hand_is_named(case: str) -> None:
    spec, words = REFUSED[case]
    with pytest.raises(ImageFormatError, match=words):
        sector_cipher(spec, bytes(spec.key_bytes))
