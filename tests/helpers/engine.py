"""A qcow or qcow2 image opened on a storage of the test's own, without chain or server.

qemu-img makes the file, so that nothing depends on our own idea of the format; the
test may patch its bytes, wrap its storage so that it fails, waits or remembers, and
look at the bytes afterwards.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nbdserve.block.device import BlockDevice
from nbdserve.formats.mapped.image import MappedImage
from nbdserve.formats.mapped.opening import DEFAULT_OPTIONS, EngineOptions
from nbdserve.formats.qcow1.open import Qcow1Driver
from nbdserve.formats.qcow2.open import Qcow2Driver
from nbdserve.formats.raw import RawImage
from nbdserve.storage.base import Storage
from nbdserve.storage.faults import FaultyStorage
from nbdserve.storage.memory import MemoryStorage
from tests.helpers.tools import run

#: Where the fields that tests look at or patch are (docs/interop/qcow2.rst).
HEADER_L1_OFFSET = 40
HEADER_REFCOUNT_TABLE = 48
HEADER_SNAPSHOTS = 60
HEADER_INCOMPATIBLE = 72
HEADER_COMPATIBLE = 80
HEADER_AUTOCLEAR = 88
COPIED = 1 << 63
COMPRESSED = 1 << 62
OFFSET = 0x00FF_FFFF_FFFF_FE00


def u64(data: bytes | bytearray, offset: int) -> int:
    """Return the big-endian 64-bit number at `offset`."""
    value: int = struct.unpack_from(">Q", data, offset)[0]
    return value


def u32(data: bytes | bytearray, offset: int) -> int:
    """Return the big-endian 32-bit number at `offset`."""
    value: int = struct.unpack_from(">I", data, offset)[0]
    return value


def put64(data: bytearray, offset: int, value: int) -> None:
    """Put a big-endian 64-bit number at `offset`."""
    struct.pack_into(">Q", data, offset, value)


def make(folder: Path, size: int, *, fmt: str = "qcow2", options: str = "") -> Path:
    """Make an empty image with qemu-img."""
    path = folder / f"made.{fmt}"
    path.unlink(missing_ok=True)
    argv = ["qemu-img", "create", "-q", "-f", fmt]
    if options:
        argv += ["-o", options]
    run(*argv, path, str(size))
    return path


def convert(
    folder: Path,
    content: bytes,
    *,
    fmt: str = "qcow2",
    options: str = "",
    compressed: bool = False,
) -> Path:
    """Make an image with content with qemu-img."""
    raw = folder / "content.raw"
    raw.write_bytes(content)
    path = folder / f"made.{fmt}"
    path.unlink(missing_ok=True)
    argv = ["qemu-img", "convert", "-q", "-f", "raw", "-O", fmt]
    if compressed:
        argv.append("-c")
    if options:
        argv += ["-o", options]
    # qemu-img 7.2 writes a compressed qcow image well, and then exits 1 in silence
    run(*argv, raw, path, expect=[0, 1] if compressed and fmt == "qcow" else [0])
    return path


@dataclass
class Disk:
    """An open image and everything around it.

    Attributes:
        image: The image under test.
        storage: What it uses; refuses and waits on command.
        memory: The bytes of the file.
        folder: For files that qemu-img is to look at.
        fmt: "qcow" or "qcow2".
        model: What a guest should read.
    """

    image: MappedImage
    storage: FaultyStorage
    memory: MemoryStorage
    folder: Path
    fmt: str
    model: bytearray
    _names: int = field(default=0, repr=False)

    async def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        """Write, and remember it in the model."""
        await self.image.write(offset, data, fua=fua)
        self.model[offset : offset + len(data)] = data

    async def assert_content(self) -> None:
        """Compare everything a guest reads with the model."""
        found = await self.image.read(0, self.image.size)
        if found != self.model:
            pairs = enumerate(zip(found, self.model, strict=True))
            first = next(at for at, (one, other) in pairs if one != other)
            raise AssertionError(f"differs from byte {first:#x} on")

    def saved(self) -> Path:
        """Save the bytes of the file as they are now."""
        self._names += 1
        path = self.folder / f"saved-{self._names}.{self.fmt}"
        path.write_bytes(self.memory.content())
        return path

    async def close_and_check(
        self, *, leaks_allowed: bool = False, compare: bool = True
    ) -> bytes:
        """Close; qemu-img must find the image clean and read what the model has."""
        await self.image.close()
        path = self.saved()
        if self.fmt == "qcow2":
            run("qemu-img", "check", path, expect=[0, 3] if leaks_allowed else [0])
        if compare:
            raw = self.folder / "model.raw"
            raw.write_bytes(self.model)
            run("qemu-img", "compare", "-f", self.fmt, "-F", "raw", path, raw)
        return self.memory.content()


async def open_bytes(
    folder: Path,
    content: bytes,
    *,
    fmt: str = "qcow2",
    read_only: bool = False,
    backing: bytes | BlockDevice | None = None,
    options: EngineOptions = DEFAULT_OPTIONS,
    writethrough: bool = False,
    suspending: bool = False,
    wrap: Callable[[Storage], Storage] = lambda storage: storage,
) -> Disk:
    """Open an image that consists of `content`.

    Args:
        folder: For files that qemu-img is to look at.
        content: The bytes of the image.
        fmt: "qcow" or "qcow2".
        read_only: As in `open_image`.
        backing: A raw backing disk.
        options: Of the engine.
        writethrough: As in `open_image`.
        suspending: Whether every call waits, as with a slow disk.
        wrap: Put another storage between the engine and the memory.
    """
    memory = MemoryStorage(content, name="image")
    storage = FaultyStorage(wrap(memory), suspending=suspending)
    below: BlockDevice | None
    if isinstance(backing, bytes):
        below = RawImage(MemoryStorage(backing, name="backing"), read_only=True)
    else:
        below = backing
    driver: Qcow1Driver | Qcow2Driver
    driver = Qcow2Driver(options) if fmt == "qcow2" else Qcow1Driver(options)
    image = await driver.open(
        storage, read_only=read_only, backing=below, writethrough=writethrough
    )
    assert isinstance(image, MappedImage)
    storage.calls = 0  # a test counts its own
    disk = Disk(image, storage, memory, folder, fmt, bytearray(image.size))
    if isinstance(backing, bytes):
        shown = backing[: image.size]
        disk.model[: len(shown)] = shown
    return disk


async def open_made(
    folder: Path, size: int, *, fmt: str = "qcow2", options: str = "", **how: object
) -> Disk:
    """Open an empty image of `size` bytes; `how` as for `open_bytes`."""
    content = make(folder, size, fmt=fmt, options=options).read_bytes()
    return await open_bytes(folder, content, fmt=fmt, **how)  # type: ignore[arg-type]


def l1_of(content: bytes | bytearray) -> int:
    """Return where the L1 table of a qcow2 image (or qcow image) is."""
    return u64(content, HEADER_L1_OFFSET)


def l2_entry_of(content: bytes | bytearray, guest_offset: int) -> int:
    """Return where in a qcow2 image the L2 entry of a guest offset is."""
    cluster_bits = u32(content, 20)
    table_bits = 2 * cluster_bits - 3
    l1_entry = u64(content, l1_of(content) + 8 * (guest_offset >> table_bits))
    assert l1_entry, "there is no L2 table"
    index = (guest_offset >> cluster_bits) & ((1 << cluster_bits - 3) - 1)
    return (l1_entry & OFFSET) + 8 * index
