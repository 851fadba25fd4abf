"""`nbdserve image bitmap`: persistent dirty bitmaps of an image that is not in use."""

import argparse
from typing import TYPE_CHECKING

from nbdserve.cli.parser import define_allowed_files, judged, one_of
from nbdserve.cli.secrets import define_secret_file, secrets_of
from nbdserve.config.units import parse_size
from nbdserve.errors import ConfigError

if TYPE_CHECKING:
    from nbdserve.formats.qcow2.image import Qcow2Image

TAKES = "VERB PATH NAME [SOURCE...]"

DESCRIPTION = """\
Persistent bitmaps of a qcow2 image: what was changed since a moment, for
incremental backups. Whoever writes the image keeps them up to date; a server
that is killed leaves them marked as in use, and then they can only be removed.
The image must not be served or used meanwhile. `nbdserve image info` shows them.

  add      begin a bitmap, empty, that records changes from now on
  remove   forget it
  clear    let it record anew, from nothing
  enable   let it record changes from now on
  disable  keep it as it is
  merge    add to it what other bitmaps have recorded: of this image, or of
           another one of the same size (--from)"""

EXAMPLES = """\
examples:
  nbdserve image bitmap add disk.qcow2 since-monday
  nbdserve serve disk.qcow2 --bitmap since-monday
  nbdserve image bitmap merge disk.qcow2 week since-monday since-tuesday
  nbdserve image bitmap merge disk.qcow2 week --from old.qcow2 week"""

_VERBS = ("add", "remove", "clear", "enable", "disable", "merge")


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "verb", metavar="VERB", type=one_of(*_VERBS), help=", ".join(_VERBS)
    )
    parser.add_argument("path", metavar="PATH", help="the image")
    parser.add_argument("name", metavar="NAME", help="the bitmap")
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="*",
        default=[],  # or argparse says that it is required
        help="merge: the other bitmaps",
    )
    parser.add_argument(
        "--granularity",
        metavar="SIZE",
        type=judged(parse_size),
        help="add: bytes that one bit stands for, 512 to 2G, a power of two (default: the"
        " cluster size, within 4K and 64K)",
    )
    parser.add_argument(
        "--disabled", action="store_true", help="add: don't record changes yet"
    )
    parser.add_argument(
        "--from",
        dest="other",
        metavar="IMAGE",
        help="merge: the image that has the other bitmaps",
    )
    define_allowed_files(parser)
    define_secret_file(parser)


def run(arguments: argparse.Namespace) -> int:
    """Do what the verb says."""
    import asyncio

    from nbdserve.cli.image import named_errors

    _judge(arguments)
    with named_errors(arguments.path):
        asyncio.run(_change(arguments))
    return 0


def _judge(arguments: argparse.Namespace) -> None:
    verb = arguments.verb
    if verb != "add" and (arguments.granularity is not None or arguments.disabled):
        raise ConfigError("--granularity and --disabled are for bitmap add")
    if verb != "merge" and (arguments.sources or arguments.other is not None):
        raise ConfigError(f"bitmap {verb} takes one NAME, and no --from")
    if verb == "merge" and not arguments.sources:
        raise ConfigError("bitmap merge needs a NAME and the SOURCEs to add to it")


async def _change(arguments: argparse.Namespace) -> None:
    from nbdserve.cli.image.changing import qcow2_to_change

    path, name = arguments.path, arguments.name
    async with qcow2_to_change(
        path,
        "have persistent bitmaps",
        allow_backing=arguments.allow_backing,
        allow_data_file=arguments.allow_data_file,
        secrets=secrets_of(arguments),
    ) as image:
        match arguments.verb:
            case "add":
                await image.add_bitmap(
                    name,
                    granularity=arguments.granularity,
                    enabled=not arguments.disabled,
                )
            case "remove":
                await image.remove_bitmap(name)
            case "clear":
                await image.clear_bitmap(name)
            case "merge":
                await _merge(image, arguments)
            case verb:
                await image.enable_bitmap(name, enabled=verb == "enable")


async def _merge(image: "Qcow2Image", arguments: argparse.Namespace) -> None:
    from nbdserve.cli.image.changing import as_qcow2
    from nbdserve.cli.image.disks import open_source

    name, sources = arguments.name, arguments.sources
    if arguments.other is None:
        bitmaps = [await image.dirty_bitmap(source) for source in sources]
        await image.merge_bitmap(name, *bitmaps)
        return
    device = await open_source(
        arguments.other,
        image_format=None,
        allow_backing=arguments.allow_backing,
        allow_data_file=arguments.allow_data_file,
        secrets=secrets_of(arguments),
    )
    try:
        other = as_qcow2(device, arguments.other, "have persistent bitmaps")
        bitmaps = [await other.dirty_bitmap(source) for source in sources]
        await image.merge_bitmap(name, *bitmaps)
    finally:
        await device.close()
