"""`nbdserve image rename`: another name for an image, and for those that refer to it."""

import argparse

TAKES = "OLD NEW"

DESCRIPTION = """\
Rename an image, or a data file, within a file system, and correct its name in the
images that refer to it. The file has both names until all of that is done, so
that an interruption leaves no image without its backing file. Nothing is ever
overwritten."""

EXAMPLES = """\
examples:
  nbdserve image rename base.qcow2 debian-12.qcow2
  nbdserve image rename base.qcow2 debian-12.qcow2 --referrer a.qcow2 --referrer b.qcow2"""


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("old", metavar="OLD", help="the image")
    parser.add_argument("new", metavar="NEW", help="its new path")
    parser.add_argument(
        "--referrer",
        metavar="IMG",
        action="append",
        default=[],
        help="an image whose backing file, or external data file, OLD is; may be given"
        " several times",
    )


def run(arguments: argparse.Namespace) -> int:
    """Rename; say nothing when it worked, as mv does."""
    from nbdserve.cli.image import named_errors
    from nbdserve.cli.image.disks import engine_options
    from nbdserve.cli.progress import run_interruptibly
    from nbdserve.formats.rename import rename_image

    engine = engine_options()

    async def rename() -> int:
        await rename_image(
            arguments.old, arguments.new, arguments.referrer, engine=engine
        )
        return 0

    state = "OLD, NEW or both exist, and every referrer finds its backing file"
    with named_errors(arguments.old):
        return run_interruptibly(rename(), state=state)
