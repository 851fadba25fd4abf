"""`nbdserve image check`: is an image sound?"""

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdserve.formats.check_result import CheckResult

TAKES = "PATH"

DESCRIPTION = """\
Look for damage in an image, and change nothing. The image must not be served
or used meanwhile.

exit code:
  0   clean
  1   the check could not be done
  2   corruptions: contradictions that can cost data
  3   leaks only: space that nothing uses
  63  a raw image, in which nothing can be checked"""

EXAMPLES = """\
examples:
  nbdserve image check disk.qcow2
  nbdserve image check disk.qcow2 --json"""

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


def run(arguments: argparse.Namespace) -> int:
    """Check the image, print what was found, and return what it means."""
    from nbdserve.cli.image import named_errors
    from nbdserve.formats.check import check_image
    from nbdserve.storage import locks
    from nbdserve.storage.names import shown

    path: str = arguments.path
    with named_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # what somebody writes meanwhile would look like damage
            locks.take(fd, shown(path), write=False)
            result = check_image(path)
        finally:
            os.close(fd)
    if result is None:
        message = f"{shown(path)}: raw images have no check"
        print(f"nbdserve: {message}", file=sys.stderr)
        return NO_CHECK
    if arguments.json:
        print(json.dumps(result.as_json(), indent=4))
    else:
        print(result.as_text(), end="")
    return exit_code(result)


def exit_code(result: "CheckResult") -> int:
    """Return the worst of what was found, as qemu-img check does."""
    if result.check_errors:
        return FAILED
    if result.corruptions:
        return CORRUPT
    return LEAKS if result.leaks else CLEAN
