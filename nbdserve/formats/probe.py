"""Which format a file has, by its first sector.

A guest can write anything into a raw disk, a qcow2 header with a backing file
/etc/shadow included. So only qcow and qcow2 are told from content, and content that
is neither is taken for raw for writing only if the operator says so. What looks like
an image of a format that is not read here is taken for raw by nobody else either: its
bytes are not those of its disk.
"""

import os

from nbdserve.block.magics import SECTOR, looks_like
from nbdserve.errors import ForeignFormatError, ImageFormatError
from nbdserve.storage.base import Storage
from nbdserve.storage.descriptors import open_descriptor
from nbdserve.storage.executor import run
from nbdserve.storage.file import FileStorage
from nbdserve.storage.names import shown

_FORMATS = {1: "qcow", 2: "qcow2", 3: "qcow2"}

#: The formats that exist, under the names of qemu.
FORMATS = ("raw", "qcow", "qcow2")


def format_of(start: bytes | bytearray, name: str) -> str:
    """Return "qcow", "qcow2", or "raw" for what looks like no image.

    Args:
        start: The first sector of the file; less, if it is shorter.
        name: What to call the file.

    Raises:
        ForeignFormatError: It looks like an image of a format that is not read here.
        ImageFormatError: It is a qcow image of a version that nobody knows.
    """
    found = looks_like(start)
    if found is None:
        return "raw"
    if found != "qcow2":
        raise ForeignFormatError(
            f"{name}: looks like {found}, which nbdserve does not read: convert it with"
            " qemu-img"
        )
    version = int.from_bytes(start[4:8], "big")
    if version not in _FORMATS:
        raise ImageFormatError(
            f"{name}: is a qcow image of version {version}; known are 1, 2 and 3"
        )
    return _FORMATS[version]


async def probe(storage: Storage) -> str:
    """Return what `format_of` says of a file.

    Raises:
        ImageFormatError: As `format_of`.
        OSError: The file can't be read.
    """
    start = bytearray(SECTOR)
    if not storage.try_read(0, memoryview(start)):
        await storage.read(0, memoryview(start))
    return format_of(start, storage.name)


async def probe_file(path: str | os.PathLike[str]) -> str:
    """Return what `probe` says of a file.

    Raises:
        ConfigError: There is no such file.
        ImageFormatError: As `probe`.
    """
    storage = await run(lambda: FileStorage(path, read_only=True, lock=False))
    try:
        return await probe(storage)
    finally:
        await storage.close()


def is_raw(path: str | os.PathLike[str]) -> bool:
    """Return whether a file looks like no image.

    Raises:
        ConfigError: There is no such file.
        ImageFormatError: As `format_of`.
        OSError: It can't be read.
    """
    fd = open_descriptor(path, os.O_RDONLY)
    try:
        return format_of(os.pread(fd, SECTOR, 0), shown(path)) == "raw"
    finally:
        os.close(fd)


async def choose(storage: Storage, wanted: str, *, read_only: bool) -> str:
    """Return the format in which to open an image that the operator named.

    Args:
        storage: The image.
        wanted: "auto" or one of `FORMATS`.
        read_only: Whether the image is opened read-only.

    Raises:
        ForeignFormatError: It looks like an image of a format that is not read here.
        ImageFormatError: It has no magic and is not to be taken for raw, or it has
            another format than wanted.
    """
    if wanted == "raw":
        return wanted
    if wanted not in ("auto", *FORMATS):
        raise ImageFormatError(
            f"{storage.name}: format {wanted!r} is not one of {', '.join(FORMATS)}"
        )
    found = await probe(storage)
    if wanted not in ("auto", found):
        raise ImageFormatError(
            f"{storage.name}: is no {wanted} image"
            + (f", but {found}" if found != "raw" else "")
        )
    if found == "raw" and not read_only:
        raise ImageFormatError(
            f"{storage.name}: has no qcow or qcow2 header; add --format raw to serve it"
            " as a raw disk, or --read-only"
        )
    return found
