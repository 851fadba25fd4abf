"""External data files: where a qcow2 image that has one keeps its guest's bytes.

Its name comes from the image, so whoever made the image chose it, and it is opened for
writing where the image is. So the operator has to name it as well, or a folder in which
it may lie; that it lies beside the image is not enough.
"""

import os
from collections.abc import Collection, Sequence
from typing import Any, Protocol, runtime_checkable

from nbdserve.errors import ConfigError, DataFileError
from nbdserve.formats.references import lies_in, resolve
from nbdserve.storage.base import Storage
from nbdserve.storage.executor import run
from nbdserve.storage.file import FileStorage
from nbdserve.storage.names import shown
from nbdserve.storage.opening import open_file


@runtime_checkable
class SplitDriver(Protocol):
    """A driver of a format whose images may keep guest data in another file."""

    async def data_file(self, storage: Storage) -> bytes | None:
        """Return the recorded name of the data file, None if the image has none.

        Raises:
            ImageError: The header is broken, or says that there is one but not which.
        """

    def with_data(self, data: Storage) -> Any:
        """Return a driver that opens an image whose data lie in `data`.

        What it opens owns `data` as well.
        """


async def open_data_file(
    storage: FileStorage,
    name: bytes,
    allowed: Sequence[str | os.PathLike[str]],
    taken: Collection[tuple[int, int]],
    *,
    read_only: bool,
    lock: bool,
) -> FileStorage:
    """Open the data file that an image names.

    Args:
        storage: The image.
        name: As it is recorded; a relative one counts from the folder of the image.
        allowed: Files that the operator allows, and folders in which they may lie.
        taken: Device and inode of files that are in use already.
        read_only: Whether to refuse changes.
        lock: Whether to take locks that exclude other writers.

    Raises:
        DataFileError: It names no file, one that is not allowed, or one of those taken.
        ImageInUseError: Another process has it open.
    """
    target = await run(find_data_file, storage, name, allowed)
    # Before opening: a lock of our own would be taken for another process's.
    status = await run(os.stat, target)
    if (status.st_dev, status.st_ino) in taken:
        raise DataFileError(
            f"{storage.name}: its data file {shown(target)} is the image itself, or"
            " another file of its chain"
        )
    try:
        return await open_file(target, read_only=read_only, lock=lock)
    except ConfigError as error:
        raise DataFileError(
            f"{storage.name}: its data file can't be opened: {error}"
        ) from error


def find_data_file(
    storage: FileStorage, name: bytes, allowed: Sequence[str | os.PathLike[str]]
) -> str:
    """Return the real path of the data file that an image names.

    Raises:
        DataFileError: It names no file, or one that is not allowed.
    """
    real = resolve(storage, name, "data file", DataFileError)
    places = [os.path.realpath(os.fsencode(place)) for place in allowed]
    if not any(real == place or lies_in(real, place) for place in places):
        raise DataFileError(
            f"{storage.name}: keeps its data in {shown(real)}, which is opened only where"
            f" that is allowed: add --allow-data-file {shown(real)}"
        )
    return os.fsdecode(real)
