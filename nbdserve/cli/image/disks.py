"""Disks that a command reads or writes: image files, or exports named by URIs."""

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nbdserve.errors import ConfigError

if TYPE_CHECKING:
    from nbdserve.block.device import BlockDevice
    from nbdserve.formats.mapped.opening import EngineOptions
    from nbdserve.remote.disk import RemoteDisk

_URI = re.compile(r"nbds?(\+unix)?:")


def is_uri(text: str) -> bool:
    """Return whether a word names an export of an NBD server."""
    return bool(_URI.match(text))


async def open_source(
    text: str, *, image_format: str | None, allow_backing: Sequence[str] = ()
) -> "BlockDevice":
    """Open what is read; the caller closes it.

    Args:
        text: A path or an NBD URI.
        image_format: None tells it from the content.
        allow_backing: Folders in which backing files may lie.

    Raises:
        ConfigError: It can't be opened, or the server is not there.
        ImageError: It is broken or in use.
    """
    if not is_uri(text):
        from nbdserve.formats.open import open_image

        return await open_image(
            text,
            format=image_format or "auto",
            read_only=True,
            allow_backing=allow_backing,
        )
    if image_format not in (None, "raw"):
        raise ConfigError(f"{text}: what a server exports is raw, not {image_format}")
    return await connect_to(text, read_only=True)


async def connect_to(text: str, *, read_only: bool) -> "RemoteDisk":
    """Connect to the export that a URI names.

    Raises:
        ConfigError: There is no such export.
    """
    from nbdserve.remote.disk import connect
    from nbdserve.wire.uri import parse_uri

    return await connect(parse_uri(text), read_only=read_only)


def engine_options() -> "EngineOptions":
    """Return the options for images that a command changes.

    With the redo logs of this machine: what a killed server had acknowledged must not
    be lost because somebody else changes the image before the next server does.
    """
    from nbdserve.app import default_state_dir
    from nbdserve.formats.mapped.opening import EngineOptions

    state_dir = default_state_dir(os.environ)
    return EngineOptions(state_dir=None if state_dir is None else Path(state_dir))


def is_block_device(path: str) -> bool:
    """Return whether a path leads to a block device."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False
