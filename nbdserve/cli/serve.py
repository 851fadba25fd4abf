"""`nbdserve serve`: put images on the network, and say how to reach them."""

import argparse
from typing import TYPE_CHECKING

from nbdserve.cli.parser import define_allowed_files, judged, one_of
from nbdserve.cli.secrets import define_secret_file
from nbdserve.config.units import parse_size
from nbdserve.errors import ConfigError, NbdserveError, explain

if TYPE_CHECKING:
    from nbdserve.config.model import (
        FileConfig,
        ImageConfig,
        ServeConfig,
        TcpAddress,
        VsockAddress,
    )

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
      at several places at once
  nbdserve serve disk.qcow2 --listen 0.0.0.0:10809 --tls-certificates /etc/pki/nbd
      encrypted, for whoever trusts the certificate
  nbdserve serve --config /etc/nbdserve/nbdserve.toml
      what a file says: many exports, and who may use them"""


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "images",
        metavar="[NAME=]IMAGE",
        nargs="*",
        type=judged(_image),
        help="an image or block device, and the name of its export;"
        " by default the file's, without folder and last extension",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="also serve what this TOML file says; SIGHUP reads it again. Options"
        " for images are for those of the command line",
    )
    _define_places(parser.add_argument_group("where to listen"))
    _define_tls_options(parser.add_argument_group("encryption"))
    group = parser.add_argument_group("images")
    _define_image_options(group)
    group.add_argument(
        "--open",
        metavar="start|use",
        type=one_of("start", "use"),
        help="open images at the start, where a mistake is noticed at once, or when a"
        " client first uses them, for thousands of images (default: start)",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=judged(_workers),
        help="serve by N processes on as many processors: each image is served by one,"
        " read-only ones by all (default: 1)",
    )
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--limit",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        type=judged(_limit),
        help="what clients may use, any number of times: handshake-timeout-s, options,"
        " connections, connections-per-export, requests-in-flight, bytes-in-flight,"
        " total-bytes-in-flight, idle-buffer-bytes, stall-timeout-s, idle-timeout-s,"
        " keepalive-s, turn-s, turn-bytes, busy-poll-s, drain-timeout-s, linger-s,"
        " close-timeout-s; deploy/nbdserve.example.toml explains them",
    )
    group = parser.add_argument_group("control")
    group.add_argument(
        "--control",
        metavar="PATH",
        help="a Unix socket for nbdserve ctl, which only you may use: other sizes,"
        " snapshots, compaction while clients are connected",
    )
    group = parser.add_argument_group("log")
    _define_log_options(group)


def _define_places(group: "argparse._ArgumentGroup") -> None:
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
    group.add_argument(
        "--unix-mode",
        metavar="MODE",
        type=judged(_mode),
        help="permissions of the Unix sockets, such as 0660: who may connect",
    )
    group.add_argument(
        "--vsock",
        metavar="[CID:]PORT",
        action="append",
        default=[],
        type=judged(_vsock),
        help="a port for virtual machines of this host",
    )
    group.add_argument(
        "--stdio",
        action="store_true",
        help="listen nowhere: serve the client whose socket is stdin, then end, as"
        " under inetd",
    )


def _define_tls_options(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--tls",
        metavar="off|allow|require",
        type=one_of("off", "allow", "require"),
        help="whether clients may, or must, encrypt (default: require if there is a"
        " certificate or a pre-shared key, else off)",
    )
    group.add_argument(
        "--tls-certificates",
        metavar="DIR",
        help="a folder with server-cert.pem, server-key.pem and, for certificates of"
        " clients, ca-cert.pem",
    )
    group.add_argument("--tls-cert", metavar="FILE", help="the server's certificate")
    group.add_argument("--tls-key", metavar="FILE", help="its private key")
    group.add_argument(
        "--tls-ca",
        metavar="FILE",
        help="authorities for certificates of clients, who are then asked for one",
    )
    group.add_argument(
        "--tls-verify-client",
        action="store_true",
        help="refuse clients without a valid certificate",
    )
    group.add_argument(
        "--tls-psk",
        metavar="FILE",
        help="pre-shared keys instead of certificates: lines of USER:KEY, the key in"
        " hexadecimal (needs Python 3.13)",
    )


def _define_log_options(group: "argparse._ArgumentGroup") -> None:
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
        help="tell clients what a bitmap says (qemu:dirty-bitmap:NAME): a persistent one"
        " of the image or its backing files, or else one that records what is changed"
        " until the server ends; any number of times",
    )
    group.add_argument(
        "--create",
        metavar="SIZE",
        type=judged(parse_size),
        help="make the image if it is missing (qcow2, or what --format says); an"
        " existing one is never touched. SIZE in bytes, or with K, M, G, T",
    )
    define_allowed_files(group)
    define_secret_file(group, "an image or of its backing files")
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
        " $RUNTIME_DIRECTORY, $XDG_RUNTIME_DIR or, outside containers,"
        " /dev/shm/nbdserve-UID)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal says stop."""
    from nbdserve.observe.lean import lean_imports

    with lean_imports():
        from nbdserve import app
        from nbdserve.cli.announce import announce
        from nbdserve.cli.hints import raw_option
        from nbdserve.observe.logs import configure

    configure(arguments.log_format, arguments.log_level)
    try:
        config = _configuration(arguments)
        with raw_option("--format raw"):
            app.serve(config, announce, lambda: _configuration(arguments))
    except (NbdserveError, OSError) as error:
        if arguments.log_format == "console":
            raise
        # the last line of a log is as all the others
        import structlog

        structlog.get_logger().error("the server ends", error=explain(error))
        return 1
    return 0


def _configuration(arguments: argparse.Namespace) -> "ServeConfig":
    """Put the configuration file and the command line together.

    Raises:
        ConfigError: One of them is wrong, or they contradict each other.
    """
    from nbdserve.config.model import ServeConfig
    from nbdserve.config.tls import TlsConfig

    if not arguments.images and arguments.config is None:
        raise ConfigError(
            "required: [NAME=]IMAGE or --config FILE; see nbdserve serve --help"
        )
    file = _file(arguments.config)
    tls = {
        "mode": arguments.tls,
        "certificates": arguments.tls_certificates,
        "certificate": arguments.tls_cert,
        "key": arguments.tls_key,
        "ca": arguments.tls_ca,
        "verify_client": arguments.tls_verify_client,
        "psk": arguments.tls_psk,
    }
    given = {name: value for name, value in tls.items() if value}
    mode = arguments.unix_mode
    return ServeConfig(
        images=(*file.images, *_images(arguments)),
        listen=(*file.listen, *arguments.listen),
        unix=(*file.unix, *arguments.unix),
        unix_mode=file.unix_mode if mode is None else mode,
        vsock=(*file.vsock, *arguments.vsock),
        stdio=arguments.stdio,
        tls=TlsConfig.build(**{**file.tls, **given}),
        limits=(*file.limits, *arguments.limit),
        create_size=arguments.create,
        state_dir=arguments.state_dir or file.state_dir,
        control=arguments.control or file.control,
        file=arguments.config,
        workers=arguments.workers or file.workers or 1,
        open=arguments.open or file.open or "start",
        log_format=arguments.log_format,
        log_level=arguments.log_level,
    )


def _images(arguments: argparse.Namespace) -> "list[ImageConfig]":
    """Return the images of the command line as its options want them."""
    from dataclasses import replace

    if arguments.snapshot is not None and len(arguments.images) > 1:
        raise ConfigError("--snapshot is for one image, but several are given")
    return [
        replace(
            image,
            format=None if arguments.format == "auto" else arguments.format,
            read_only=arguments.read_only,
            description=arguments.description,
            cache=arguments.cache,
            allow_backing=tuple(arguments.allow_backing),
            allow_data_file=tuple(arguments.allow_data_file),
            secret_files=tuple(arguments.secret_file),
            snapshot=arguments.snapshot,
            allocation_depth=arguments.allocation_depth,
            bitmaps=tuple(arguments.bitmap),
        )
        for image in arguments.images
    ]


def _file(path: str | None) -> "FileConfig":
    """Read the configuration file, if there is one."""
    from nbdserve.config.model import FileConfig

    if path is None:
        return FileConfig()
    from nbdserve.config.file import read_config
    from nbdserve.exports.access import user_id
    from nbdserve.server.limits import NAMES, Limits, changed

    return read_config(path, NAMES, lambda limit: changed(Limits(), [limit]), user_id)


def _workers(text: str) -> int:
    from nbdserve.config.model import MOST_WORKERS

    if not text.isdecimal() or not 1 <= int(text) <= MOST_WORKERS:
        raise ConfigError(f"{text!r} is no number of processes: 1 to {MOST_WORKERS}")
    return int(text)


def _mode(text: str) -> int:
    from nbdserve.config.model import parse_mode

    return parse_mode(text)


def _vsock(text: str) -> "VsockAddress":
    from nbdserve.config.model import VsockAddress

    return VsockAddress.parse(text)


def _image(text: str) -> "ImageConfig":
    from nbdserve.config.model import ImageConfig

    return ImageConfig.parse(text)


def _address(text: str) -> "TcpAddress":
    from nbdserve.config.model import TcpAddress

    return TcpAddress.parse(text)


def _limit(text: str) -> tuple[str, str]:
    from nbdserve.server.limits import Limits, changed

    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{text!r} is not NAME=VALUE, such as connections=100")
    changed(Limits(), [(name, value)])
    return name, value
