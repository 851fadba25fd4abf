"""`nbdserve image create`: a new, empty image."""

import argparse
import signal
import sys

from nbdserve.cli.image.layout import (
    define_data_file,
    define_preallocation,
    judge_data_file,
    lazy_refcounts,
)
from nbdserve.cli.parser import judged, one_of
from nbdserve.cli.secrets import define_encryption, define_iter_time, new_encryption
from nbdserve.config.units import parse_size

TAKES = "PATH SIZE"

DESCRIPTION = """\
Make a new image. Nothing that exists is ever overwritten."""

EXAMPLES = """\
examples:
  nbdserve image create disk.qcow2 10G
  nbdserve image create overlay.qcow2 10G --backing base.qcow2 --backing-format qcow2
  nbdserve image create disk.img 1T --format raw
  nbdserve image create disk.qcow2 10G --encryption luks --secret-file key.txt"""


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("path", metavar="PATH", help="the file to make")
    parser.add_argument(
        "size",
        metavar="SIZE",
        type=judged(parse_size),
        help="of the disk, in bytes or with K, M, G, T",
    )
    parser.add_argument(
        "--format",
        metavar="qcow2|qcow|raw",
        type=one_of("qcow2", "qcow", "raw"),
        default="qcow2",
        help="default: qcow2",
    )
    group = parser.add_argument_group("backing file, read where the image has no data")
    group.add_argument(
        "--backing",
        metavar="PATH",
        help="its name as the image will record it: a relative one counts from the"
        " image's folder",
    )
    group.add_argument(
        "--backing-format",
        metavar="F",
        type=one_of("qcow2", "qcow", "raw"),
        help="its format: raw, qcow or qcow2; needed with --backing, since a guess"
        " could be wrong",
    )
    group = parser.add_argument_group("layout")
    group.add_argument(
        "--cluster-size",
        metavar="S",
        type=judged(parse_size),
        help="of qcow2: 512 to 2M, a power of two (default: 64K)",
    )
    group.add_argument(
        "--compat",
        metavar="2|3",
        type=one_of("2", "3"),
        help="version of qcow2: 2 for very old readers (default: 3)",
    )
    group.add_argument(
        "--refcount-bits",
        metavar="N",
        type=one_of("1", "2", "4", "8", "16", "32", "64"),
        help="width of a qcow2 reference count: 1 to 64, a power of two (default: 16)",
    )
    group.add_argument(
        "--extended-l2",
        action="store_true",
        help="subclusters, 32 in each cluster: an overlay then copies 2K for a small"
        " write, not 64K (qemu 5.2 or later)",
    )
    define_preallocation(group)
    define_data_file(parser)

    group = parser.add_argument_group("encryption")
    define_encryption(group)
    define_iter_time(group)
    group.add_argument(
        "--secret-file",
        metavar="FILE",
        action="append",
        default=[],
        help="a file that is the passphrase, every byte of it",
    )


def run(arguments: argparse.Namespace) -> int:
    """Make the image; say nothing when it worked, as cp does."""
    from nbdserve.cli.progress import TERMINATED, progress_bar
    from nbdserve.errors import ConfigError
    from nbdserve.formats.create import create_image

    if arguments.backing_format and not arguments.backing:
        raise ConfigError("--backing-format needs --backing")
    if arguments.backing and not arguments.backing_format:
        raise ConfigError("--backing needs --backing-format: raw, qcow or qcow2")
    judge_data_file(arguments)
    encryption = new_encryption(arguments, arguments.secret_file, "--secret-file")
    # a long preallocation cleans up after itself
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    compat, refcount_bits = arguments.compat, arguments.refcount_bits
    length = arguments.size if arguments.preallocation == "full" else 0
    with progress_bar("writing zeros", length) as progress:
        create_image(
            arguments.path,
            arguments.size,
            format=arguments.format,
            backing=arguments.backing,
            backing_format=arguments.backing_format,
            cluster_size=arguments.cluster_size,
            compat=None if compat is None else int(compat),
            refcount_bits=None if refcount_bits is None else int(refcount_bits),
            preallocation=arguments.preallocation,
            extended_l2=arguments.extended_l2,
            data_file=arguments.data_file,
            data_file_raw=bool(arguments.data_file_raw),
            lazy_refcounts=lazy_refcounts(arguments),
            encryption=encryption,
            progress=progress,
        )
    return 0
