"""The one way to open an image: by path, whatever its format.

    async with open_image("disk.qcow2") as image:
        data = await image.read(0, 512)

It knows which formats exist; `chain` knows how images hang together.
"""

import os
from collections.abc import Generator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from nbdserve.block.device import BlockDevice
from nbdserve.errors import ConfigError
from nbdserve.formats.chain import (
    BackingReference,
    ChainOptions,
    Driver,
    open_chain,
)
from nbdserve.formats.crypto.secret import Secret
from nbdserve.formats.mapped.opening import DEFAULT_OPTIONS, EngineOptions
from nbdserve.formats.qcow1.open import Qcow1Driver
from nbdserve.formats.qcow2.image import Qcow2Image
from nbdserve.formats.qcow2.open import Qcow2Driver
from nbdserve.formats.raw import RawImage
from nbdserve.storage.base import Storage
from nbdserve.storage.names import shown


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


def drivers(options: EngineOptions = DEFAULT_OPTIONS) -> dict[str, Driver]:
    """Return every format under its name in qemu."""
    return {
        "raw": RawDriver(),
        "qcow": Qcow1Driver(options),
        "qcow2": Qcow2Driver(options),
    }


_CACHE_MODES = ("writeback", "writethrough")


class OpeningImage:
    """What `open_image` returns: await it, or use it as an asynchronous context."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        options: ChainOptions,
        engine: EngineOptions,
        snapshot: str | None = None,
    ) -> None:
        self._path = path
        self._options = options
        self._engine = engine
        self._snapshot = snapshot
        self._device: BlockDevice | None = None

    def __await__(self) -> Generator[Any, None, BlockDevice]:
        """Open the image; the caller closes it."""
        return self._open().__await__()

    async def _open(self) -> BlockDevice:
        device = await open_chain(self._path, self._options, drivers(self._engine))
        if self._snapshot is None:
            return device
        try:
            if isinstance(device, Qcow2Image):
                return await device.at_snapshot(self._snapshot)
        except BaseException:
            await device.close()
            raise
        await device.close()
        raise ConfigError(
            f"{shown(self._path)}: only qcow2 images have internal snapshots"
        )

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


def open_image(  # noqa: PLR0913 -- keywords, each with a default
    path: str | os.PathLike[str],
    *,
    format: str = "auto",  # noqa: A002 -- the word of the command line and of qemu
    read_only: bool = False,
    allow_backing: Sequence[str | os.PathLike[str]] = (),
    allow_data_file: Sequence[str | os.PathLike[str]] = (),
    cache: str = "writeback",
    lock: bool = True,
    state_dir: str | os.PathLike[str] | None = None,
    snapshot: str | None = None,
    secrets: Sequence[Secret | bytes] = (),
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
        allow_data_file: External data files that may be opened, and folders in which
            they may lie.
        cache: "writeback", or "writethrough" to have each change durable on return.
        lock: Whether to exclude other writers, qemu's included. Without it, an image
            that is being written can be looked at, and may change meanwhile.
        state_dir: Where acknowledged writes that had to copy are noted until the next
            commit, so that they survive a killed process: a folder on tmpfs. Without
            one, such writes wait for the disk.
        snapshot: Name or id of an internal snapshot of a qcow2 image, whose disk to
            open instead of the active one; `read_only` only.
        secrets: Passphrases of encrypted images, the backing files included; each is
            tried on every one, which takes seconds.

    Raises:
        ConfigError: There is no such file, no permission, or an option is unknown.
        ImageError: It is no such image, is broken, in use, or its backing file can't
            be used.
    """
    if cache not in _CACHE_MODES:
        raise ConfigError(
            f"cache mode {cache!r} is not one of: writeback, writethrough"
        )
    if snapshot is not None and not read_only:
        raise ConfigError("a snapshot can only be opened read-only")
    return OpeningImage(
        path,
        ChainOptions(
            format=format,
            read_only=read_only,
            allow_backing=tuple(allow_backing),
            allow_data_file=tuple(allow_data_file),
            writethrough=cache == "writethrough",
            lock=lock,
        ),
        EngineOptions(
            state_dir=Path(state_dir) if state_dir is not None else None,
            secrets=tuple(
                each if isinstance(each, Secret) else Secret(each) for each in secrets
            ),
        ),
        snapshot,
    )
