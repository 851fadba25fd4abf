"""What an operator asked for, as frozen values that nothing below `app` reads.

The command line and the configuration file fill these in. Whatever can be judged without touching the machine is judged here, once.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nbdserve.config.access import AccessRule
from nbdserve.config.tls import TlsConfig
from nbdserve.errors import ConfigError

ImageFormat = Literal["raw", "qcow", "qcow2"]
CacheMode = Literal["writeback", "writethrough"]
OpenMode = Literal["start", "use"]
LogFormat = Literal["console", "json"]

#: More than any machine has processors.
MOST_WORKERS = 1024

#: https://www.iana.org/assignments/service-names-port-numbers: nbd 10809/tcp.
DEFAULT_PORT = 10809

#: doc/proto.md, "Values": names and descriptions are at most 4096 bytes.
MAX_STRING_LENGTH = 4096

#: sun_path is 108 bytes with its final NUL (unix(7)).
MAX_SOCKET_PATH_LENGTH = 107


def _judge_string(what: str, text: str) -> None:
    """Refuse a string that the protocol can't carry."""
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"the {what} {text!r} is not valid UTF-8") from None
    if len(encoded) > MAX_STRING_LENGTH:
        raise ConfigError(
            f"the {what} {text[:20]!r}... has {len(encoded)} bytes:"
            f" at most {MAX_STRING_LENGTH} fit the protocol"
        )
    if "\0" in text:
        raise ConfigError(f"the {what} {text!r} contains a NUL byte")


def _judge_path(path: str, text: str) -> None:
    if not path or "\0" in path:
        raise ConfigError(f"{text!r} names no image: write NAME=PATH or PATH")


def _require_once(option: str, places: list[str]) -> None:
    for place in places:
        if places.count(place) > 1:
            raise ConfigError(f"{option} {place} is given twice")


def parse_mode(text: str) -> int:
    """Read permissions such as 0660.

    Raises:
        ConfigError: They are none.
    """
    if not re.fullmatch("0?[0-7]{3}", text):
        raise ConfigError(f"{text!r} are no permissions: write them such as 0660")
    return int(text, 8)


def parse_path(text: str) -> str:
    """Read a path.

    Raises:
        ConfigError: It is none.
    """
    if not text or "\0" in text:
        raise ConfigError(f"{text!r} is no path")
    return text


def parse_socket_path(text: str) -> str:
    """Read the path of a Unix socket.

    Raises:
        ConfigError: It is none.
    """
    parse_path(text)
    if len(text.encode("utf-8", "surrogateescape")) > MAX_SOCKET_PATH_LENGTH:
        raise ConfigError(
            f"{text}: too long for a Unix socket, whose path has at most"
            f" {MAX_SOCKET_PATH_LENGTH} bytes"
        )
    return text


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """Where to listen for TCP connections; port 0 lets the kernel choose."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return it as operators write it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> "TcpAddress":
        """Read `HOST:PORT`, `HOST`, `:PORT` or `[V6]:PORT`; `:PORT` means all hosts.

        Raises:
            ConfigError: It is none of these.
        """
        if not text:
            raise ConfigError("'' is not HOST:PORT: write :10809 for all addresses")
        host, colon, port = text.rpartition(":")
        if re.fullmatch("[0-9]+", text):
            raise ConfigError(f"{text!r} is not HOST:PORT: did you mean :{text}?")
        if not colon or text.endswith("]"):
            host, port = text, str(DEFAULT_PORT)
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise ConfigError(
                f"{text!r} is not HOST:PORT: write an IPv6 address in brackets,"
                f" such as [::1]:{DEFAULT_PORT}"
            )
        if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 0xFFFF:
            raise ConfigError(
                f"{text!r} is not HOST:PORT: the port is a number from 0 to 65535"
            )
        return cls(host, int(port))


@dataclass(frozen=True, slots=True)
class VsockAddress:
    """Where to listen for virtual machines; no cid means any of this host's."""

    cid: int | None
    port: int

    def __str__(self) -> str:
        """Return it as operators write it."""
        return f"{self.port}" if self.cid is None else f"{self.cid}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> "VsockAddress":
        """Read `PORT` or `CID:PORT`.

        Raises:
            ConfigError: It is neither.
        """
        found = re.fullmatch("(?:([0-9]{1,10}):)?([0-9]{1,10})", text)
        if found is None or max(int(found[1] or 0), int(found[2])) >= 0xFFFFFFFF:
            raise ConfigError(f"{text!r} is not PORT or CID:PORT of vsock")
        return cls(int(found[1]) if found[1] else None, int(found[2]))


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """One image, the name that clients know it by, and how it is served.

    Attributes:
        name: The export's name; `""` is the default export.
        path: The image as the operator wrote it.
        format: None tells it by the magic.
        read_only: Whether changing requests are refused.
        description: What clients see when they list the exports.
        cache: When a write is acknowledged: as soon as the kernel has it, or once
            it is durable.
        allow_backing: Folders whose files may back the image, besides its own.
        allow_data_file: External data files that may be opened, or their folders.
        secret_files: Files that are passphrases of the image or its backing files, in
            case they are encrypted.
        snapshot: Name or id of the internal snapshot to serve, read-only, instead of
            the active disk.
        allocation_depth: Whether clients can ask for qemu:allocation-depth.
        bitmaps: Names of bitmaps that clients see as qemu:dirty-bitmap:NAME: persistent
            ones of the image or its backing files, else of what is changed while serving.
        persistent_only: Whether each of them has to be a persistent one.
        tls_only: Whether the export exists only for encrypted connections.
        access: Who may use it; nobody else, unless there are no rules.
        offset: Bytes of the disk that clients don't see.
        discard: Whether clients may give storage back.
        scratch: The folder for a temporary overlay with what clients write, which is
            forgotten in the end; None changes the image itself.
        guess_raw: Whether an image of no known format is served as raw although nobody
            said so; it is then kept from becoming one of another format.
    """

    name: str
    path: str
    format: ImageFormat | None = None
    read_only: bool = False
    description: str = ""
    cache: CacheMode = "writeback"
    allow_backing: tuple[str, ...] = ()
    allow_data_file: tuple[str, ...] = ()
    secret_files: tuple[str, ...] = ()
    snapshot: str | None = None
    allocation_depth: bool = False
    bitmaps: tuple[str, ...] = ()
    persistent_only: bool = False
    tls_only: bool = False
    access: tuple[AccessRule, ...] = ()
    offset: int = 0
    discard: bool = True
    scratch: str | None = None
    guess_raw: bool = False

    def __post_init__(self) -> None:
        """Refuse what the protocol can't carry.

        Raises:
            ConfigError: The name or the description is too long, or no text.
        """
        _judge_string("export name", self.name)
        _judge_string("description", self.description)
        for name in self.bitmaps:
            _judge_string("bitmap name", f"qemu:dirty-bitmap:{name}")
            if not name or self.bitmaps.count(name) > 1:
                raise ConfigError(f"--bitmap {name!r}: each needs a name of its own")

    @property
    def reads_only(self) -> bool:
        """Whether clients can change nothing."""
        return self.read_only or self.snapshot is not None

    @property
    def leaves_alone(self) -> bool:
        """Whether the file stays as it is."""
        return self.reads_only or self.scratch is not None

    @classmethod
    def parse(cls, text: str) -> "ImageConfig":
        """Read `[NAME=]IMAGE`.

        NAME is what precedes the first `=` if no `/` precedes it. Without one
        the export is named as the file, without folder and last extension.

        Raises:
            ConfigError: No path remains, or the name can't be one.
        """
        name, equals, path = text.partition("=")
        if not equals or "/" in name:
            return cls.from_path(text)
        _judge_path(path, text)
        return cls(name, path)

    @classmethod
    def from_path(cls, path: str) -> "ImageConfig":
        """Name the export as the file.

        Raises:
            ConfigError: It is no path, or the name can't be one.
        """
        _judge_path(path, path)
        return cls(Path(path).stem, path)


@dataclass(frozen=True, slots=True)
class FileConfig:
    """What a configuration file says.

    Attributes:
        images: Each name once.
        listen: TCP addresses.
        unix: Paths of Unix sockets.
        unix_mode: Their permissions.
        vsock: Addresses for virtual machines.
        tls: The arguments of `TlsConfig.build` that it gives.
        limits: Names and values of what is not to be the default.
        state_dir: Where redo records go.
        workers: How many processes serve.
        open: When images are opened; None leaves it to the command line.
        control: Path of the control socket.
    """

    images: tuple[ImageConfig, ...] = ()
    listen: tuple[TcpAddress, ...] = ()
    unix: tuple[str, ...] = ()
    unix_mode: int | None = None
    vsock: tuple[VsockAddress, ...] = ()
    tls: Mapping[str, Any] = field(default_factory=dict)
    limits: tuple[tuple[str, str], ...] = ()
    state_dir: str | None = None
    workers: int | None = None
    open: OpenMode | None = None
    control: str | None = None


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Everything `nbdserve serve` needs to know.

    Attributes:
        images: Each name once; at least one, unless there is a configuration file.
        listen: TCP addresses.
        unix: Paths of Unix sockets.
        unix_mode: Their permissions; None leaves them to the umask.
        vsock: Addresses for virtual machines.
        stdio: Whether to serve the one client that is connected to stdin instead.
        tls: How connections are encrypted.
        limits: Names and values of what is not to be the default.
        create_size: Bytes of the image to make if the only one is missing.
        state_dir: Where redo records go; None leaves it to the environment.
        control: Path of the control socket; None for none.
        file: The configuration file, read again with SIGHUP.
        default_host: Where to listen if nothing says where.
        persistent: Whether to go on when the last client is gone.
        at_once: Connections served at a time, others wait; None for no such limit.
        device: N of this machine's /dev/nbdN to attach the only image to, instead of
            listening at a default place.
        workers: How many processes serve; 1 is this one.
        open: When images are opened: at the start, where a mistake is noticed, or
            when the first client uses them.
        log_format: How logs of workers look.
        log_level: What is in them.
    """

    images: tuple[ImageConfig, ...]
    listen: tuple[TcpAddress, ...] = ()
    unix: tuple[str, ...] = ()
    unix_mode: int | None = None
    vsock: tuple[VsockAddress, ...] = ()
    stdio: bool = False
    tls: TlsConfig = field(default_factory=TlsConfig)
    limits: tuple[tuple[str, str], ...] = ()
    create_size: int | None = None
    state_dir: str | None = None
    control: str | None = None
    file: str | None = None
    default_host: str = "127.0.0.1"
    persistent: bool = True
    at_once: int | None = None
    device: int | None = None
    workers: int = 1
    open: OpenMode = "start"
    log_format: LogFormat = "console"
    log_level: str = "info"

    def __post_init__(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            ConfigError: Two options, or two images, exclude each other.
        """
        self._judge_names()
        self._judge_create()
        if not 1 <= self.workers <= MOST_WORKERS:
            raise ConfigError(f"--workers {self.workers}: from 1 to {MOST_WORKERS}")
        if self.control is not None and self.workers > 1:
            raise ConfigError("--control reaches one process: it needs --workers 1")
        if self.stdio and self.workers > 1:
            raise ConfigError("--stdio serves one client: --workers makes no sense")
        if self.stdio and (self.listen or self.unix or self.vsock):
            raise ConfigError("--stdio serves one client and listens nowhere")
        self._judge_places()

    def _judge_places(self) -> None:
        # the kernel would say that another server is there
        _require_once("--listen", [str(each) for each in self.listen if each.port])
        _require_once("--unix", [os.path.normpath(path) for path in self.unix])
        _require_once("--vsock", [str(each) for each in self.vsock])
        own = () if self.control is None else (self.control,)
        for path in (*self.unix, *own):
            parse_socket_path(path)
        if self.unix_mode is not None and not self.unix:
            raise ConfigError("--unix-mode is for Unix sockets: name one with --unix")
        _require_once(
            "--unix and --control",
            [os.path.normpath(path) for path in (*self.unix, *own)],
        )

    def _judge_names(self) -> None:
        if not self.images and self.file is None:
            raise ConfigError("no image to serve")
        paths: dict[str, str] = {}
        for image in self.images:
            if image.name in paths:
                raise ConfigError(
                    f"two exports are named {image.name!r}: {paths[image.name]} and"
                    f" {image.path}; give one another name with NAME=PATH"
                )
            paths[image.name] = image.path

    def _judge_create(self) -> None:
        if self.create_size is None:
            return
        if len(self.images) != 1:
            raise ConfigError("--create makes one image, but several are given")
        if self.images[0].read_only:
            raise ConfigError("--create and --read-only exclude each other")
        if self.images[0].snapshot is not None:
            raise ConfigError("--create and --snapshot exclude each other")
