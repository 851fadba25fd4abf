"""`nbdserve image rebase`: give an image another backing file."""

import argparse

from nbdserve.cli.parser import define_allowed_files, one_of
from nbdserve.cli.secrets import define_secret_file, secrets_of

TAKES = "PATH --backing NEW"

DESCRIPTION = """\
Give an image another backing file, or none, without changing what it shows: where
the old and the new one differ, the image first gets a copy. It must not be in use.
An interruption does no harm: say the same command again."""

EXAMPLES = """\
examples:
  nbdserve image rebase disk.qcow2 --backing new.qcow2 --backing-format qcow2
  nbdserve image rebase disk.qcow2 --backing ''
  nbdserve image rebase disk.qcow2 --backing moved.img --backing-format raw --unsafe"""


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("path", metavar="PATH", help="the image")
    parser.add_argument(
        "--backing",
        metavar="NEW",
        required=True,
        help="name of the new backing file as the image will record it: a relative"
        " one counts from the image's folder; '' is none",
    )
    parser.add_argument(
        "--backing-format",
        metavar="F",
        type=one_of("qcow2", "qcow", "raw"),
        help="its format: raw, qcow or qcow2; needed, since a guess could be wrong",
    )
    parser.add_argument(
        "--unsafe",
        action="store_true",
        help="change the name only; the image shows something else unless the new file"
        " holds what the old one did. The old one need not exist",
    )
    parser.add_argument(
        "--format",
        metavar="F",
        type=one_of("qcow2", "qcow"),
        help="of the image (default: what its header says)",
    )
    define_allowed_files(parser)
    define_secret_file(parser)


def run(arguments: argparse.Namespace) -> int:
    """Rebase; say nothing when it worked."""
    from nbdserve.cli.image import named_errors
    from nbdserve.cli.progress import run_interruptibly
    from nbdserve.errors import ConfigError

    if bool(arguments.backing) != bool(arguments.backing_format):
        raise ConfigError("--backing needs --backing-format: raw, qcow or qcow2")
    with named_errors(arguments.path):
        return run_interruptibly(
            _rebase(arguments), state="the image shows what it did, on its old backing"
        )


async def _rebase(arguments: argparse.Namespace) -> int:
    from nbdserve.cli.image.disks import engine_options
    from nbdserve.cli.progress import progress_bar
    from nbdserve.formats.info import image_info
    from nbdserve.formats.rebase import rebase, rebase_unsafely

    engine = engine_options(secrets_of(arguments))
    backing = arguments.backing or None
    if arguments.unsafe:
        await rebase_unsafely(
            arguments.path,
            backing,
            arguments.backing_format,
            image_format=arguments.format or "auto",
            engine=engine,
        )
        return 0
    size = image_info(arguments.path).virtual_size
    with progress_bar("rebasing", size) as progress:
        await rebase(
            arguments.path,
            backing,
            arguments.backing_format,
            image_format=arguments.format or "auto",
            allow_backing=arguments.allow_backing,
            allow_data_file=arguments.allow_data_file,
            engine=engine,
            progress=progress,
        )
    return 0
