"""`nbdserve image amend`: another version or layout for a qcow2 image that is not in use."""

import argparse
import os
from typing import TYPE_CHECKING

from nbdserve.cli.parser import define_allowed_files, judged, one_of
from nbdserve.cli.secrets import (
    define_iter_time,
    define_secret_file,
    secrets_of,
    whole_number,
)
from nbdserve.errors import ConfigError

if TYPE_CHECKING:
    from nbdserve.formats.crypto.key_slots import SlotChange

TAKES = "PATH"

DESCRIPTION = """\
Change the version, the width of refcounts, lazy refcounts, what is recorded of
the external data file, or the passphrases of a qcow2 image.
The disk stays the same. The image must not be served or used meanwhile. After
a crash at any moment it is as before or as wanted; `nbdserve image check` may
find leaks."""

EXAMPLES = """\
examples:
  nbdserve image amend disk.qcow2 --compat 3
  nbdserve image amend disk.qcow2 --compat 2 --refcount-bits 16
  nbdserve image amend disk.qcow2 --lazy-refcounts off
  nbdserve image amend disk.qcow2 --secret-file old --add-secret-file new"""


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
    define_secret_file(parser)

    group = parser.add_argument_group("passphrases of a LUKS image")
    group.add_argument(
        "--add-secret-file",
        metavar="FILE",
        help="let this passphrase open it too, in the first free of 8 key slots",
    )
    group.add_argument(
        "--slot",
        metavar="N",
        type=judged(whole_number),
        help="in this key slot, 0 to 7",
    )
    define_iter_time(group)
    group.add_argument(
        "--remove-secret-file",
        metavar="FILE",
        help="empty the key slots that this passphrase opens, but never the last one",
    )
    group.add_argument(
        "--remove-slot",
        metavar="N",
        type=judged(whole_number),
        help="empty this key slot",
    )


def run(arguments: argparse.Namespace) -> int:
    """Amend; say nothing when it worked."""
    import asyncio

    from nbdserve.app import default_state_dir
    from nbdserve.cli.image import named_errors
    from nbdserve.cli.image.changing import require_qcow2
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
    change = _slot_change(arguments)
    if wanted == Amendment() and not change.wanted:
        raise ConfigError(
            "nothing to amend: say --compat, --refcount-bits, --lazy-refcounts,"
            " --data-file, or what to do with passphrases"
        )
    with named_errors(arguments.path):
        asyncio.run(require_qcow2(arguments.path, "can be amended"))
        if change.wanted:
            asyncio.run(_change_slots(arguments, change))
        if wanted == Amendment():
            return 0
        # a data file that has moved can't be opened, and need not
        if wanted.of_the_disk or left_a_log(arguments.path):
            asyncio.run(
                prepare_to_amend(
                    arguments.path,
                    wanted,
                    allow_backing=arguments.allow_backing,
                    allow_data_file=arguments.allow_data_file,
                    secrets=secrets_of(arguments),
                    state_dir=default_state_dir(os.environ),
                )
            )
        amend_image(arguments.path, wanted)
    return 0


def _slot_change(arguments: argparse.Namespace) -> "SlotChange":
    """Return what is to become of the passphrases.

    Raises:
        ConfigError: The options contradict each other, or a file can't be read.
    """
    from nbdserve.formats.crypto.key_slots import SlotChange
    from nbdserve.formats.crypto.new_luks import DEFAULT_ITER_TIME_MS
    from nbdserve.formats.crypto.secret import read_secret

    added, removed = arguments.add_secret_file, arguments.remove_secret_file
    time_ms = arguments.iter_time
    if added is None and time_ms is not None:
        raise ConfigError("--iter-time is for --add-secret-file")
    change = SlotChange(
        add=None if added is None else read_secret(added),
        slot=arguments.slot,
        remove=None if removed is None else read_secret(removed),
        remove_slot=arguments.remove_slot,
        iter_time_ms=DEFAULT_ITER_TIME_MS if time_ms is None else time_ms,
    )
    change.judge()
    return change


async def _change_slots(arguments: argparse.Namespace, change: "SlotChange") -> None:
    from nbdserve.cli.image.changing import qcow2_to_change

    async with qcow2_to_change(
        arguments.path,
        "have key slots",
        allow_backing=arguments.allow_backing,
        allow_data_file=arguments.allow_data_file,
        secrets=secrets_of(arguments),
    ) as image:
        await image.change_key_slots(change)
