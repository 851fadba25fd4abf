"""`nbdserve serve`: put images on the network, and say how to reach them."""

import argparse
from typing import TYPE_CHECKING

from nbdserve.cli.parser import judged, one_of
from nbdserve.config.units import parse_size

if TYPE_CHECKING:
    from nbdserve.config.model import ImageConfig, TcpAddress

TAKES = "[NAME=]IMAGE..."

DESCRIPTION = """\
Serve disk images to NBD clients (qemu, the Linux kernel, libnbd, fio).
Where to find them goes to stdout, the log to stderr. SIGTERM or Ctrl-C answers
what is in flight, flushes and ends; a second one ends at once."""

EXAMPLES = """\
examples:
  nbdserve serve disk.qcow2
      export "disk" (and the default export) at nbd://127.0.0.1:10809
  nbdserve serve --create 10G disk.qcow2
      the same; makes the image first if there is none
  nbdserve serve root=vm.qcow2 data=/dev/vg/data --read-only
      two exports, of an image and of a block device
  nbdserve serve disk.qcow2 --listen 0.0.0.0:10809 --unix /run/nbd.sock
      at several places at once"""


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "images",
        metavar="[NAME=]IMAGE",
        nargs="+",
        type=judged(_image),
        help="an image or block device, and the name of its export;"
        " by default the file's, without folder and last extension",
    )
    group = parser.add_argument_group("where to listen")
    group.add_argument(
        "--listen",
        metavar="HOST:PORT",
        action="append",
        default=[],
        type=judged(_address),
        help="a TCP address, any number of times; port 0 takes a free one"
        " (default: 127.0.0.1:10809, unless --unix or systemd gives another place)",
    )
    group.add_argument(
        "--unix",
        metavar="PATH",
        action="append",
        default=[],
        help="a Unix socket, any number of times",
    )
    group = parser.add_argument_group("images")
    _define_image_options(group)
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--limit",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        type=judged(_limit),
        help="what clients may use, any number of times, such as connections=100,"
        " connections-per-export=10, total-bytes-in-flight=256M,"
        " handshake-timeout-s=5, stall-timeout-s=30",
    )
    group = parser.add_argument_group("log")
    group.add_argument(
        "--log-format",
        metavar="console|json",
        type=one_of("console", "json"),
        default="console",
        help="for people, or a JSON object a line (default: console)",
    )
    group.add_argument(
        "--log-level",
        metavar="LEVEL",
        type=one_of("debug", "info", "warning", "error"),
        default="info",
        help="debug (every request), info, warning or error (default: info)",
    )


def _define_image_options(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--format",
        metavar="auto|raw|qcow|qcow2",
        type=one_of("auto", "raw", "qcow", "qcow2"),
        default="auto",
        help="auto tells qcow and qcow2 by their magic; a file without one is raw,"
        " writable only if you say --format raw, since a guest could write such a"
        " magic into it",
    )
    group.add_argument("--read-only", action="store_true", help="refuse every change")
    group.add_argument(
        "--snapshot",
        metavar="NAME",
        help="serve an internal snapshot of a qcow2 image, by name or id, read-only",
    )
    group.add_argument(
        "--allocation-depth",
        action="store_true",
        help="tell clients how deep in the backing chain data lies"
        " (qemu:allocation-depth)",
    )
    group.add_argument(
        "--bitmap",
        metavar="NAME",
        action="append",
        default=[],
        help="record what is changed from now on, and tell clients"
        " (qemu:dirty-bitmap:NAME), any number of times",
    )
    group.add_argument(
        "--create",
        metavar="SIZE",
        type=judged(parse_size),
        help="make the image if it is missing (qcow2, or what --format says); an"
        " existing one is never touched. SIZE in bytes, or with K, M, G, T",
    )
    group.add_argument(
        "--allow-backing",
        metavar="DIR",
        action="append",
        default=[],
        help="also open backing files below DIR, not only from the image's own folder",
    )
    group.add_argument(
        "--cache",
        metavar="writeback|writethrough",
        type=one_of("writeback", "writethrough"),
        default="writeback",
        help="acknowledge writes once the kernel has them, or once they are durable"
        " (default: writeback; a flush is durable either way)",
    )
    group.add_argument(
        "--description", metavar="TEXT", default="", help="what clients see in a list"
    )
    group.add_argument(
        "--state-dir",
        metavar="DIR",
        help="a folder on tmpfs for what a killed server must remember (default:"
        " $RUNTIME_DIRECTORY or $XDG_RUNTIME_DIR)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal says stop."""
    from nbdserve.config.model import ServeConfig

    config = ServeConfig(
        images=tuple(arguments.images),
        listen=tuple(arguments.listen),
        unix=tuple(arguments.unix),
        format=None if arguments.format == "auto" else arguments.format,
        read_only=arguments.read_only,
        create_size=arguments.create,
        allow_backing=tuple(arguments.allow_backing),
        cache=arguments.cache,
        description=arguments.description,
        state_dir=arguments.state_dir,
        snapshot=arguments.snapshot,
        allocation_depth=arguments.allocation_depth,
        bitmaps=tuple(arguments.bitmap),
        limits=tuple(arguments.limit),
    )
    from nbdserve import app
    from nbdserve.cli.announce import announce
    from nbdserve.observe.logs import configure

    configure(arguments.log_format, arguments.log_level)
    app.serve(config, announce)
    return 0


def _image(text: str) -> "ImageConfig":
    from nbdserve.config.model import ImageConfig

    return ImageConfig.parse(text)


def _address(text: str) -> "TcpAddress":
    from nbdserve.config.model import TcpAddress

    return TcpAddress.parse(text)


def _limit(text: str) -> tuple[str, str]:
    from nbdserve.server.limits import Limits, changed

    name, _, value = text.partition("=")
    changed(Limits(), [(name, value)])
    return name, value
