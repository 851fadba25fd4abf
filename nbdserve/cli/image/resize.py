"""`nbdserve image resize`: another size for a disk that is not in use."""

import argparse

from nbdserve.cli.image.layout import define_preallocation
from nbdserve.cli.parser import define_allowed_files, judged, one_of
from nbdserve.cli.secrets import define_secret_file, secrets_of
from nbdserve.config.units import parse_size

TAKES = "PATH SIZE"

DESCRIPTION = """\
Give a disk another size. What is added reads as zeros. The image must not be
served or used meanwhile. After a crash at any moment the disk has the old size
or the new one. qcow version 1 images can't be resized: convert them."""

EXAMPLES = """\
examples:
  nbdserve image resize disk.qcow2 20G
  nbdserve image resize disk.qcow2 +5G
  nbdserve image resize disk.qcow2 -512M --shrink
  nbdserve image resize disk.raw 20G --format raw"""


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("path", metavar="PATH", help="the image")
    parser.add_argument(
        "size",
        metavar="SIZE",
        type=judged(_size),
        help="bytes, or with K, M, G, T; +SIZE and -SIZE count from what it is now",
    )
    parser.add_argument(
        "--shrink",
        action="store_true",
        help="allow a smaller size: what lies behind it is lost",
    )
    parser.add_argument(
        "--format",
        metavar="auto|raw|qcow2",
        type=one_of("auto", "raw", "qcow", "qcow2"),
        default="auto",
        help="auto tells qcow2 by its magic; for a raw image say raw (default: auto)",
    )
    define_preallocation(parser)
    define_allowed_files(parser)
    define_secret_file(parser)


def run(arguments: argparse.Namespace) -> int:
    """Resize; say nothing when it worked."""
    from nbdserve.cli.image import named_errors
    from nbdserve.cli.progress import run_interruptibly

    with named_errors(arguments.path):
        return run_interruptibly(
            _resize(arguments),
            state="the disk has the old size or the new one, not all of it preallocated",
        )


def _size(text: str) -> tuple[str, int]:
    """Return the sign, if there is one, and the size."""
    sign = text[:1] if text[:1] in {"+", "-"} else ""
    return sign, parse_size(text.removeprefix(sign))


async def _resize(arguments: argparse.Namespace) -> int:
    from nbdserve.cli.hints import raw_option
    from nbdserve.cli.image.changing import opened_to_change
    from nbdserve.cli.progress import progress_bar
    from nbdserve.errors import ConfigError, ImageError
    from nbdserve.formats.probe import is_raw
    from nbdserve.storage.names import shown

    with raw_option("--format raw"):
        if arguments.format == "auto" and is_raw(arguments.path):
            raise ConfigError(
                f"{shown(arguments.path)}: has no qcow or qcow2 header; add --format raw"
                " if it is a raw disk"
            )
    image_format = None if arguments.format == "auto" else arguments.format
    sign, size = arguments.size
    async with opened_to_change(
        arguments.path,
        image_format=image_format,
        allow_backing=arguments.allow_backing,
        allow_data_file=arguments.allow_data_file,
        secrets=secrets_of(arguments),
    ) as device:
        if sign == "+":
            size = device.size + size
        elif sign == "-":
            size = device.size - size
        old = device.size
        taken = arguments.preallocation or "off"
        if taken != "off":
            if size < old:
                raise ConfigError(
                    "--preallocation is for a larger size, not a smaller one"
                )
            # nothing yet, but what is impossible is refused before anything changes
            await device.preallocate(old, old, taken, lambda _: None)
        await device.resize(size, shrink=arguments.shrink)
        if taken != "off":
            length = device.size - old if taken == "full" else 0
            try:
                with progress_bar("writing zeros", length) as progress:
                    await device.preallocate(old, device.size, taken, progress)
            except OSError as error:
                raise ImageError(
                    f"{shown(arguments.path)}: {error.strerror}; the disk has its new"
                    " size already, not all of it preallocated"
                ) from error
    return 0
