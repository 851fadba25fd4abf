"""Opening files in a thread: a name may lie on a file system that hangs."""

import asyncio
import os

from nbdserve.storage.executor import run
from nbdserve.storage.file import FileStorage


async def open_file(
    path: str | os.PathLike[str], *, read_only: bool, lock: bool
) -> FileStorage:
    """Open a file; whoever gives up meanwhile leaves nothing open.

    Raises:
        ConfigError: See `FileStorage`.
        ImageInUseError: The same.
    """
    opening = run(lambda: FileStorage(path, read_only=read_only, lock=lock))
    try:
        return await opening
    except asyncio.CancelledError:  # which comes when it has ended
        if opening.exception() is None:
            await opening.result().close()
        raise
