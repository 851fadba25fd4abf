"""`nbdserve image map`: where an image and its backing files hold data."""

import argparse
import json
from typing import TYPE_CHECKING

from nbdserve.cli.image.layout import define_format
from nbdserve.cli.parser import define_allowed_files
from nbdserve.cli.secrets import define_secret_file, secrets_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from nbdserve.formats.map import MapEntry

TAKES = "PATH"

DESCRIPTION = """\
Show which ranges of a disk hold data, and in which file of its chain. The image
may be in use; what is being written may be missing."""

EXAMPLES = """\
examples:
  nbdserve image map disk.qcow2
  nbdserve image map disk.qcow2 --json"""


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("path", metavar="PATH", help="the image")
    define_format(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="for programs, with the field names of qemu-img map; every range, zeros"
        " and holes too",
    )
    define_allowed_files(parser)
    define_secret_file(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the map as it is found: that of a large disk may be long."""
    import asyncio

    asyncio.run(_print_map(arguments))
    return 0


async def _print_map(arguments: argparse.Namespace) -> None:
    from contextlib import aclosing

    from nbdserve.cli.image import named_errors
    from nbdserve.formats.map import as_text

    async with aclosing(_entries(arguments)) as found:
        if arguments.json:
            separator = "["
            async for entry in found:
                print(separator + json.dumps(entry.as_json()), end="")
                separator = ",\n"
            print("[]" if separator == "[" else "]")
            return
        entries = [entry async for entry in found]
    with named_errors(arguments.path):
        text = as_text(entries, _file_names(arguments.path, arguments.format))
    print(text, end="")


async def _entries(arguments: argparse.Namespace) -> "AsyncGenerator[MapEntry]":
    """Yield the map; only its own failures are the image's."""
    from nbdserve.cli.hints import raw_option
    from nbdserve.cli.image import named_errors
    from nbdserve.formats.map import map_entries
    from nbdserve.formats.open import open_image

    with named_errors(arguments.path), raw_option("--format raw"):
        async with open_image(
            arguments.path,
            format=arguments.format or "auto",
            read_only=True,
            allow_backing=arguments.allow_backing,
            allow_data_file=arguments.allow_data_file,
            lock=False,
            secrets=secrets_of(arguments),
        ) as device:
            async for entry in map_entries(device):
                yield entry


def _file_names(path: str, image_format: str | None) -> list[str]:
    """Return where data lie in a chain, which was opened and so is finite and allowed."""
    from nbdserve.formats.info import image_info

    names = []
    following: str | None = path
    while following is not None:
        info = image_info(following, format=image_format)
        names.append(info.full_data_filename or following)
        following, image_format = info.full_backing_filename, info.backing_format
    return names
