"""`nbdserve image measure`: how large will a converted image be?"""

import argparse
import json

from nbdserve.cli.image.layout import PATH_OR_URI
from nbdserve.cli.parser import define_allowed_files, judged, one_of
from nbdserve.cli.secrets import (
    define_encryption,
    define_secret_file,
    judge_encryption,
    secrets_of,
)
from nbdserve.config.units import parse_size

TAKES = "[SRC]"

DESCRIPTION = """\
Compute how much space a new image will need: for what SRC (an image or an NBD URI)
holds now, or for an empty disk of --size; and if all of the disk is written later.
Compression is not counted."""

EXAMPLES = """\
examples:
  nbdserve image measure disk.img
  nbdserve image measure --size 100G --cluster-size 1M --json"""


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from nbdserve.cli.image.convert import define_layout

    parser.add_argument("source", metavar="SRC", nargs="?", help=PATH_OR_URI)
    parser.add_argument(
        "--size",
        metavar="SIZE",
        type=judged(parse_size),
        help="instead of SRC: of an empty disk, in bytes or with K, M, G, T",
    )
    parser.add_argument(
        "--from-format",
        metavar="F",
        type=one_of("qcow2", "qcow", "raw"),
        help="of SRC: raw, qcow or qcow2 (default: what its header says, else raw)",
    )
    parser.add_argument(
        "--format",
        metavar="qcow2|raw",
        type=one_of("qcow2", "raw"),
        default="qcow2",
        help="of the new image (default: qcow2)",
    )
    define_allowed_files(parser)
    define_secret_file(parser)
    define_layout(parser)
    define_encryption(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="for programs, with the field names of qemu-img measure",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print both sizes."""
    from nbdserve.cli.progress import run_interruptibly
    from nbdserve.errors import ConfigError

    if (arguments.source is None) == (arguments.size is None):
        raise ConfigError(
            "give either SRC or --size; see nbdserve image measure --help"
        )
    return run_interruptibly(_measure(arguments), state="nothing was measured")


async def _measure(arguments: argparse.Namespace) -> int:
    from contextlib import AsyncExitStack

    from nbdserve.cli.hints import raw_option
    from nbdserve.cli.image.disks import open_source
    from nbdserve.formats.crypto.new_luks import DEFAULT_CIPHER, luks_bytes
    from nbdserve.formats.measure import measure_qcow2, measure_raw
    from nbdserve.formats.qcow2.create import DEFAULT_CLUSTER_SIZE, Options

    encrypted = judge_encryption(arguments)
    options = Options(
        cluster_size=arguments.cluster_size or DEFAULT_CLUSTER_SIZE,
        version=int(arguments.compat or 3),
        refcount_bits=int(arguments.refcount_bits or 16),
        extended_l2=arguments.extended_l2,
    )
    async with AsyncExitStack() as stack:
        source = None
        if arguments.source is not None:
            with raw_option("--from-format raw"):
                source = await open_source(
                    arguments.source,
                    image_format=arguments.from_format,
                    allow_backing=arguments.allow_backing,
                    allow_data_file=arguments.allow_data_file,
                    secrets=secrets_of(arguments),
                )
            stack.push_async_callback(source.close)
        size = arguments.size if source is None else source.size
        if arguments.format == "raw":
            found = measure_raw(size)
        else:
            found = await measure_qcow2(
                size,
                options,
                source=source,
                luks_bytes=luks_bytes(arguments.cipher or DEFAULT_CIPHER)
                if encrypted
                else 0,
                preallocated=arguments.preallocation in {"falloc", "full"},
            )
    if arguments.json:
        print(json.dumps(found.as_json(), indent=4))
    else:
        print(found.as_text(), end="")
    return 0
