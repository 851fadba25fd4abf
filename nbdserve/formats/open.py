"""The one way to open an image: by path, whatever its format.

    async with open_image("disk.qcow2") as image:
        data = await image.read(0, 512)

It knows which formats exist; `chain` knows how images hang together.
"""

import os
from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Any, Protocol

from nbdserve.block.device import BlockDevice
from nbdserve.errors import ConfigError
from nbdserve.formats.chain import (
    BackingReference,
    ChainOptions,
    Driver,
    open_chain,
)
from nbdserve.formats.raw import RawImage
from nbdserve.storage.base import Storage

#: Enough to tell how long a header is; most headers fit.
HEADER_START = 512


class RawDriver:
    """Raw images: every byte is the guest's, so nothing is recorded in them."""

    async def backing(self, storage: Storage) -> BackingReference | None:
        """Return None: there is nowhere to record one."""
        return None

    async def open(
        self,
        storage: Storage,
        *,
        read_only: bool,
        backing: BlockDevice | None,
        writethrough: bool,
    ) -> BlockDevice:
        """Open `storage` as a disk."""
        return RawImage(storage, read_only=read_only, writethrough=writethrough)


class Header(Protocol):
    """What the headers of all qcow versions have."""

    @property
    def backing_name(self) -> bytes | None:
        """The recorded name, None without a backing file."""


class HeaderCodec(Protocol):
    """The functions of `formats.qcow1.header` and `formats.qcow2.header`."""

    def header_bytes_needed(self, data: bytes) -> int:
        """Tell from the file's first bytes how many `parse_header` has to see."""

    def parse_header(self, data: bytes, file_size: int) -> Header:
        """Read and judge a header."""


async def backing_of(storage: Storage, codec: HeaderCodec) -> BackingReference | None:
    """Read from a qcow header of any version what it says about a backing file.

    Raises:
        ImageError: The header is broken.
        OSError: It can't be read.
    """
    start = await _read(storage, min(HEADER_START, storage.size))
    needed = min(codec.header_bytes_needed(start), storage.size)
    data = start if needed <= len(start) else await _read(storage, needed)
    header = codec.parse_header(data, storage.size)
    if not header.backing_name:
        return None
    return BackingReference(
        header.backing_name, getattr(header, "backing_format", None)
    )


async def _read(storage: Storage, length: int) -> bytes:
    buffer = bytearray(length)
    view = memoryview(buffer)
    if not storage.try_read(0, view):
        await storage.read(0, view)
    return bytes(buffer)


#: Every format under its name in qemu.
DRIVERS: dict[str, Driver] = {"raw": RawDriver()}

_CACHE_MODES = ("writeback", "writethrough")


class OpeningImage:
    """What `open_image` returns: await it, or use it as an asynchronous context."""

    def __init__(self, path: str | os.PathLike[str], options: ChainOptions) -> None:
        self._path = path
        self._options = options
        self._device: BlockDevice | None = None

    def __await__(self) -> Generator[Any, None, BlockDevice]:
        """Open the image; the caller closes it."""
        return open_chain(self._path, self._options, DRIVERS).__await__()

    async def __aenter__(self) -> BlockDevice:
        """Open the image."""
        self._device = await self
        return self._device

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Flush and close the image."""
        if self._device is not None:
            device, self._device = self._device, None
            await device.close()


def open_image(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",  # noqa: A002 -- the word of the command line and of qemu
    read_only: bool = False,
    allow_backing: Sequence[str | os.PathLike[str]] = (),
    cache: str = "writeback",
    lock: bool = True,
) -> OpeningImage:
    """Open a disk image with its backing files.

    Use it as `async with open_image(path) as image:` or `image = await
    open_image(path)`, then `await image.close()`.

    Args:
        path: A regular file or block device.
        format: "raw", "qcow", "qcow2", or "auto" to tell qcow and qcow2 by their
            magic; what has no magic is then opened as raw only if `read_only`.
        read_only: Whether to refuse changes. Several readers may share an image.
        allow_backing: Folders in which backing files may lie, besides the image's own.
        cache: "writeback", or "writethrough" to have each change durable on return.
        lock: Whether to exclude other writers, qemu's included. Without it, an image
            that is being written can be looked at, and may change meanwhile.

    Raises:
        ConfigError: There is no such file, no permission, or an option is unknown.
        ImageError: It is no such image, is broken, in use, or its backing file can't
            be used.
    """
    if cache not in _CACHE_MODES:
        raise ConfigError(
            f"cache mode {cache!r} is not one of: writeback, writethrough"
        )
    return OpeningImage(
        path,
        ChainOptions(
            format=format,
            read_only=read_only,
            allow_backing=tuple(allow_backing),
            writethrough=cache == "writethrough",
            lock=lock,
        ),
    )
