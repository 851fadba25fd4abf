"""`nbdserve image snapshot`: internal snapshots of an image that is not in use."""

import argparse
import json

from nbdserve.cli.parser import define_allowed_files, one_of
from nbdserve.cli.secrets import define_secret_file, secrets_of
from nbdserve.errors import ConfigError

TAKES = "list|create|apply|delete PATH [NAME]"

DESCRIPTION = """\
Internal snapshots of a qcow2 image: states of its disk, kept inside the image.
The image must not be served or used meanwhile. After a crash at any moment the
image is as before or as wanted; `nbdserve image check` may find leaks.

  list    show them
  create  keep the disk as it is now under NAME
  apply   make the disk what it was then, its size too; what is not in a
          snapshot is lost
  delete  forget one, and give back what nothing else uses"""

EXAMPLES = """\
examples:
  nbdserve image snapshot create disk.qcow2 before-upgrade
  nbdserve image snapshot list disk.qcow2 --json
  nbdserve image snapshot apply disk.qcow2 before-upgrade
  nbdserve serve disk.qcow2 --snapshot before-upgrade"""


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "verb",
        metavar="list|create|apply|delete",
        type=one_of("list", "create", "apply", "delete"),
        help="what to do",
    )
    parser.add_argument("path", metavar="PATH", help="the image")
    parser.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        help="the snapshot's name; of an existing one its id will do",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="list for programs, with the field names of qemu-img info",
    )
    define_allowed_files(parser)
    define_secret_file(parser)


def run(arguments: argparse.Namespace) -> int:
    """Do what the verb says."""
    if (arguments.verb == "list") != (arguments.name is None):
        wants = "takes no" if arguments.verb == "list" else "needs a"
        raise ConfigError(f"snapshot {arguments.verb} {wants} NAME")
    if arguments.json and arguments.verb != "list":
        raise ConfigError("--json is for snapshot list")
    if arguments.verb == "list":
        return _list(arguments.path, as_json=arguments.json)

    import asyncio

    from nbdserve.cli.image import named_errors

    with named_errors(arguments.path):
        asyncio.run(_change(arguments))
    return 0


def _list(path: str, *, as_json: bool) -> int:
    from nbdserve.cli.image import named_errors
    from nbdserve.formats.info import image_info
    from nbdserve.storage.names import shown

    with named_errors(path):
        info = image_info(path)
    if info.format != "qcow2":
        raise ConfigError(f"{shown(path)}: only qcow2 images have internal snapshots")
    if as_json:
        print(json.dumps(info.snapshots_json(), indent=4))
    else:
        print(info.snapshots_text(), end="")
    return 0


async def _change(arguments: argparse.Namespace) -> None:
    from nbdserve.cli.image.changing import qcow2_to_change

    path, name = arguments.path, arguments.name
    async with qcow2_to_change(
        path,
        "have internal snapshots",
        allow_backing=arguments.allow_backing,
        allow_data_file=arguments.allow_data_file,
        secrets=secrets_of(arguments),
    ) as image:
        if arguments.verb == "create":
            await image.create_snapshot(name)
        elif arguments.verb == "apply":
            await image.apply_snapshot(name)
        else:
            await image.delete_snapshot(name)
