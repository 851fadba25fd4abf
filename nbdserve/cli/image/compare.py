"""`nbdserve image compare`: do two disks hold the same?"""

import argparse
import json

from nbdserve.cli.image.layout import PATH_OR_URI
from nbdserve.cli.parser import define_allowed_files, one_of
from nbdserve.cli.secrets import define_secret_file, secrets_of

TAKES = "A B"

DESCRIPTION = """\
Compare what two disks hold. A and B are images or NBD URIs, of any formats; if one
is shorter, it counts as followed by zeros. Neither must be written meanwhile.

exit code:
  0  the same
  1  different
  2  they could not be compared"""

EXAMPLES = """\
examples:
  nbdserve image compare disk.img disk.qcow2
  nbdserve image compare copy.qcow2 nbd://127.0.0.1/disk --json"""

SAME = 0
DIFFERENT = 1


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    for name in ("a", "b"):
        upper = name.upper()
        parser.add_argument(name, metavar=upper, help=PATH_OR_URI)
        parser.add_argument(
            f"--format-{name}",
            metavar="F",
            type=one_of("qcow2", "qcow", "raw"),
            help=f"of {upper} (default: what its header says, else raw)",
        )
    define_allowed_files(parser)
    define_secret_file(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="for programs: identical, sizes, and the offset of the first difference",
    )


def run(arguments: argparse.Namespace) -> int:
    """Compare, and say where they differ."""
    from nbdserve.cli.progress import run_interruptibly

    return run_interruptibly(_compare(arguments), state="nothing is known")


async def _compare(arguments: argparse.Namespace) -> int:
    from contextlib import AsyncExitStack

    from nbdserve.cli.hints import raw_option
    from nbdserve.cli.image.disks import open_source
    from nbdserve.cli.progress import progress_bar
    from nbdserve.formats.compare import first_difference

    disks = []
    secrets = secrets_of(arguments)
    async with AsyncExitStack() as stack:
        for name in ("a", "b"):
            with raw_option(f"--format-{name} raw"):
                disk = await open_source(
                    getattr(arguments, name),
                    image_format=getattr(arguments, f"format_{name}"),
                    allow_backing=arguments.allow_backing,
                    allow_data_file=arguments.allow_data_file,
                    secrets=secrets,
                )
            stack.push_async_callback(disk.close)
            disks.append(disk)
        first, second = disks
        sizes = [first.size, second.size]
        with progress_bar("comparing", max(sizes)) as progress:
            offset = await first_difference(first, second, progress=progress)
    _report(offset, sizes, as_json=arguments.json)
    return SAME if offset is None else DIFFERENT


def _report(offset: int | None, sizes: list[int], *, as_json: bool) -> None:
    if as_json:
        found = {} if offset is None else {"offset": offset}
        print(json.dumps({"identical": offset is None, "sizes": sizes} | found))
        return
    if sizes[0] != sizes[1]:
        print(f"Warning: Image size mismatch! {sizes[0]} and {sizes[1]} bytes")
    if offset is None:
        print("Images are identical.")
    else:
        print(f"Content mismatch at offset {offset}!")
