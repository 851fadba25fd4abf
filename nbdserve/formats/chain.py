"""An image and its backing files, opened from the top down and built from the bottom up.

The name of a backing file comes from the image, so whoever made the image chose it.
It is followed only to a regular file or block device in the image's own folder or in
one that the operator allowed, after all symbolic links are resolved.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from nbdserve.block.device import BlockDevice
from nbdserve.errors import (
    BackingFileError,
    ConfigError,
    ForeignFormatError,
    ImageError,
    ImageFormatError,
)
from nbdserve.formats.data_file import SplitDriver, open_data_file
from nbdserve.formats.probe import choose, probe
from nbdserve.formats.references import lies_in, resolve
from nbdserve.storage.base import Storage
from nbdserve.storage.executor import run
from nbdserve.storage.file import FileStorage
from nbdserve.storage.names import shown
from nbdserve.storage.opening import open_file

#: Backing files below an image. Longer chains are not useful, and each link costs
#: a file descriptor and time on every read of unallocated space.
MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class BackingReference:
    """What an image records about its backing file.

    Attributes:
        name: The bytes of the name, never empty.
        format: The recorded format, None if there is none.
    """

    name: bytes
    format: str | None


class Driver(Protocol):
    """How to open images of one format."""

    async def backing(self, storage: Storage) -> BackingReference | None:
        """Read what the image says about its backing file.

        Raises:
            ImageError: The header is broken.
        """

    async def open(
        self,
        storage: Storage,
        *,
        read_only: bool,
        backing: BlockDevice | None,
        writethrough: bool,
    ) -> BlockDevice:
        """Open the image; on success the device owns `storage` and `backing`.

        Raises:
            ImageError: It can't be opened; `storage` and `backing` are left open.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainOptions:
    """How to open a chain.

    Attributes:
        format: "auto" or the format of the top image.
        read_only: Whether the top image is opened read-only; all others always are.
        allow_backing: Folders in which backing files may lie, besides the image's own.
        allow_data_file: External data files that may be opened, and folders in which
            they may lie.
        writethrough: Whether each change of the top image is durable on return.
        lock: Whether to take locks that exclude other writers.
    """

    format: str = "auto"
    read_only: bool = False
    allow_backing: Sequence[str | os.PathLike[str]] = ()
    allow_data_file: Sequence[str | os.PathLike[str]] = ()
    writethrough: bool = False
    lock: bool = True


@dataclass(slots=True)
class _Link:
    """One image of a chain: an open file and how to understand it.

    Attributes:
        storage: The file.
        format: Of the image.
        data: Its external data file, if it has one.
    """

    storage: FileStorage
    format: str
    data: FileStorage | None = None


async def open_chain(
    path: str | os.PathLike[str], options: ChainOptions, drivers: Mapping[str, Driver]
) -> BlockDevice:
    """Open the image at `path` with all its backing files.

    Args:
        path: A regular file or block device.
        options: How.
        drivers: By name of the format.

    Raises:
        ConfigError: `path` can't be opened.
        ImageError: An image of the chain can't be used.
    """
    links: list[_Link] = []
    try:
        try:
            await _open_files(links, path, options, drivers)
            await _open_data_files(links, options, drivers)
        except BaseException:
            await _close_all(links)
            raise
        return await _open_devices(links, options, drivers)
    except OSError as error:
        raise _unreadable(path, error) from error


async def backing_chain(
    path: str | os.PathLike[str], options: ChainOptions, drivers: Mapping[str, Driver]
) -> list[tuple[str, str]]:
    """Return (name, format) of the image at `path` and of all its backing files.

    Raises:
        ConfigError: `path` can't be opened.
        ImageError: An image of the chain can't be used.
    """
    links: list[_Link] = []
    try:
        await _open_files(links, path, options, drivers)
        return [(link.storage.name, link.format) for link in links]
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        await _close_all(links)


async def find_backing(
    storage: FileStorage,
    reference: BackingReference,
    allow_backing: Sequence[str | os.PathLike[str]],
) -> str:
    """Return the real path of the backing file that an image names.

    Raises:
        BackingFileError: It names no file, or one that is not allowed.
    """
    roots = _roots(storage.path, allow_backing)
    return await run(_resolve, storage, reference.name, roots)


async def _open_files(
    links: list[_Link],
    path: str | os.PathLike[str],
    options: ChainOptions,
    drivers: Mapping[str, Driver],
) -> None:
    """Open every file of the chain and append it to `links`, the top image first."""
    storage = await open_file(path, read_only=options.read_only, lock=options.lock)
    link = _Link(storage, "raw")
    links.append(link)
    link.format = await choose(storage, options.format, read_only=options.read_only)
    roots = _roots(path, options.allow_backing)
    seen = {storage.identity}
    while reference := await _reference(link, drivers):
        target = await run(_resolve, link.storage, reference.name, roots)
        # Before opening: a lock of our own would be taken for another process's.
        if await run(_identity, target) in seen:
            raise BackingFileError(
                f"{links[0].storage.name}: its chain of backing files comes back to"
                f" {shown(target)}"
            )
        if len(links) > MAX_DEPTH:
            raise BackingFileError(
                f"{links[0].storage.name}: has more than {MAX_DEPTH} backing files"
            )
        storage = await _open_backing(link.storage, target, lock=options.lock)
        link = _Link(storage, "raw")
        links.append(link)
        seen.add(storage.identity)
        link.format = await _backing_format(links, reference, drivers)


async def _open_data_files(
    links: list[_Link], options: ChainOptions, drivers: Mapping[str, Driver]
) -> None:
    """Open the external data files of a chain."""
    taken = {link.storage.identity for link in links}
    for depth, link in enumerate(links):
        link.data = await open_data(
            link.storage,
            _driver(link, drivers),
            options.allow_data_file,
            taken,
            read_only=options.read_only or depth > 0,
            lock=options.lock,
        )
        if link.data is not None:
            taken.add(link.data.identity)


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


async def _reference(
    link: _Link, drivers: Mapping[str, Driver]
) -> BackingReference | None:
    try:
        return await _driver(link, drivers).backing(link.storage)
    except ImageError as error:
        raise _named(link.storage, error) from error


def _driver(link: _Link, drivers: Mapping[str, Driver]) -> Driver:
    driver = drivers.get(link.format)
    if driver is None:
        raise ImageFormatError(
            f"{link.storage.name}: there is no driver for the format {link.format}"
        )
    return driver


async def _open_backing(parent: FileStorage, target: str, *, lock: bool) -> FileStorage:
    try:
        return await open_file(target, read_only=True, lock=lock)
    except ConfigError as error:
        raise BackingFileError(
            f"{parent.name}: its backing file can't be opened: {error}"
        ) from error


async def _backing_format(
    links: list[_Link], reference: BackingReference, drivers: Mapping[str, Driver]
) -> str:
    storage = links[-1].storage
    if reference.format is None:
        try:
            return await probe(storage)
        except ForeignFormatError as error:
            raise BackingFileError(
                f"{links[-2].storage.name}: records no format for its backing file"
                f" {error}"
            ) from error
    if reference.format not in drivers:
        raise BackingFileError(
            f"{links[-2].storage.name}: records the format"
            f" {shown(reference.format)!r} for its backing file {storage.name}; only"
            f" {', '.join(drivers)} are supported"
        )
    return reference.format


def _roots(
    path: str | os.PathLike[str], allowed: Sequence[str | os.PathLike[str]]
) -> list[bytes]:
    """Return the real folders in which backing files may lie."""
    own = os.path.dirname(os.path.realpath(os.fsencode(path)))
    return [own, *(os.path.realpath(os.fsencode(folder)) for folder in allowed)]


def _resolve(parent: FileStorage, name: bytes, roots: Sequence[bytes]) -> str:
    """Return the real path that an image's backing name stands for.

    Raises:
        BackingFileError: It names no file, or one that is not allowed.
    """
    real = resolve(parent, name, "backing file", BackingFileError)
    if not any(lies_in(real, root) for root in roots):
        folder = shown(os.path.dirname(real))
        raise BackingFileError(
            f"{parent.name}: its backing file {shown(real)} lies outside the image's"
            f" folder; add --allow-backing {folder} to allow it"
        )
    return os.fsdecode(real)


async def open_data(
    storage: FileStorage,
    driver: Driver,
    allowed: Sequence[str | os.PathLike[str]],
    taken: Collection[tuple[int, int]] = (),
    *,
    read_only: bool,
    lock: bool = True,
) -> FileStorage | None:
    """Open an image's external data file, if it has one; see `open_data_file`."""
    if not isinstance(driver, SplitDriver):
        return None
    try:
        name = await driver.data_file(storage)
    except ImageError as error:
        raise _named(storage, error) from error
    if name is None:
        return None
    taken = {storage.identity, *taken}
    return await open_data_file(
        storage, name, allowed, taken, read_only=read_only, lock=lock
    )


def driver_with(driver: Driver, data: Storage | None) -> Driver:
    """Return `driver`, for an image whose data lie in `data` if that is a file."""
    if data is None or not isinstance(driver, SplitDriver):
        return driver
    opening: Driver = driver.with_data(data)
    return opening


async def _open_devices(
    links: list[_Link], options: ChainOptions, drivers: Mapping[str, Driver]
) -> BlockDevice:
    """Build the devices from the deepest backing file up; on failure close all."""
    device: BlockDevice | None = None
    remaining = list(links)
    try:
        while True:
            link = remaining[-1]
            top = len(remaining) == 1
            try:
                opened = await driver_with(_driver(link, drivers), link.data).open(
                    link.storage,
                    read_only=options.read_only or not top,
                    backing=device,
                    writethrough=options.writethrough and top,
                )
            except ImageError as error:
                raise _named(link.storage, error) from error
            remaining.pop()
            device = opened
            if top:
                return opened
    except BaseException:
        await _close_all(remaining)
        if device is not None:
            await device.close()
        raise


async def _close_all(links: list[_Link]) -> None:
    for link in links:
        await link.storage.close()
        if link.data is not None:
            await link.data.close()


def _unreadable(path: str | os.PathLike[str], error: OSError) -> ImageError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    return ImageError(f"{shown(path)}: can't be opened: {reason}")


def _named(storage: FileStorage, error: ImageError) -> ImageError:
    """Put the image's name in front of a message that lacks it, such as a parser's."""
    if storage.name in str(error):
        return error
    return type(error)(f"{storage.name}: {error}")
