"""What can be chosen about an image by more than one command."""

import argparse

from nbdserve.cli.parser import one_of
from nbdserve.errors import ConfigError

#: Of a disk that is read or overwritten; TLS is spoken by `nbdserve list` alone.
PATH_OR_URI = "a path, or the URI of an export: nbd:// or nbd+unix:// (no TLS)"


def define_format(parser: argparse._ActionsContainer, option: str = "--format") -> None:
    """Add the option that names the format of an image which is read."""
    parser.add_argument(
        option,
        metavar="F",
        type=one_of("qcow2", "qcow", "raw"),
        help="of the image: raw, qcow or qcow2 (default: what its header says, else raw)",
    )


def define_preallocation(parser: argparse._ActionsContainer) -> None:
    """Add --preallocation."""
    parser.add_argument(
        "--preallocation",
        metavar="MODE",
        type=one_of("off", "metadata", "falloc", "full"),
        help="metadata gives each cluster its place now, falloc takes all the space from"
        " the file system as well, full writes zeros there (default: off)",
    )


def define_data_file(parser: argparse.ArgumentParser) -> None:
    """Add the options of an external data file, and --lazy-refcounts."""
    parser.add_argument(
        "--lazy-refcounts",
        metavar="on|off",
        type=one_of("on", "off"),
        help="whether writers of qcow2 may put refcounts off (qemu does, nbdserve never)",
    )
    group = parser.add_argument_group("external data file (qcow2)")
    group.add_argument(
        "--data-file",
        metavar="PATH",
        help="keep the disk's data in a file of their own, which is made too; its name as"
        " the image will record it: a relative one counts from the image's folder",
    )
    group.add_argument(
        "--data-file-raw",
        action="store_true",
        default=None,
        help="let that file be a raw image of the disk by itself, at any time",
    )


def judge_data_file(arguments: argparse.Namespace) -> None:
    """Refuse --data-file-raw alone.

    Raises:
        ConfigError: There is no --data-file.
    """
    if arguments.data_file_raw and arguments.data_file is None:
        raise ConfigError("--data-file-raw needs --data-file")


def lazy_refcounts(arguments: argparse.Namespace) -> bool | None:
    """Return what --lazy-refcounts says, None if it is not there."""
    lazy: str | None = arguments.lazy_refcounts
    return None if lazy is None else lazy == "on"
