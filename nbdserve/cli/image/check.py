"""`nbdserve image check`: is an image sound?"""

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from nbdserve.cli.parser import one_of
from nbdserve.cli.secrets import define_secret_file, secrets_of
from nbdserve.errors import ConfigError

if TYPE_CHECKING:
    from nbdserve.formats.check_result import CheckResult

TAKES = "PATH"

DESCRIPTION = """\
Look for damage in an image, and change nothing unless --repair is given. The
image must not be served or used meanwhile.

A repair rebuilds refcounts from scratch where needed, and mends flags and
entries. Where that would cost data it first says which, and wants a yes or
--force; otherwise nothing that can be read gets lost.

exit code, after a repair that of a second check:
  0   clean
  1   the check could not be done
  2   corruptions: contradictions that can cost data
  3   leaks only: space that nothing uses
  63  a raw image, in which nothing can be checked"""

EXAMPLES = """\
examples:
  nbdserve image check disk.qcow2
  nbdserve image check disk.qcow2 --json
  nbdserve image check disk.qcow2 --repair leaks
  nbdserve image check disk.qcow2 --repair all"""

# The exit codes of qemu-img check.
CLEAN = 0
FAILED = 1
CORRUPT = 2
LEAKS = 3
NO_CHECK = 63


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("path", metavar="PATH", help="the image")
    parser.add_argument(
        "--json",
        action="store_true",
        help="for programs, with the field names of qemu-img check",
    )
    parser.add_argument(
        "--repair",
        metavar="leaks|all",
        type=one_of("leaks", "all"),
        help="leaks: give back what nothing uses; all: mend everything else as well",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="repair without asking, even if data are lost by it",
    )
    define_secret_file(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check the image, print what was found, and return what it means."""
    from nbdserve.cli.image import named_errors
    from nbdserve.formats.check import check_image
    from nbdserve.storage import locks
    from nbdserve.storage.descriptors import open_descriptor
    from nbdserve.storage.names import shown

    path: str = arguments.path
    if arguments.repair:
        return _repair(arguments)
    if arguments.force:
        raise ConfigError("--force is for --repair")
    with named_errors(path):
        fd = open_descriptor(path, os.O_RDONLY)
        try:
            # what somebody writes meanwhile would look like damage
            locks.take(fd, shown(path), write=False)
            result = check_image(path)
        finally:
            os.close(fd)
    if result is None:
        return _nothing_to_check(path)
    if arguments.json:
        print(json.dumps(result.as_json(), indent=4))
    else:
        print(result.as_text(), end="")
    return exit_code(result)


def _nothing_to_check(path: str) -> int:
    """Say that an image is raw, as programs expect it of qemu-img: JSON is not printed."""
    from nbdserve.storage.names import shown

    print(
        f"nbdserve: {shown(path)}: has no qcow or qcow2 header, so it is raw, and there is"
        " nothing in it that could be checked",
        file=sys.stderr,
    )
    return NO_CHECK


def _repair(arguments: argparse.Namespace) -> int:
    """Repair, and print what was done and what is left."""
    from nbdserve.cli.image import named_errors
    from nbdserve.cli.image.changing import link_leftovers
    from nbdserve.formats.probe import is_raw
    from nbdserve.formats.repair import repair_image

    path: str = arguments.path
    with named_errors(path):
        if is_raw(path):
            return _nothing_to_check(path)
        # what a killed server had acknowledged would look like leaks
        if not arguments.force:
            link_leftovers(path, secrets_of(arguments))
        repair = repair_image(
            path,
            everything=arguments.repair == "all",
            agree=lambda losses: _agree(losses, force=arguments.force),
        )
    if arguments.json:
        shown = repair.after.as_json()
        if repair.leaks_fixed:
            shown["leaks-fixed"] = repair.leaks_fixed
        if repair.corruptions_fixed:
            shown["corruptions-fixed"] = repair.corruptions_fixed
        print(json.dumps(shown, indent=4))
        return exit_code(repair.after)
    if repair.leaks_fixed or repair.corruptions_fixed:
        print("The following inconsistencies were found and repaired:\n")
        print(f"    {repair.leaks_fixed} leaked clusters")
        print(f"    {repair.corruptions_fixed} corruptions\n")
        print("Double checking the fixed image now...")
    print(repair.after.as_text(), end="")
    return exit_code(repair.after)


def _agree(losses: list[str], *, force: bool) -> bool:
    """Say what a repair would lose; return whether to do it all the same."""
    print("nbdserve: this would be lost:", file=sys.stderr)
    for loss in losses:
        print(f"  {loss}", file=sys.stderr)
    if force:
        return True
    if not sys.stdin.isatty():
        print("nbdserve: left as it is; --force repairs it", file=sys.stderr)
        return False
    print("Repair it all the same? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def exit_code(result: "CheckResult") -> int:
    """Return the worst of what was found, as qemu-img check does."""
    if result.check_errors:
        return FAILED
    if result.corruptions:
        return CORRUPT
    return LEAKS if result.leaks else CLEAN
