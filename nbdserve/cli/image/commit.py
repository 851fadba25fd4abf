"""`nbdserve image commit`: write an overlay into its backing file."""

import argparse

from nbdserve.cli.parser import define_allowed_files, one_of
from nbdserve.cli.secrets import define_secret_file, secrets_of

TAKES = "PATH"

DESCRIPTION = """\
Write what an overlay holds into its backing file, then empty the overlay. Neither
must be in use. Other overlays of the same backing file, and internal snapshots of
this one, show the change too, so there should be none. An interruption does no harm:
say the same command again."""

EXAMPLES = """\
examples:
  nbdserve image commit overlay.qcow2
  nbdserve image commit overlay.qcow2 --keep"""


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("path", metavar="PATH", help="the overlay")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="do not empty the overlay, because it is going to be deleted",
    )
    parser.add_argument(
        "--format",
        metavar="F",
        type=one_of("qcow2", "qcow"),
        help="of the overlay (default: what its header says)",
    )
    parser.add_argument(
        "--backing-format",
        metavar="F",
        type=one_of("qcow2", "qcow", "raw"),
        help="of the backing file, where the overlay does not say",
    )
    define_allowed_files(parser)
    define_secret_file(parser)


def run(arguments: argparse.Namespace) -> int:
    """Commit, and say into which file."""
    from nbdserve.cli.image import named_errors
    from nbdserve.cli.progress import run_interruptibly

    with named_errors(arguments.path):
        return run_interruptibly(
            _commit(arguments), state="the overlay shows what it did, and can go on"
        )


async def _commit(arguments: argparse.Namespace) -> int:
    from nbdserve.cli.image.disks import engine_options
    from nbdserve.cli.progress import progress_bar
    from nbdserve.formats.commit_overlay import commit_overlay
    from nbdserve.formats.info import image_info
    from nbdserve.storage.names import shown

    size = image_info(arguments.path).virtual_size
    with progress_bar("committing", size) as progress:
        target = await commit_overlay(
            arguments.path,
            image_format=arguments.format or "auto",
            backing_format=arguments.backing_format,
            allow_backing=arguments.allow_backing,
            allow_data_file=arguments.allow_data_file,
            empty=not arguments.keep,
            engine=engine_options(secrets_of(arguments)),
            progress=progress,
        )
    print(f"committed to {shown(target)}")
    return 0
