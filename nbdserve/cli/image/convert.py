"""`nbdserve image convert`: copy a disk into another format or to another place."""

import argparse
from typing import TYPE_CHECKING

from nbdserve.cli.image.layout import (
    PATH_OR_URI,
    define_data_file,
    define_preallocation,
    judge_data_file,
    lazy_refcounts,
)
from nbdserve.cli.parser import define_allowed_files, judged, one_of
from nbdserve.cli.secrets import (
    define_encryption,
    define_iter_time,
    define_secret_file,
    new_encryption,
    secrets_of,
)
from nbdserve.config.units import parse_size

if TYPE_CHECKING:
    from nbdserve.block.device import BlockDevice

TAKES = "SRC DST"

DESCRIPTION = """\
Copy a disk. SRC is an image or an NBD URI. DST is a new image, which appears whole
or not at all; or a block device or an NBD URI, which is overwritten. Zeros take no
space. SRC must not be written meanwhile."""

EXAMPLES = """\
examples:
  nbdserve image convert disk.img disk.qcow2
  nbdserve image convert disk.qcow2 small.qcow2 --compress zstd
  nbdserve image convert nbd://127.0.0.1/disk copy.qcow2
  nbdserve image convert disk.qcow2 'nbd+unix:///disk?socket=/run/nbd.sock'"""

_LAYOUT = (
    "backing",
    "cluster_size",
    "compat",
    "compress",
    "encryption",
    "preallocation",
    "data_file",
    "lazy_refcounts",
)
_FORMATS = ("qcow2", "qcow", "raw")


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("source", metavar="SRC", help=PATH_OR_URI)
    parser.add_argument("destination", metavar="DST", help=PATH_OR_URI)
    parser.add_argument(
        "--from-format",
        metavar="F",
        type=one_of(*_FORMATS),
        help="of SRC: raw, qcow or qcow2 (default: what its header says, else raw)",
    )
    parser.add_argument(
        "--snapshot",
        metavar="NAME",
        help="copy the disk of an internal snapshot of SRC, by name or id",
    )
    parser.add_argument(
        "--format",
        metavar="qcow2|qcow|raw",
        type=one_of(*_FORMATS),
        help="of DST (default: qcow2, raw for a device or URI)",
    )
    define_allowed_files(parser)
    define_secret_file(parser)
    define_layout(parser)
    parser.add_argument(
        "--compress",
        metavar="zlib|zstd",
        type=one_of("zlib", "zstd"),
        help="compress each cluster, on all cores (qcow2; zstd needs qemu 5.1 or later)",
    )
    parser.add_argument(
        "--bitmaps",
        action="store_true",
        help="copy the persistent bitmaps of SRC too (qcow2)",
    )
    group = parser.add_argument_group("encryption of DST")
    define_encryption(group)
    define_iter_time(group)
    group.add_argument(
        "--target-secret-file",
        metavar="FILE",
        action="append",
        default=[],
        help="a file that is its passphrase, every byte of it",
    )
    group = parser.add_argument_group("backing file of DST")
    group.add_argument(
        "--backing",
        metavar="PATH",
        help="store only what differs from this image; its name as it will be"
        " recorded: a relative one counts from the folder of DST",
    )
    group.add_argument(
        "--backing-format",
        metavar="F",
        type=one_of(*_FORMATS),
        help="its format: raw, qcow or qcow2; needed with --backing",
    )
    define_data_file(parser)


def define_layout(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen about the layout of a new image."""
    parser.add_argument(
        "--cluster-size",
        metavar="S",
        type=judged(parse_size),
        help="of qcow2: 512 to 2M, a power of two (default: 64K)",
    )
    parser.add_argument(
        "--compat",
        metavar="2|3",
        type=one_of("2", "3"),
        help="version of qcow2: 2 for very old readers (default: 3)",
    )
    parser.add_argument(
        "--refcount-bits",
        metavar="N",
        type=one_of("1", "2", "4", "8", "16", "32", "64"),
        help="width of a qcow2 reference count: 1 to 64, a power of two (default: 16)",
    )
    parser.add_argument(
        "--extended-l2",
        action="store_true",
        help="subclusters, 32 in each cluster: an overlay then copies 2K for a small"
        " write, not 64K (qemu 5.2 or later)",
    )
    define_preallocation(parser)


def run(arguments: argparse.Namespace) -> int:
    """Copy the disk; say nothing when it worked, as cp does."""
    from nbdserve.cli.image import named_errors
    from nbdserve.cli.image.disks import is_block_device, is_uri
    from nbdserve.cli.progress import run_interruptibly
    from nbdserve.errors import ConfigError

    if bool(arguments.backing) != bool(arguments.backing_format):
        raise ConfigError("--backing and --backing-format go together")
    judge_data_file(arguments)
    in_place = is_uri(arguments.destination) or is_block_device(arguments.destination)
    if in_place:
        _judge_in_place(arguments)
    state = "the destination is half written" if in_place else "nothing was written"
    with named_errors(arguments.destination, or_uri=True):
        return run_interruptibly(_convert(arguments, in_place=in_place), state=state)


def _judge_in_place(arguments: argparse.Namespace) -> None:
    from nbdserve.errors import ConfigError

    if arguments.format not in (None, "raw"):
        raise ConfigError(
            f"{arguments.destination}: only raw is written to a device or an export"
        )
    for name in (*_LAYOUT, "refcount_bits", "bitmaps"):
        if getattr(arguments, name) not in (None, False):
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} is for new images only")
    if arguments.extended_l2:
        raise ConfigError("--extended-l2 is for new images only")


async def _convert(arguments: argparse.Namespace, *, in_place: bool) -> int:
    from nbdserve.cli.hints import raw_option
    from nbdserve.cli.image.disks import open_source
    from nbdserve.cli.progress import progress_bar
    from nbdserve.formats.convert import Target, convert_to_file

    secrets = secrets_of(arguments)
    encryption = new_encryption(
        arguments, arguments.target_secret_file, "--target-secret-file"
    )
    with raw_option("--from-format raw"):
        source = await open_source(
            arguments.source,
            image_format=arguments.from_format,
            allow_backing=arguments.allow_backing,
            allow_data_file=arguments.allow_data_file,
            secrets=secrets,
            snapshot=arguments.snapshot,
        )
    try:
        if in_place:
            await _overwrite(source, arguments.destination)
            return 0
        compat, refcount_bits = arguments.compat, arguments.refcount_bits
        target = Target(
            format=arguments.format or "qcow2",
            compression=arguments.compress,
            backing=arguments.backing,
            backing_format=arguments.backing_format,
            cluster_size=arguments.cluster_size,
            compat=None if compat is None else int(compat),
            refcount_bits=None if refcount_bits is None else int(refcount_bits),
            preallocation=arguments.preallocation,
            bitmaps=arguments.bitmaps,
            extended_l2=arguments.extended_l2,
            data_file=arguments.data_file,
            data_file_raw=bool(arguments.data_file_raw),
            lazy_refcounts=lazy_refcounts(arguments),
            encryption=encryption,
        )
        with progress_bar("converting", source.size) as progress:
            await convert_to_file(
                source,
                arguments.destination,
                target,
                allow_backing=arguments.allow_backing,
                allow_data_file=arguments.allow_data_file,
                secrets=secrets,
                progress=progress,
            )
    finally:
        await source.close()
    return 0


async def _overwrite(source: "BlockDevice", name: str) -> None:
    from nbdserve.cli.image.disks import connect_to, is_uri
    from nbdserve.cli.progress import progress_bar
    from nbdserve.formats.copy import overwrite
    from nbdserve.formats.open import open_image

    grain = 1
    destination: BlockDevice
    if is_uri(name):
        destination = remote = await connect_to(name, read_only=False)
        grain = remote.minimum_block
    else:
        destination = await open_image(name, format="raw")
    try:
        with progress_bar("copying", source.size) as progress:
            await overwrite(source, destination, grain=grain, progress=progress)
    finally:
        await destination.close()
