"""`nbdserve image amend`: another version or layout for a qcow2 image that is not in use."""

import argparse
import os

from nbdserve.cli.parser import one_of
from nbdserve.errors import ConfigError

TAKES = "PATH"

DESCRIPTION = """\
Change the version, the width of refcounts, or lazy refcounts of a qcow2 image.
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
        "--allow-backing",
        metavar="DIR",
        action="append",
        default=[],
        help="also open backing files below DIR, not only from the image's own folder",
    )


def run(arguments: argparse.Namespace) -> int:
    """Amend; say nothing when it worked."""
    import asyncio

    from nbdserve.app import default_state_dir
    from nbdserve.cli.image import named_errors
    from nbdserve.formats.amend import amend_image, prepare_to_amend
    from nbdserve.formats.qcow2.amend import Amendment

    lazy = arguments.lazy_refcounts
    wanted = Amendment(
        version=int(arguments.compat) if arguments.compat else None,
        refcount_bits=int(arguments.refcount_bits) if arguments.refcount_bits else None,
        lazy_refcounts=None if lazy is None else lazy == "on",
    )
    if wanted == Amendment():
        raise ConfigError(
            "nothing to amend: say --compat, --refcount-bits or --lazy-refcounts"
        )
    with named_errors(arguments.path):
        asyncio.run(
            prepare_to_amend(
                arguments.path,
                wanted,
                allow_backing=arguments.allow_backing,
                state_dir=default_state_dir(os.environ),
            )
        )
        amend_image(arguments.path, wanted)
    return 0
