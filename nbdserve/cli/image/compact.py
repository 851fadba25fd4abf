"""`nbdserve image compact`: a smaller file for an image that is not in use."""

import argparse
import json
import os
from typing import TYPE_CHECKING

from nbdserve.cli.secrets import define_secret_file, secrets_of
from nbdserve.config.units import format_size
from nbdserve.errors import ConfigError, ImageCorruptError

if TYPE_CHECKING:
    from nbdserve.formats.qcow2.compaction import Compacted

TAKES = "PATH"

DESCRIPTION = """\
Move clusters from the end of a qcow2 image into the free space that discards have
left in it, and cut the file. Leaked clusters are given back first. What the disk
shows does not change. What snapshots share, and persistent bitmaps, stay where they
are. It may be interrupted at any moment, and a crash leaves leaks at most. An
image that is served is compacted with `nbdserve ctl ... compact`."""

EXAMPLES = """\
examples:
  nbdserve image compact disk.qcow2
  nbdserve image compact disk.qcow2 --json"""


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("path", metavar="PATH", help="the image")
    parser.add_argument("--json", action="store_true", help="the outcome for programs")
    parser.add_argument(
        "--allow-backing",
        metavar="DIR",
        action="append",
        default=[],
        help="also open backing files below DIR, not only from the image's own folder",
    )
    define_secret_file(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compact, and say how much smaller the file is."""
    from nbdserve.cli.image import named_errors
    from nbdserve.cli.image.changing import link_leftovers
    from nbdserve.cli.progress import run_interruptibly
    from nbdserve.formats.info import image_info
    from nbdserve.formats.repair import repair_image
    from nbdserve.storage.names import shown

    path: str = arguments.path
    with named_errors(path):
        found = image_info(path)
        if found.format != "qcow2":
            raise ConfigError(
                f"{shown(path)}: is a {found.format} image, and only qcow2 images can be"
                " compacted; nbdserve image convert makes one without free space"
            )
        if "data-file" in (found.specific or {}):
            raise ConfigError(
                f"{shown(path)}: has its data in another file, where each cluster has"
                " its place; what is discarded takes no space there"
            )
        link_leftovers(path)
        # what leaks would keep the file from getting shorter
        after = repair_image(path, everything=False, agree=lambda _: False).after
        if after.corruptions or after.check_errors:
            raise ImageCorruptError(
                f"{shown(path)}: has {after.corruptions} corruptions; run 'nbdserve image"
                " check' on it"
            )
        return run_interruptibly(
            _compact(arguments), state="what was moved stays moved; run it again"
        )


async def _compact(arguments: argparse.Namespace) -> int:
    from nbdserve.cli.image.changing import qcow2_to_change
    from nbdserve.cli.progress import growing_bar

    path: str = arguments.path
    before = os.stat(path).st_size
    async with qcow2_to_change(
        path,
        "can be compacted",
        allow_backing=arguments.allow_backing,
        secrets=secrets_of(arguments),
    ) as image:
        with growing_bar("compacting") as progress:
            done = await image.compact(progress=progress)
    # closing gives back what was reserved meanwhile
    print(told(path, before, os.stat(path).st_size, done, as_json=arguments.json))
    return 0


def told(
    name: str, before: int, after: int, done: "Compacted", *, as_json: bool
) -> str:
    """Return what to say of a compaction.

    Args:
        name: Of the image.
        before: Bytes of the file.
        after: Bytes of the file.
        done: What was done.
        as_json: Whether it is for programs.
    """
    if as_json:
        report = {
            "filename": name,
            "size-before": before,
            "size-after": after,
            "moved-bytes": done.moved,
            "unmovable-clusters": done.stays,
        }
        return json.dumps(report, indent=4)
    text = (
        f"{name}: {format_size(before)} -> {format_size(after)},"
        f" {format_size(done.moved)} moved"
    )
    if done.stays:
        text += (
            f"; {done.stays} clusters up to its end can't be moved (used by snapshots or"
            " bitmaps)"
        )
    return text
