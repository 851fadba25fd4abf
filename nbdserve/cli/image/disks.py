"""Disks that a command reads or writes: image files, or exports named by URIs."""

import os
import re
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nbdserve.errors import ConfigError

if TYPE_CHECKING:
    from nbdserve.block.device import BlockDevice
    from nbdserve.formats.crypto.secret import Secret
    from nbdserve.formats.mapped.opening import EngineOptions
    from nbdserve.remote.disk import RemoteDisk

_URI = re.compile(r"nbds?(\+unix)?:")


def is_uri(text: str) -> bool:
    """Return whether a word names an export of an NBD server."""
    return bool(_URI.match(text))


async def open_source(
    text: str,
    *,
    image_format: str | None,
    allow_backing: Sequence[str] = (),
    allow_data_file: Sequence[str] = (),
    snapshot: str | None = None,
    secrets: "Sequence[Secret]" = (),
) -> "BlockDevice":
    """Open what is read; the caller closes it.

    Args:
        text: A path or an NBD URI.
        image_format: None tells it from the content.
        allow_backing: Folders in which backing files may lie.
        allow_data_file: External data files that may be opened, or their folders.
        snapshot: Of an internal one whose disk is meant, its name or id.
        secrets: Passphrases of encrypted images.

    Raises:
        ConfigError: It can't be opened, or the server is not there.
        ImageError: It is broken or in use.
    """
    if not is_uri(text):
        from nbdserve.formats.open import open_image

        await _link_what_was_acknowledged(
            text, image_format, allow_backing, allow_data_file, secrets
        )
        return await open_image(
            text,
            format=image_format or "auto",
            read_only=True,
            allow_backing=allow_backing,
            allow_data_file=allow_data_file,
            snapshot=snapshot,
            secrets=secrets,
        )
    if image_format not in (None, "raw"):
        raise ConfigError(f"{text}: what a server exports is raw, not {image_format}")
    if snapshot is not None:
        raise ConfigError(f"{text}: an export has no snapshots to choose from")
    return await connect_to(text, read_only=True)


async def _link_what_was_acknowledged(
    path: str,
    image_format: str | None,
    allow_backing: Sequence[str],
    allow_data_file: Sequence[str],
    secrets: "Sequence[Secret]",
) -> None:
    """Link what a killed server had answered, so that it is read and not left out.

    Raises:
        ConfigError: It can't be opened for writing.
        ImageError: It is broken or in use.
    """
    from nbdserve.formats.open import open_image

    if image_format == "raw" or not left_a_log(path):
        return
    async with open_image(
        path,
        format=image_format or "auto",
        allow_backing=allow_backing,
        allow_data_file=allow_data_file,
        state_dir=engine_options().state_dir,
        secrets=secrets,
    ) as image:
        for note in image.notes:
            print(f"nbdserve: {note}", file=sys.stderr)


def left_a_log(path: str) -> bool:
    """Return whether a server left a redo log of an image, or still keeps it."""
    from nbdserve.formats.mapped.redo import redo_path

    state_dir = engine_options().state_dir
    if state_dir is None:
        return False
    try:
        status = os.stat(path)
    except OSError:
        # opening it will say what is wrong, in better words
        return False
    return redo_path(state_dir, status.st_dev, status.st_ino).exists()


async def connect_to(text: str, *, read_only: bool) -> "RemoteDisk":
    """Connect to the export that a URI names.

    Raises:
        ConfigError: There is no such export.
    """
    from nbdserve.remote.disk import connect
    from nbdserve.wire.uri import parse_uri

    return await connect(parse_uri(text), read_only=read_only)


def engine_options(secrets: "Sequence[Secret]" = ()) -> "EngineOptions":
    """Return the options for images that a command changes.

    With the redo logs of this machine: what a killed server had acknowledged must not
    be lost because somebody else changes the image before the next server does.
    """
    from nbdserve.app import default_state_dir
    from nbdserve.formats.mapped.opening import EngineOptions

    state_dir = default_state_dir(os.environ)
    return EngineOptions(
        state_dir=None if state_dir is None else Path(state_dir),
        secrets=tuple(secrets),
    )


def is_block_device(path: str) -> bool:
    """Return whether a path leads to a block device."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False
