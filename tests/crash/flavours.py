"""The images that crash: small, made by qemu-img, with content in them or below them.

All of them fit into a few hundred sectors, so that a state is built, opened, read
and checked in about two milliseconds.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from nbdserve.block.device import BlockDevice, Hole
from nbdserve.block.extents import Extent
from nbdserve.formats.create import create_image
from nbdserve.formats.crypto.image_cipher import ImageCipher
from nbdserve.formats.crypto.secret import Secret
from nbdserve.formats.mapped.image import MappedImage
from nbdserve.formats.mapped.opening import EngineOptions
from nbdserve.formats.qcow1.open import Qcow1Driver
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.open import Qcow2Driver
from nbdserve.storage.base import Storage
from tests.crash.disk import Disk, Files
from tests.helpers.encrypted import PASSPHRASE, quick_luks, secret_file
from tests.helpers.tools import run

KIB: Final = 1 << 10


@dataclass(frozen=True, slots=True)
class Flavour:
    """How to make an image.

    Attributes:
        format: qcow or qcow2.
        size: Bytes of the disk.
        options: For `-o` of qemu-img.
        filled: Whether it has content of its own; over a backing file, a little.
        compressed: Whether that is compressed.
        dense: Whether it is hard to compress.
        snapshot: Whether a snapshot shares that.
        backing: Bytes of the backing file, 0 for none.
        compressed_backing: Whether the backing file is a compressed qcow2 image.
        pool: Clusters that are reserved at a time.
        padding: Bytes of the file, if it is to be longer than it has to.
        bitmaps: Whether it has persistent bitmaps: `live` records, `still` does not.
        holes: Bytes at the start of the disk that are discarded after it was filled.
        compacting: Whether it is compacted while the guest is at work.
        external: Whether there is an external data file, with old bytes wherever the
            image does not say what is there.
        raw: Whether that is a raw image by itself.
        encryption: luks, or aes for the legacy one.
    """

    format: str = "qcow2"
    size: int = 100 * KIB
    options: str = ""
    filled: bool = False
    compressed: bool = False
    dense: bool = False
    snapshot: bool = False
    backing: int = 0
    compressed_backing: bool = False
    pool: int = 8
    padding: int = 0
    bitmaps: bool = False
    holes: int = 0
    compacting: bool = False
    external: bool = False
    raw: bool = False
    encryption: str = ""


DATA_FILE: Final = "data.raw"
_4K: Final = "cluster_size=4k"
_V2: Final = "compat=0.10,cluster_size=4k"
_512: Final = "cluster_size=512"
_SUB: Final = "extended_l2=on,cluster_size=16k"

FLAVOURS: Final = {
    "v3": Flavour(options=_4K),
    "v2": Flavour(options=_V2, size=97 * KIB + 512),
    "v1": Flavour(format="qcow"),
    "v3-filled": Flavour(options=_4K, filled=True, size=64 * KIB + 1536),
    "v3-512": Flavour(options=_512, size=80 * KIB),
    "v3-512-refcount-1": Flavour(options=_512 + ",refcount_bits=1", size=48 * KIB),
    "v3-512-refcount-64": Flavour(options=_512 + ",refcount_bits=64", size=80 * KIB),
    "v3-512-many-blocks": Flavour(
        options=_512 + ",refcount_bits=64", size=60 * KIB, pool=200
    ),
    # 61 clusters of the 64 that its refcount block counts are in use
    "v3-512-next-block": Flavour(
        options=_512 + ",refcount_bits=64", size=32 * KIB, filled=True
    ),
    "v3-512-table-grows": Flavour(
        options=_512 + ",refcount_bits=64",
        size=80 * KIB,
        pool=150,
        padding=4060 * 512,
    ),
    "v3-64k": Flavour(size=384 * KIB),
    "v3-backed": Flavour(options=_4K, backing=70 * KIB + 512),
    "v2-backed": Flavour(options=_V2, backing=70 * KIB + 512),
    "v1-backed": Flavour(format="qcow", backing=70 * KIB + 512, size=90 * KIB),
    "v3-over-compressed": Flavour(
        options=_4K, backing=72 * KIB, compressed_backing=True
    ),
    "v3-compressed": Flavour(options=_4K, filled=True, compressed=True),
    "v2-compressed": Flavour(options=_V2, filled=True, compressed=True),
    "v1-compressed": Flavour(format="qcow", filled=True, compressed=True),
    "v3-snapshot": Flavour(options=_4K, filled=True, snapshot=True),
    "v2-snapshot": Flavour(options=_V2, filled=True, snapshot=True),
    "v3-512-snapshot": Flavour(
        options=_512 + ",refcount_bits=8",
        filled=True,
        snapshot=True,
        size=70 * KIB,
    ),
    "v3-bitmaps": Flavour(options=_4K, filled=True, bitmaps=True),
    "v3-512-bitmaps": Flavour(options=_512, size=80 * KIB, bitmaps=True),
    "v3-luks": Flavour(options=_4K, size=60 * KIB, encryption="luks"),
    "v3-512-aes": Flavour(options=_512, size=60 * KIB, encryption="aes"),
    "v2-backed-aes": Flavour(options=_V2, backing=70 * KIB + 512, encryption="aes"),
    "sub-backed-aes": Flavour(options=_SUB, backing=70 * KIB, encryption="aes"),
    "v1-aes": Flavour(format="qcow", size=60 * KIB, encryption="aes"),
    "v3-backed-bitmaps": Flavour(options=_4K, backing=70 * KIB + 512, bitmaps=True),
    "v3-compacting": Flavour(
        options=_4K, size=200 * KIB, filled=True, holes=128 * KIB, compacting=True
    ),
    "v2-compacting": Flavour(
        options=_V2, size=200 * KIB, filled=True, holes=128 * KIB, compacting=True
    ),
    "v3-512-compacting": Flavour(
        options=_512 + ",refcount_bits=64",
        size=130 * KIB,
        filled=True,
        holes=80 * KIB,
        compacting=True,
    ),
    "v3-compressed-compacting": Flavour(
        options=_4K,
        size=200 * KIB,
        filled=True,
        dense=True,
        compressed=True,
        holes=128 * KIB,
        compacting=True,
    ),
    "v3-snapshot-compacting": Flavour(
        options=_4K,
        size=160 * KIB,
        filled=True,
        snapshot=True,
        holes=100 * KIB,
        compacting=True,
    ),
    "sub": Flavour(options=_SUB, size=97 * KIB + 512),
    "sub-filled": Flavour(options=_SUB, filled=True),
    "sub-backed": Flavour(
        options="extended_l2=on,cluster_size=32k", backing=70 * KIB + 512
    ),
    "sub-compressed": Flavour(options=_SUB, filled=True, compressed=True),
    "sub-compacting": Flavour(
        options=_SUB, size=400 * KIB, filled=True, holes=256 * KIB, compacting=True
    ),
    "v3-data": Flavour(options=_4K, external=True, size=97 * KIB + 512),
    "v3-data-filled": Flavour(options=_4K, external=True, filled=True),
    "v3-data-512": Flavour(options=_512, external=True, size=60 * KIB),
    "v3-data-backed": Flavour(options=_4K, external=True, backing=70 * KIB + 512),
    "sub-data": Flavour(options=_SUB, external=True, size=97 * KIB + 512),
    "sub-data-backed": Flavour(options=_SUB, external=True, backing=70 * KIB + 512),
    "v3-data-raw": Flavour(options=_4K, external=True, raw=True, size=97 * KIB + 512),
    "sub-snapshot": Flavour(options=_SUB, backing=70 * KIB, filled=True, snapshot=True),
}


@dataclass(frozen=True, slots=True)
class _Unlocked(Qcow2Driver):
    """Opens a LUKS image whose key is known: looking for it takes 30 ms."""

    cipher: ImageCipher | None = None

    async def _cipher(self, storage: Storage, header: Header) -> ImageCipher | None:
        return self.cipher


class Base(BlockDevice):
    """A backing disk that outlives the images above it."""

    def __init__(self, content: bytes) -> None:
        self.size = len(content)
        self.read_only = True
        self.preferred_block = 4096
        self.can_trim = self.can_fast_zero = False
        self._content = content

    async def read_into(self, offset: int, buffer: memoryview) -> Sequence[Hole]:
        piece = self._content[offset : offset + len(buffer)]
        buffer[:] = piece
        return () if any(piece) else ((0, len(piece)),)

    async def write(self, offset: int, data: object, *, fua: bool = False) -> None:
        raise AssertionError("the backing file is written")

    async def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        may_unmap: bool = True,
        fast_only: bool = False,
        fua: bool = False,
    ) -> None:
        raise AssertionError("the backing file is written")

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        raise AssertionError("the backing file is written")

    async def flush(self) -> None:
        pass

    async def block_status(
        self, offset: int, length: int, *, max_extents: int = 1 << 20
    ) -> list[Extent]:
        raise AssertionError("nobody asks")

    async def close(self) -> None:
        pass


@dataclass(slots=True)
class Image:
    """An image as it is before a run.

    Attributes:
        flavour: How it was made.
        folder: Where qemu-img finds its backing file.
        content: The file, a `Files` if there is a data file too.
        guest: What the guest sees.
        base: Its backing disk.
    """

    flavour: Flavour
    folder: Path
    content: bytes | bytearray
    guest: bytes
    base: bytes | None = None
    _driver: Qcow1Driver | Qcow2Driver = field(default_factory=Qcow2Driver)

    def qemu(self, path: Path) -> list[str]:
        """Return how qemu's tools are told to open a state in this folder."""
        kind = self.flavour.format
        if not self.flavour.encryption:
            return ["-f", kind, str(path)]
        image = f"driver={kind},file.filename={path},encrypt.key-secret=s"
        return [*_secret(self.folder), "--image-opts", image]

    async def open(self, disk: Disk) -> MappedImage:
        """Open for writing, with a pool small enough to run dry."""
        base = Base(self.base) if self.base is not None else None
        driver = self._driver
        if disk.external is not None:
            assert isinstance(driver, Qcow2Driver)
            driver = driver.with_data(disk.external)
        image = await driver.open(
            disk, read_only=False, backing=base, writethrough=False
        )
        assert isinstance(image, MappedImage)
        assert image._space is not None
        bits = max(image._parts.geometry.cluster_bits, 16)
        image._space.pool._bytes = self.flavour.pool << bits
        image._space.commit._interval_s = 3600.0
        return image


def make(name: str, folder: Path) -> Image:
    """Make the image of a flavour."""
    flavour = FLAVOURS[name]
    chance = random.Random(name)
    path = folder / "image"
    if flavour.encryption == "luks":
        return _luks_image(flavour, folder, path)
    base = None
    argv: list[str | Path] = ["qemu-img", "create", "-q", "-f", flavour.format]
    options = _options(flavour, folder)
    if flavour.backing:
        base = _pattern(flavour.backing, chance)
        (folder / "base.raw").write_bytes(base)
        backing = ["-b", "base.raw", "-F", "raw"]
        if flavour.compressed_backing:
            run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", _4K,
                folder / "base.raw", folder / "base.qcow2")  # fmt: skip
            backing = ["-b", "base.qcow2", "-F", "qcow2"]
        run(*argv, *options, *backing, path, str(flavour.size))
        guest = _with_own(flavour, path, base.ljust(flavour.size, b"\0"))
    elif flavour.filled:
        guest = _pattern(flavour.size, chance, dense=flavour.dense)
        raw = folder / "content.raw"
        raw.write_bytes(guest)
        argv = ["qemu-img", "convert", "-f", "raw", "-O", flavour.format, *options]
        if flavour.compressed:
            # qemu-img 7.2 writes a compressed qcow image well, and then exits 1
            run(*argv, "-c", raw, path, expect=[0, 1])
        else:
            run(*argv, raw, path)
    else:
        run(*argv, *options, path, str(flavour.size))
        guest = bytes(flavour.size)
    if flavour.holes:
        run("qemu-io", "-c", f"discard 0 {flavour.holes}", path)
        guest = bytes(flavour.holes) + guest[flavour.holes :]
    if flavour.snapshot:
        run("qemu-img", "snapshot", "-c", "before", path)
    if flavour.bitmaps:
        run("qemu-img", "bitmap", "--add", "-g", "512", path, "still")
        # it has something to lose
        run("qemu-io", "-c", "write -z 8k 512", path)
        guest = guest[: 8 * KIB] + bytes(512) + guest[8 * KIB + 512 :]
        run("qemu-img", "bitmap", "--disable", path, "still")
        run("qemu-img", "bitmap", "--add", "-g", "512", path, "live")
    if flavour.padding:
        os.truncate(path, flavour.padding)
    driver = _driver(flavour)
    content = _content(flavour, folder, path, guest)
    return Image(flavour, folder, content, guest, base, driver)


def _options(flavour: Flavour, folder: Path) -> list[str]:
    """Return what qemu-img create is told of the layout."""
    chosen, words = flavour.options, []
    if flavour.external:
        whole = "on" if flavour.raw else "off"
        chosen += f",data_file={folder / DATA_FILE},data_file_raw={whole}"
    if flavour.encryption == "aes":
        words = _secret(folder)
        chosen = f"{chosen},encrypt.format=aes,encrypt.key-secret=s".lstrip(",")
    return [*words, "-o", chosen] if chosen else words


def _driver(flavour: Flavour) -> Qcow1Driver | Qcow2Driver:
    secrets = (Secret(PASSPHRASE),) if flavour.encryption else ()
    engine = EngineOptions(secrets=secrets)
    return Qcow1Driver(engine) if flavour.format == "qcow" else Qcow2Driver(engine)


def _content(
    flavour: Flavour, folder: Path, path: Path, guest: bytes
) -> bytes | bytearray:
    """Return the image file, with its data file if there is one."""
    if not flavour.external:
        return path.read_bytes()
    content = Files(path.read_bytes())
    content.external = bytearray((folder / DATA_FILE).read_bytes())
    if not flavour.raw:
        _put_old_bytes(content.external, guest, empty=not flavour.filled)
    return content


def _put_old_bytes(data: bytearray, guest: bytes, *, empty: bool) -> None:
    """Fill the clusters of a data file that the image does not name."""
    for start in range(0, len(data), 4096):
        if empty or not any(guest[start : start + 4096]):
            length = min(4096, len(data) - start)
            data[start : start + length] = (b"old bytes;" * 410)[:length]


def _with_own(flavour: Flavour, path: Path, guest: bytes) -> bytes:
    """Let an overlay have a little of its own, if it shall; return what the guest sees."""
    if not flavour.filled:
        return guest
    run("qemu-io", "-c", "write -P 65 3k 5k", "-c", "write -z 40k 1k", path)
    own = bytearray(guest)
    own[3 * KIB : 8 * KIB] = b"A" * 5 * KIB
    own[40 * KIB : 41 * KIB] = bytes(KIB)
    return bytes(own)


def _luks_image(flavour: Flavour, folder: Path, path: Path) -> Image:
    """Make an empty one, ours: qemu takes seconds for it."""
    # 1 MiB of header and key material, instead of 2
    luks = quick_luks("aes-128")
    create_image(path, flavour.size, cluster_size=4096, encryption=luks)
    driver = _Unlocked(cipher=luks.cipher())
    return Image(flavour, folder, path.read_bytes(), bytes(flavour.size), None, driver)


def _secret(folder: Path) -> list[str]:
    return ["--object", f"secret,id=s,file={secret_file(folder)}"]


def _pattern(size: int, chance: random.Random, *, dense: bool = False) -> bytes:
    """Return content of which every sector is known, with holes."""
    content = bytearray(size)
    for start in range(0, size, 4096):
        if chance.random() < 0.25:
            continue
        for offset in range(start, min(start + 4096, size), 512):
            stamp = b"before %d;" % (offset // 512) * 64
            if dense:
                stamp = stamp[:200] + chance.randbytes(312)
            content[offset : offset + 512] = stamp[: min(512, size - offset)]
    return bytes(content)
