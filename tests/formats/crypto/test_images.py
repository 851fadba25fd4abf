"""Encrypted images, ours and qemu's, read and written by both."""

import asyncio
import random
import struct
import sys
from pathlib import Path

import pytest

import nbdserve
from nbdserve.block.device import BlockDevice
from nbdserve.errors import (
    ConfigError,
    ImageCorruptError,
    ImageError,
    ImageFormatError,
    ImageLockedError,
)
from nbdserve.formats.check import check_image
from nbdserve.formats.create import create_image
from nbdserve.formats.crypto.luks import CipherSpec
from nbdserve.formats.crypto.new_luks import NewLuks
from nbdserve.formats.crypto.secret import Secret, read_secret
from nbdserve.formats.open import OpeningImage
from nbdserve.formats.qcow2.header import parse_header
from nbdserve.formats.qcow2.image import Qcow2Image
from tests.helpers.encrypted import PASSPHRASE, Qemu, create_luks, quick_luks
from tests.helpers.tools import run

MIB = 1 << 20
SIZE = 4 * MIB

#: Ciphers of headers that we make and qemu opens: it takes seconds to make one.
CIPHERS = {
    "xts-256": CipherSpec("aes", "xts", "plain64", "", 64),
    "xts-192": CipherSpec("aes", "xts", "plain64", "", 48),
    "xts-128": CipherSpec("aes", "xts", "plain64", "", 32),
    "xts-plain": CipherSpec("aes", "xts", "plain", "", 64),
    "cbc-plain": CipherSpec("aes", "cbc", "plain", "", 16),
    "cbc-essiv": CipherSpec("aes", "cbc", "essiv", "sha256", 32),
    "ecb": CipherSpec("aes", "ecb", "", "", 32),
}
#: Format, encryption and options for qemu-img create.
BY_QEMU = {
    "luks": ("qcow2", "luks", ""),
    "legacy": ("qcow2", "aes", ""),
    "legacy-v2-512": ("qcow2", "aes", "compat=0.10,cluster_size=512"),
    "legacy-v1": ("qcow", "aes", ""),
}


def opened(path: Path, *, read_only: bool = False) -> OpeningImage:
    return nbdserve.open_image(path, read_only=read_only, secrets=[PASSPHRASE])


async def scribble(image: BlockDevice, mirror: bytearray, seed: int) -> None:
    """Write, zero and trim, at sectors and anywhere, some of it at once."""
    chance = random.Random(seed)

    async def write(offset: int, length: int) -> None:
        data = chance.randbytes(length)
        mirror[offset : offset + length] = data
        await image.write(offset, data)

    async def zero(offset: int, length: int) -> None:
        mirror[offset : offset + length] = bytes(length)
        await image.write_zeroes(offset, length)

    size = image.size
    for step in range(30):
        unit = 1 if step % 3 == 0 else 512
        length = min(chance.choice([1, 3, 8, 100, 700]) * unit, size)
        offset = chance.randrange((size - length) // unit + 1) * unit
        await (zero if step % 7 == 3 else write)(offset, length)
    # apart from each other, but in the same sectors and clusters
    start = chance.randrange(size // 2)
    await asyncio.gather(*(write(start + 100 * index, 100) for index in range(40)))
    await write(size - 1, 1)


@pytest.mark.parametrize("variant", BY_QEMU)
async def test_what_qemu_made_is_read_and_written_by_both(
    tmp_path: Path, variant: str
) -> None:
    image_format, encryption, options = BY_QEMU[variant]
    qemu = Qemu(tmp_path / "disk", image_format=image_format)
    qemu.create(SIZE, encryption, options)
    await take_turns(qemu)


@pytest.mark.parametrize(
    ("name", "hash_name"),
    [
        *((name, "sha256") for name in CIPHERS),
        ("xts-256", "sha1"),
        ("xts-128", "sha512"),
    ],
)
async def test_each_cipher_is_read_and_written_by_both(
    tmp_path: Path, name: str, hash_name: str
) -> None:
    qemu = Qemu(tmp_path / "disk")
    luks = NewLuks(CIPHERS[name], hash_name, PASSPHRASE, 1)
    create_image(qemu.path, SIZE, encryption=luks)
    await take_turns(qemu)


async def take_turns(qemu: Qemu) -> None:
    """Write by qemu, then by us, then by qemu; each reads what the other wrote."""
    qemu.io("write -P 7 0 100k", "write -P 9 1M 512", "write -P 3 2000k 700k")
    mirror = bytearray(qemu.content())
    async with opened(qemu.path, read_only=True) as image:
        assert await image.read(0, SIZE) == mirror
        assert await image.read(1000, 12345) == mirror[1000:13345]
    async with opened(qemu.path) as image:
        assert image.minimum_block == 512
        await scribble(image, mirror, seed=1)
        assert await image.read(0, SIZE) == mirror
    assert qemu.content() == mirror
    if qemu.format == "qcow2":
        qemu.check()
    qemu.io("write -P 5 10k 64k", "write -z 200k 100k")
    mirror[10 << 10 : 74 << 10] = b"\5" * (64 << 10)
    mirror[200 << 10 : 300 << 10] = bytes(100 << 10)
    async with opened(qemu.path, read_only=True) as image:
        assert await image.read(0, SIZE) == mirror
    result = check_image(qemu.path)
    assert result is not None
    assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0)


@pytest.mark.parametrize(
    ("cluster_size", "compat"), [(512, 2), (65536, 3), (2 * MIB, 3)]
)
async def test_what_we_make_qemu_reads(
    tmp_path: Path, compat: int, cluster_size: int
) -> None:
    qemu = Qemu(tmp_path / "disk.qcow2")
    create_luks(qemu.path, SIZE, compat=compat, cluster_size=cluster_size)
    qemu.check()
    mirror = bytearray(SIZE)
    assert qemu.content() == mirror
    async with opened(qemu.path) as image:
        await scribble(image, mirror, seed=2)
    qemu.check()
    assert qemu.content() == mirror
    # nothing of it is in the file
    data = qemu.path.read_bytes()
    written = [mirror[at : at + 64] for at in range(0, SIZE, 4096)]
    assert not any(piece in data for piece in written if any(piece))


def rebase(qemu: Qemu, backing: Path, backing_format: str) -> None:
    """Give an image a backing file, whatever it shows then."""
    words = ["-u", "-b", str(backing), "-F", backing_format]
    run("qemu-img", "rebase", *words, *qemu.object, "--image-opts", qemu.options)


async def test_an_overlay_and_its_backing_file_have_passphrases_of_their_own(
    tmp_path: Path,
) -> None:
    base = Qemu(tmp_path / "base.qcow2", passphrase=b"below")
    create_image(base.path, SIZE, encryption=quick_luks(passphrase=b"below"))
    base.io("write -P 7 0 3M")
    top = Qemu(tmp_path / "top.qcow2")
    create_luks(top.path, SIZE)
    rebase(top, base.path, "qcow2")
    secrets = [Secret(PASSPHRASE), Secret(b"below", "below.txt")]
    async with nbdserve.open_image(top.path, secrets=secrets) as image:
        assert await image.read(0, MIB) == b"\7" * MIB
        await image.write(70000, b"over")
        mirror = await image.read(0, SIZE)
    assert mirror[70000:70004] == b"over"
    assert mirror[:70000] == b"\7" * 70000
    async with nbdserve.open_image(top.path, read_only=True, secrets=secrets) as image:
        assert await image.read(0, SIZE) == mirror
    with pytest.raises(
        ImageLockedError, match=r"base.qcow2.*opens with the passphrase"
    ):
        await opened(top.path)


async def test_snapshots_sizes_and_versions(tmp_path: Path) -> None:
    qemu = Qemu(tmp_path / "disk.qcow2")
    create_luks(qemu.path, SIZE)
    mirror = bytearray(SIZE)
    async with opened(qemu.path) as image:
        assert isinstance(image, Qcow2Image)
        await scribble(image, mirror, seed=3)
        old = bytes(mirror)
        await image.create_snapshot("old")
        await scribble(image, mirror, seed=4)
        await image.resize(SIZE + 66048)
        mirror += bytes(66048)
        assert await image.read(0, image.size) == mirror
        await image.write(SIZE - 5, b"across the old end")
        mirror[SIZE - 5 : SIZE + 13] = b"across the old end"
    assert qemu.content() == mirror
    qemu.check()
    snapshot = nbdserve.open_image(
        qemu.path, read_only=True, snapshot="old", secrets=[PASSPHRASE]
    )
    async with snapshot as image:
        assert await image.read(0, image.size) == old
    async with opened(qemu.path) as image:
        assert isinstance(image, Qcow2Image)
        await image.apply_snapshot("old")
        await image.delete_snapshot("old")
        assert await image.read(0, SIZE) == old
        await image.resize(MIB, shrink=True)
        await image.resize(SIZE)
        assert await image.read(0, SIZE) == old[:MIB] + bytes(SIZE - MIB)
    qemu.check()


async def test_zero_clusters_over_a_backing_file_become_encrypted_zeros(
    tmp_path: Path,
) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"\7" * SIZE)
    qemu = Qemu(tmp_path / "disk.qcow2")
    create_luks(qemu.path, SIZE)
    rebase(qemu, base, "raw")
    async with opened(qemu.path) as image:
        assert isinstance(image, Qcow2Image)
        await image.write_zeroes(0, MIB)
        await image.prepare_version(2)
    mirror = bytes(MIB) + b"\7" * (SIZE - MIB)
    assert qemu.content() == mirror
    qemu.check()


async def test_one_line_says_what_is_wrong_with_the_passphrase(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_luks(path, SIZE)
    with pytest.raises(ImageLockedError, match=r"encrypted \(LUKS\).*--secret-file"):
        await nbdserve.open_image(path)
    secret = tmp_path / "secret"
    secret.write_bytes(PASSPHRASE + b"\n")
    wrong = [read_secret(secret), Secret(b"x", "x.txt")]
    with pytest.raises(ImageLockedError) as caught:
        await nbdserve.open_image(path, secrets=wrong)
    text = str(caught.value)
    assert text == (
        f"{path}: none of its 1 key slots opens with {secret} ({secret} ends with a"
        " newline, which counts) or x.txt"
    )
    assert PASSPHRASE.decode() not in repr(wrong)
    for content, words in ((b"", "is empty"), (bytes(1 << 21), "more than 1048576")):
        secret.write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            read_secret(secret)
    with pytest.raises(ConfigError, match="No such file"):
        read_secret(tmp_path / "missing")


async def test_legacy_images_take_one_passphrase(tmp_path: Path) -> None:
    qemu = Qemu(tmp_path / "disk")
    qemu.create(SIZE, "aes")
    with pytest.raises(ImageLockedError, match=r"legacy AES.*--secret-file"):
        await nbdserve.open_image(qemu.path)
    with pytest.raises(ImageLockedError, match="which of 2 passphrases"):
        await nbdserve.open_image(qemu.path, secrets=[b"a", b"b"])


async def test_missing_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.qcow2"
    create_luks(path, SIZE)
    monkeypatch.delitem(sys.modules, "nbdserve.formats.crypto.sector_cipher")
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for name in [name for name in sys.modules if name.startswith("cryptography.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'nbdserve\[crypto\]'"):
        await opened(path)


class Patched:
    """A LUKS image whose headers can be changed."""

    def __init__(self, path: Path) -> None:
        create_luks(path, SIZE)
        self.path = path
        self.data = bytearray(path.read_bytes())
        header = parse_header(bytes(self.data), len(self.data))
        assert header.luks is not None
        self.luks, self.length = header.luks

    def put(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data
        self.path.write_bytes(self.data)

    @property
    def extension(self) -> int:
        return self.data.index(struct.pack(">II", 0x0537BE77, 16)) + 8


#: Where to write what, into which header; how that is refused.
HOSTILE: dict[str, tuple[str, int, bytes, type[ImageError], str]] = {
    "far": (
        "extension",
        0,
        struct.pack(">Q", 1 << 40),
        ImageCorruptError,
        "past the end",
    ),
    "long": ("extension", 8, struct.pack(">Q", 1 << 62), ImageCorruptError, "too long"),
    "short": ("extension", 8, struct.pack(">Q", 100), ImageCorruptError, "100 bytes"),
    "magic": ("luks", 0, b"nothing", ImageFormatError, "no magic"),
    "cipher": ("luks", 8, b"serpent\0", ImageFormatError, "serpent-256-xts-plain64 is"),
    "slow": ("luks", 212, b"\xff" * 4, ImageCorruptError, "slot 0 asks for 4294967295"),
}


@pytest.mark.parametrize("case", HOSTILE)
async def test_hostile_headers_are_refused_at_once(tmp_path: Path, case: str) -> None:
    where, offset, data, kind, words = HOSTILE[case]
    image = Patched(tmp_path / "disk.qcow2")
    image.put((image.luks if where == "luks" else image.extension) + offset, data)
    for read_only in (True, False):
        with pytest.raises(kind, match=words) as caught:
            await opened(image.path, read_only=read_only)
        assert "\n" not in str(caught.value)
        assert image.path.name in str(caught.value)


async def test_an_l2_entry_must_not_name_the_luks_header(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_luks(path, SIZE)
    async with opened(path) as image:
        await image.write(0, bytes(65536))
    data = path.read_bytes()
    header = parse_header(data, len(data))
    assert header.luks is not None
    (l1,) = struct.unpack_from(">Q", data, header.l1_table_offset)
    word = header.luks[0] | 1 << 63
    with path.open("r+b") as file:
        file.seek(l1 & ((1 << 56) - 512))
        file.write(struct.pack(">Q", word))
    image = await opened(path)
    with pytest.raises(ImageCorruptError, match="metadata"):
        await image.write(0, b"\xff" * 512)
    await image.close()
    async with opened(path, read_only=True) as image:
        # still opens: the header was not overwritten
        assert await image.read(65536, 512) == bytes(512)


async def test_compaction_encrypts_anew_what_it_moves(tmp_path: Path) -> None:
    qemu = Qemu(tmp_path / "disk.qcow2")
    create_luks(qemu.path, SIZE, cluster_size=4096)
    mirror = bytearray(random.Random(1).randbytes(SIZE))
    async with opened(qemu.path) as image:
        await image.write(0, mirror)
        await image.trim(MIB, 2 * MIB)
        mirror[MIB : 3 * MIB] = bytes(2 * MIB)
        assert isinstance(image, Qcow2Image)
        await image.flush()
    before = qemu.path.stat().st_size
    async with opened(qemu.path) as image:
        assert isinstance(image, Qcow2Image)
        await image.compact()
        assert await image.read(0, SIZE) == mirror
    assert qemu.path.stat().st_size < before - MIB
    assert qemu.content() == mirror
    qemu.check()
