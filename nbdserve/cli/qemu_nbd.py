"""`nbdserve-qemu-nbd`: this server behind the command line of qemu-nbd.

For scripts and test suites that call qemu-nbd: options, defaults and exit codes are those
of docs/tools/qemu-nbd.rst of qemu. What can't be done is refused by name.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from nbdserve import __version__
from nbdserve.cli.parser import Parser, judged
from nbdserve.errors import ConfigError, NbdserveError, explain
from nbdserve.observe.streams import open_missing, point_to_nowhere
from nbdserve.storage.names import shown

if TYPE_CHECKING:
    from nbdserve.app import Serving
    from nbdserve.cli.list_exports import ListedExport
    from nbdserve.config.access import AccessRule
    from nbdserve.config.model import CacheMode, ImageConfig, ImageFormat, ServeConfig

PROGRAM = "nbdserve-qemu-nbd"

DESCRIPTION = """\
Serve a disk image to NBD clients, with the command line of qemu-nbd.
Ends when the last client has gone, unless --persistent."""

NOTES = """\
unlike qemu-nbd:
  --aio                  is accepted and has no effect
  --cache                none and writeback are the same: nothing is durable before a
                         flush; so is unsafe, whose flushes are made none the less;
                         writethrough and directsync are durable before the reply
  backing files          are opened wherever they are, as qemu-nbd does: whoever made the
                         image chooses a file of yours that clients then read. For
                         images of strangers, name the folders with --allow-backing
                         (or use nbdserve serve, which asks for that). Names with a
                         protocol, such as nbd: or json:, are refused
  without --format       qcow and qcow2 are told by their magic, and other formats of
                         qemu refused; anything else is served as raw, and as with
                         qemu-nbd can't become an image of another format"""

#: What qemu-nbd can do and this can't, and what to do instead.
_REFUSED = {
    "trace": ("--trace", "--verbose tells more"),
    "selinux_label": ("--selinux-label", "let the policy label the socket"),
}

#: qemu-nbd's names of transmission flags, from bit 1 on.
_FLAG_NAMES = (
    *("readonly", "flush", "fua", "rotational", "trim", "zeroes", "df", "multi"),
    *("resize", "cache", "fast-zero", "block-status-payload"),
)

_WRITEBACK = ("none", "writeback", "unsafe")
_WRITETHROUGH = ("writethrough", "directsync")


def main(argv: Sequence[str] | None = None) -> int:
    """Do what qemu-nbd would.

    Args:
        argv: The words after the program's name; those of the process if None.

    Returns:
        The exit code: 1 for any failure.
    """
    from nbdserve.cli.main import FAILED, INTERRUPTED

    open_missing()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except (NbdserveError, OSError) as error:
        print(f"{PROGRAM}: {explain(error)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(words: list[str]) -> int:
    parser = Parser(PROGRAM, takes="FILE", description=DESCRIPTION, epilog=NOTES)
    _define(parser)
    arguments = parser.parse(words)
    if arguments.version:
        print(f"{PROGRAM} {__version__}")
        return 0
    for name, (option, instead) in _REFUSED.items():
        if getattr(arguments, name):
            raise ConfigError(f"{option} is not supported: {instead}")
    if arguments.list:
        return _list(arguments)
    if arguments.disconnect:
        return _disconnect(arguments)
    config = _configuration(arguments)
    if arguments.fork or (config.device is not None and not arguments.verbose):
        return _fork(arguments, config)
    _serve(arguments, config)
    return 0


def _define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", nargs="*", help="a disk image")
    parser.add_argument("-V", "--version", action="store_true", help="the version")
    parser.add_argument("-v", "--verbose", action="store_true", help="log clients")
    _define_connection(parser.add_argument_group("where clients find it, and how many"))
    _define_image(parser.add_argument_group("the image"))
    group = parser.add_argument_group("encryption")
    group.add_argument(
        "--object",
        metavar="TYPE,id=ID,...",
        action="append",
        default=[],
        help="tls-creds-x509, tls-creds-psk, authz-simple or secret",
    )
    group.add_argument("--tls-creds", metavar="ID", help="an earlier --object")
    group.add_argument("--tls-authz", metavar="ID", help="an earlier --object")
    group = parser.add_argument_group("refused, so that nobody misses what they do")
    group.add_argument("-T", "--trace", metavar="PATTERN")
    group.add_argument("--selinux-label", metavar="LABEL")


def _define_connection(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("-p", "--port", help="default: 10809")
    group.add_argument("-b", "--bind", metavar="HOST", help="default: 0.0.0.0")
    group.add_argument("-k", "--socket", metavar="PATH", help="a Unix socket instead")
    group.add_argument(
        "-e",
        "--shared",
        metavar="NUM",
        type=judged(_shared),
        default=1,
        help="clients at once, others wait; 0 for any number (default: 1)",
    )
    group.add_argument("-t", "--persistent", action="store_true", help="don't end")
    group.add_argument("-x", "--export-name", metavar="NAME", default="")
    group.add_argument("-D", "--description", metavar="TEXT", default="")
    group.add_argument("-L", "--list", action="store_true", help="show a server's")
    group.add_argument(
        "--fork", action="store_true", help="return once clients can connect"
    )
    group.add_argument("--pid-file", metavar="PATH")
    group.add_argument(
        "-c",
        "--connect",
        metavar="DEV",
        help="attach the image to DEV, such as /dev/nbd0, and return; needs root, and"
        " modprobe nbd",
    )
    group.add_argument(
        "-d",
        "--disconnect",
        action="store_true",
        help="detach the device that is given instead of an image",
    )


def _define_image(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("-f", "--format", help="raw, qcow or qcow2")
    group.add_argument("-r", "--read-only", action="store_true")
    group.add_argument(
        "-o", "--offset", metavar="BYTES", type=judged(_offset), default=0
    )
    group.add_argument("-A", "--allocation-depth", action="store_true")
    group.add_argument(
        "-B", "--bitmap", metavar="NAME", action="append", default=[], help="persistent"
    )
    group.add_argument(
        "-l",
        "--load-snapshot",
        metavar="SNAPSHOT",
        help="snapshot.name=NAME, snapshot.id=ID, or one of them; read-only",
    )
    group.add_argument(
        "-s",
        "--snapshot",
        action="store_true",
        help="leave the image alone: what is written goes to a temporary file in"
        " $TMPDIR or /var/tmp, and is forgotten in the end",
    )
    group.add_argument("-n", "--nocache", action="store_true", help="--cache=none")
    group.add_argument("--cache", metavar="MODE", help="default: writeback")
    group.add_argument("--aio", metavar="MODE", help="no effect")
    group.add_argument("--discard", metavar="ignore|unmap", default="unmap")
    group.add_argument("--detect-zeroes", metavar="off", default="off")
    group.add_argument("--image-opts", action="store_true", help="FILE is KEY=VALUE,..")
    group.add_argument(
        "--allow-backing",
        metavar="DIR",
        action="append",
        default=[],
        help="open backing files from the image's own folder and from below DIR only",
    )
    group.add_argument(
        "--allow-data-file",
        metavar="PATH",
        action="append",
        default=[],
        help="open external data files only if they are PATH or lie below it",
    )


def _shared(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ConfigError(f"invalid shared device number {text!r}")
    return int(text)


def _offset(text: str) -> int:
    from nbdserve.cli.qemu_options import parse_offset

    return parse_offset(text)


def _configuration(arguments: argparse.Namespace) -> "ServeConfig":
    """Return what to serve, and where.

    Raises:
        ConfigError: Something is wrong, or can't be had.
    """
    from nbdserve.cli.qemu_options import Objects
    from nbdserve.config.model import ServeConfig, TcpAddress
    from nbdserve.config.tls import TlsConfig
    from nbdserve.server.netlink import device_index

    objects = Objects()
    for text in arguments.object:
        objects.add(text)
    if arguments.tls_authz is not None and arguments.tls_creds is None:
        raise ConfigError("--tls-authz needs --tls-creds")
    access: tuple[AccessRule, ...] = ()
    tls = TlsConfig()
    if arguments.tls_creds is not None:
        tls = objects.tls(arguments.tls_creds)
    if arguments.tls_authz is not None:
        access = (objects.rule(arguments.tls_authz, arguments.tls_creds),)
    image = objects.with_secrets(_image(arguments, access))
    device = None
    if arguments.connect is not None:
        if arguments.tls_creds is not None:
            raise ConfigError("TLS is not supported with --connect")
        device = device_index(arguments.connect)
    if arguments.socket is not None and not os.path.isabs(arguments.socket):
        raise ConfigError(
            f"--socket: {shown(arguments.socket)!r} is not an absolute path"
        )
    listen: tuple[TcpAddress, ...] = ()
    if arguments.socket is None and (arguments.bind or arguments.port):
        host = arguments.bind or "0.0.0.0"  # noqa: S104 -- qemu-nbd's default
        host = f"[{host}]" if ":" in host else host
        listen = (TcpAddress.parse(f"{host}:{arguments.port or 10809}"),)
    return ServeConfig(
        images=(image,),
        listen=listen,
        unix=() if arguments.socket is None else (arguments.socket,),
        tls=tls,
        default_host="0.0.0.0",  # noqa: S104 -- qemu-nbd's default
        persistent=arguments.persistent,
        at_once=arguments.shared or None,
        device=device,
    )


def _image(
    arguments: argparse.Namespace, access: "tuple[AccessRule, ...]"
) -> "ImageConfig":
    from nbdserve.cli import qemu_options as qemu
    from nbdserve.config.model import ImageConfig

    if not arguments.file:
        raise ConfigError("required: FILE, the image to serve")
    if len(arguments.file) > 1:
        raise ConfigError(
            f"one image is served, and {shown(arguments.file[1])!r} is one too many"
        )
    if arguments.detect_zeroes != "off":
        raise ConfigError(
            f"--detect-zeroes={arguments.detect_zeroes} is not supported: only off is"
        )
    if arguments.aio not in {None, "threads", "native", "io_uring"}:
        raise ConfigError(f"--aio={arguments.aio} is not threads, native or io_uring")
    base = ImageConfig(
        arguments.export_name,
        path=arguments.file[0],
        format=_format(arguments),
        read_only=arguments.read_only,
        description=arguments.description,
        cache=_cache(arguments),
        allow_backing=tuple(arguments.allow_backing) or ("/",),
        allow_data_file=tuple(arguments.allow_data_file) or ("/",),
        scratch=_scratch_folder() if arguments.snapshot else None,
        guess_raw=True,
        snapshot=(
            None
            if arguments.load_snapshot is None
            else qemu.parse_snapshot(arguments.load_snapshot)
        ),
        allocation_depth=arguments.allocation_depth,
        bitmaps=tuple(arguments.bitmap),
        persistent_only=True,
        access=access,
        offset=arguments.offset,
        discard=qemu.parse_discard(arguments.discard),
    )
    if arguments.image_opts:
        return qemu.image_from_options(
            base, qemu.parse_options(arguments.file[0], "driver")
        )
    return qemu.image_from_file_name(base, arguments.file[0])


def _scratch_folder() -> str:
    return os.environ.get("TMPDIR") or "/var/tmp"  # noqa: S108 -- as qemu


def _format(arguments: argparse.Namespace) -> "ImageFormat | None":
    from nbdserve.cli.qemu_options import parse_format

    if arguments.format is None:
        return None
    if arguments.image_opts:
        raise ConfigError("--image-opts and -f exclude each other")
    return parse_format(arguments.format)


def _cache(arguments: argparse.Namespace) -> "CacheMode":
    if arguments.nocache and arguments.cache is not None:
        raise ConfigError("-n and --cache can only be specified once")
    mode = arguments.cache or "writeback"
    if mode in _WRITETHROUGH:
        return "writethrough"
    if mode not in _WRITEBACK:
        known = ", ".join((*_WRITEBACK, *_WRITETHROUGH))
        raise ConfigError(f"invalid cache mode {mode!r}: there are {known}")
    return "writeback"


def _serve(
    arguments: argparse.Namespace, config: "ServeConfig", ready: int | None = None
) -> None:
    from nbdserve.observe.lean import lean_imports

    with lean_imports():
        from nbdserve import app
        from nbdserve.cli.hints import raw_option
        from nbdserve.observe.logs import configure

    def announce(_serving: "Serving") -> None:
        if arguments.pid_file is not None:
            with open(arguments.pid_file, "w", encoding="ascii") as file:
                file.write(f"{os.getpid()}\n")
        if ready is not None:
            os.write(ready, b"1")
            os.close(ready)
            if not arguments.verbose:
                point_to_nowhere(2)

    configure("console", "info" if arguments.verbose else "warning")
    with raw_option("-f raw"):
        app.serve(config, announce)


def _fork(arguments: argparse.Namespace, config: "ServeConfig") -> int:
    """Serve in a process of its own, and return once clients can connect to it."""
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        raise ConfigError("--fork and socket activation exclude each other")
    told, ready = os.pipe()
    if not os.fork():
        _be_daemon(arguments, config, told, ready)
    os.close(ready)
    with os.fdopen(told, "rb") as pipe:
        return 0 if pipe.read(1) else 1


def _be_daemon(
    arguments: argparse.Namespace, config: "ServeConfig", told: int, ready: int
) -> NoReturn:
    """Serve as the child; what fails is told on the stderr that both still share."""
    os.close(told)
    os.setsid()
    point_to_nowhere(0)
    point_to_nowhere(1)
    code = 0
    try:
        _serve(arguments, config, ready)
    except (NbdserveError, OSError) as error:
        print(f"{PROGRAM}: {explain(error)}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 1
    sys.stderr.flush()
    os._exit(code)


def _disconnect(arguments: argparse.Namespace) -> int:
    """Detach a device.

    Raises:
        ConfigError: There is none, or it can't be.
    """
    from nbdserve.server.netlink import device_index, disconnect_device

    if len(arguments.file) != 1:
        raise ConfigError("--disconnect takes one device, such as /dev/nbd0")
    disconnect_device(device_index(arguments.file[0]))
    print(f"{arguments.file[0]} disconnected")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    """Show what another server exports.

    Raises:
        ConfigError: It can't be asked.
    """
    from nbdserve.cli import list_exports
    from nbdserve.wire.uri import NbdUri

    if arguments.file:
        raise ConfigError("--list takes no image")
    if arguments.tls_creds is not None:
        raise ConfigError(
            "--list with --tls-creds is not supported: use nbdserve list nbds://..."
        )
    if arguments.socket is not None:
        uri = NbdUri("", socket_path=arguments.socket)
    else:
        port = arguments.port or "10809"
        if not port.isdigit():
            raise ConfigError(f"{port!r} is no port")
        uri = NbdUri("", host=arguments.bind or "127.0.0.1", port=int(port))
    exports = list_exports.listed_exports(
        argparse.Namespace(uri=uri, tls_ca=None, tls_cert=None, tls_key=None)
    )
    print(f"exports available: {len(exports)}")
    for export in exports:
        print("\n".join(_listing(export)))
    return 0


def _listing(export: "ListedExport") -> list[str]:
    """Return the lines that scripts know from qemu-nbd."""
    details = export.details
    flags = details.transmission_flags
    names = [name for bit, name in enumerate(_FLAG_NAMES, 1) if flags & 1 << bit]
    lines = [f" export: '{shown(export.name)}'"]
    if export.description:
        lines.append(f"  description: {shown(export.description)}")
    lines += [
        f"  size:  {details.size}",
        f"  flags: 0x{flags:x} ( {' '.join(names)} )",
    ]
    if details.minimum_block is not None:
        lines += [
            f"  min block: {details.minimum_block}",
            f"  opt block: {details.preferred_block}",
            f"  max block: {details.maximum_payload}",
        ]
    if export.contexts:
        lines.append(f"  available meta contexts: {len(export.contexts)}")
        lines += [f"   {shown(name)}" for name in export.contexts]
    return lines
