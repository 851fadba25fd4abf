"""`nbdserve image amend`: another version or layout for a qcow2 image that is not in use."""

import argparse
import os

from nbdserve.cli.parser import define_allowed_files, one_of
from nbdserve.errors import ConfigError

TAKES = "PATH"

DESCRIPTION = """\
Change the version, the width of refcounts, lazy refcounts, or what is recorded of
the external data file of a qcow2 image.
The disk stays the same. The image must not be served or used meanwhile. After
a crash at any moment it is as before or as wanted; `nbdserve image check` may
find leaks."""

EXAMPLES = """\
examples:
  nbdserve image amend disk.qcow2 --compat 3
  nbdserve image amend disk.qcow2 --compat 2 --refcount-bits 16
  nbdserve image amend disk.qcow2 --lazy-refcounts off"""


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("path", metavar="PATH", help="the image")
    parser.add_argument(
        "--compat",
        metavar="2|3",
        type=one_of("2", "3"),
        help="version of qcow2; 2 has no zero clusters, they become data where needed",
    )
    parser.add_argument(
        "--refcount-bits",
        metavar="N",
        type=one_of("1", "2", "4", "8", "16", "32", "64"),
        help="width of a reference count: 1 to 64, a power of two; 16 in version 2",
    )
    parser.add_argument(
        "--lazy-refcounts",
        metavar="on|off",
        type=one_of("on", "off"),
        help="whether writers may put refcounts off (qemu does, nbdserve never)",
    )
    parser.add_argument(
        "--data-file",
        metavar="PATH",
        help="another name of the external data file, as the image will record it;"
        " the file itself stays as and where it is",
    )
    parser.add_argument(
        "--data-file-raw",
        metavar="on|off",
        type=one_of("on", "off"),
        help="off: the data file need not be a raw image by itself any more",
    )
    define_allowed_files(parser)


def run(arguments: argparse.Namespace) -> int:
    """Amend; say nothing when it worked."""
    import asyncio

    from nbdserve.app import default_state_dir
    from nbdserve.cli.image import named_errors
    from nbdserve.cli.image.disks import left_a_log
    from nbdserve.formats.amend import amend_image, prepare_to_amend
    from nbdserve.formats.create import judge_data_name
    from nbdserve.formats.qcow2.amend import Amendment

    lazy, raw = arguments.lazy_refcounts, arguments.data_file_raw
    data_file = None
    if arguments.data_file is not None:
        judge_data_name(arguments.data_file)
        data_file = os.fsencode(arguments.data_file)
    wanted = Amendment(
        version=int(arguments.compat) if arguments.compat else None,
        refcount_bits=int(arguments.refcount_bits) if arguments.refcount_bits else None,
        lazy_refcounts=None if lazy is None else lazy == "on",
        data_file=data_file,
        data_file_raw=None if raw is None else raw == "on",
    )
    if wanted == Amendment():
        raise ConfigError(
            "nothing to amend: say --compat, --refcount-bits, --lazy-refcounts or"
            " --data-file"
        )
    with named_errors(arguments.path):
        # a data file that has moved can't be opened, and need not
        if wanted.of_the_disk or left_a_log(arguments.path):
            asyncio.run(
                prepare_to_amend(
                    arguments.path,
                    wanted,
                    allow_backing=arguments.allow_backing,
                    allow_data_file=arguments.allow_data_file,
                    state_dir=default_state_dir(os.environ),
                )
            )
        amend_image(arguments.path, wanted)
    return 0
