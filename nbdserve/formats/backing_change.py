"""Changing what an image says of its backing file, whatever its format."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from nbdserve.block.device import BlockDevice
from nbdserve.errors import ConfigError, ImageFormatError
from nbdserve.formats.chain import BackingReference, driver_with, open_data
from nbdserve.formats.data_file import SplitDriver
from nbdserve.formats.mapped.opening import DEFAULT_OPTIONS, EngineOptions
from nbdserve.formats.mapped.redo import redo_path
from nbdserve.formats.open import drivers
from nbdserve.formats.probe import choose
from nbdserve.formats.qcow1 import backing_name as qcow1
from nbdserve.formats.qcow1 import header as qcow1_header
from nbdserve.formats.qcow2 import backing_name as qcow2
from nbdserve.formats.qcow2 import header as qcow2_header
from nbdserve.storage.executor import run
from nbdserve.storage.file import FileStorage
from nbdserve.storage.names import shown

#: Bytes that tell how much of a file its header takes, in either format.
_START = 512


@dataclass(frozen=True, slots=True)
class Overlay:
    """An image that can have a backing file, open and locked but not yet a disk.

    Attributes:
        storage: Its file; whoever opened the overlay closes it.
        format: qcow or qcow2.
        reference: What it says of its backing file, None if it has none.
    """

    storage: FileStorage
    format: str
    reference: BackingReference | None


async def open_overlay(
    path: str | os.PathLike[str],
    *,
    image_format: str = "auto",
    allow_data_file: Sequence[str | os.PathLike[str]] = (),
    engine: EngineOptions = DEFAULT_OPTIONS,
) -> Overlay:
    """Open an image to change what it says of its backing file.

    What a killed server had acknowledged is linked first: the redo log that has it
    is void once the file is changed by somebody else.

    Raises:
        ConfigError: It can't be opened.
        ImageError: It is broken, in use, or of a format without backing files.
    """
    overlay = await _open(path, image_format, engine)
    log = engine.state_dir and redo_path(engine.state_dir, *overlay.storage.identity)
    if not log or not await run(os.path.exists, log):
        return overlay
    try:
        disk = await open_disk(
            overlay, backing=None, allow_data_file=allow_data_file, engine=engine
        )
        await disk.close()
    finally:
        await overlay.storage.close()
    return await _open(path, image_format, engine)


async def open_disk(
    overlay: Overlay,
    *,
    backing: BlockDevice | None,
    allow_data_file: Sequence[str | os.PathLike[str]] = (),
    engine: EngineOptions = DEFAULT_OPTIONS,
) -> BlockDevice:
    """Open an overlay as a disk, which then owns its storage and `backing`.

    Raises:
        ImageError: It is broken, or its external data file is not allowed.
    """
    driver = drivers(engine)[overlay.format]
    data = await open_data(overlay.storage, driver, allow_data_file, read_only=False)
    try:
        return await driver_with(driver, data).open(
            overlay.storage, read_only=False, backing=backing, writethrough=False
        )
    except BaseException:
        if data is not None:
            await data.close()
        raise


async def _open(
    path: str | os.PathLike[str], image_format: str, engine: EngineOptions
) -> Overlay:
    storage = await run(FileStorage, path)
    try:
        found = await _format(storage, image_format)
        reference = await drivers(engine)[found].backing(storage)
    except BaseException:
        await storage.close()
        raise
    return Overlay(storage, found, reference)


async def _format(storage: FileStorage, wanted: str) -> str:
    # read-only: what has no magic is raw then, and raw has a message of its own here
    found = await choose(storage, wanted, read_only=True)
    if found == "raw":
        raise ImageFormatError(
            f"{storage.name}: is a raw image, which has no backing file"
        )
    return found


def judge_name(name: str) -> bytes:
    """Return a backing file's name as it is stored.

    Raises:
        ConfigError: It can't be one, or qemu would take it for something else.
    """
    if "\0" in name or not name:
        raise ConfigError("the name of the backing file is empty or has a NUL byte")
    if ":" in name.partition("/")[0]:
        raise ConfigError(
            f"backing file {shown(name)!r} reads like a URI: write ./{shown(name)} for"
            " a file"
        )
    return os.fsencode(name)


async def plan_change(
    overlay: Overlay, name: bytes | None, backing_format: str | None
) -> list[tuple[int, bytes]]:
    """Return (offset, bytes) of what has to be written, with a barrier after each.

    Args:
        overlay: The image.
        name: The new name as it shall be stored, None for no backing file.
        backing_format: Its format; qcow version 1 can't record it.

    Raises:
        ImageError: The header is broken, or has no room for it.
        OSError: It can't be read.
    """
    storage = overlay.storage
    if overlay.format == "qcow":
        start = await _read(storage, _START)
        data = await _read(storage, qcow1_header.header_bytes_needed(start))
        return qcow1.plan_backing_change(data, storage.size, name)
    data = await _first_cluster(storage)
    return qcow2.plan_backing_change(data, storage.size, name, backing_format)


async def change_backing(
    overlay: Overlay, name: bytes | None, backing_format: str | None
) -> None:
    """Change what the image says of its backing file; durable on return.

    A power cut on the way leaves the old or the new backing file. The image may be
    open as a disk, with nothing under way.

    Raises:
        ImageError: See `plan_change`.
        OSError: It can't be read or written.
    """
    for offset, data in await plan_change(overlay, name, backing_format):
        await overlay.storage.write(offset, data)
        await overlay.storage.flush()


async def data_file_of(overlay: Overlay) -> bytes | None:
    """Return the recorded name of the external data file, None if there is none."""
    driver = drivers()[overlay.format]
    if not isinstance(driver, SplitDriver):
        return None
    return await driver.data_file(overlay.storage)


async def plan_data_file(overlay: Overlay, name: bytes) -> list[tuple[int, bytes]]:
    """Return (offset, bytes) of what has to be written, with a barrier after each.

    Raises:
        ImageError: The header is broken, or has no room for the name.
    """
    storage = overlay.storage
    cluster = await _first_cluster(storage)
    return qcow2.plan_data_file_change(cluster, storage.size, name)


async def change_data_file(overlay: Overlay, name: bytes) -> None:
    """Change the name of the external data file; durable on return.

    Raises:
        ImageError: See `plan_data_file`.
        OSError: The image can't be read or written.
    """
    for offset, data in await plan_data_file(overlay, name):
        await overlay.storage.write(offset, data)
        await overlay.storage.flush()


async def _first_cluster(storage: FileStorage) -> bytes:
    start = await _read(storage, _START)
    return await _read(storage, qcow2_header.header_bytes_needed(start))


async def _read(storage: FileStorage, length: int) -> bytes:
    buffer = bytearray(min(length, storage.size))
    await storage.read(0, memoryview(buffer))
    return bytes(buffer)
