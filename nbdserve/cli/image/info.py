"""`nbdserve image info`: what an image is."""

import argparse
import json

from nbdserve.cli.image.layout import define_format

TAKES = "PATH"

DESCRIPTION = """\
Describe an image: format, size, backing file, snapshots. It may be in use."""

EXAMPLES = """\
examples:
  nbdserve image info disk.qcow2
  nbdserve image info disk.qcow2 --json"""


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("path", metavar="PATH", help="the image")
    define_format(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="for programs, with the field names of qemu-img info",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print what the image's header says."""
    from nbdserve.cli.hints import raw_option
    from nbdserve.cli.image import named_errors
    from nbdserve.formats.info import image_info

    with named_errors(arguments.path), raw_option("--format raw"):
        info = image_info(arguments.path, format=arguments.format)
    if arguments.json:
        print(json.dumps(info.as_json() | info.details_json(), indent=4))
    else:
        print(info.as_text() + info.details_text(), end="")
    return 0
