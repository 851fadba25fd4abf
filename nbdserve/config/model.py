"""What an operator asked for, as frozen values that nothing below `app` reads.

The command line fills these in; later a configuration file will too. Whatever
can be judged without touching the machine is judged here, once.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nbdserve.errors import ConfigError

ImageFormat = Literal["raw", "qcow", "qcow2"]
CacheMode = Literal["writeback", "writethrough"]

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


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """Where to listen for TCP connections; port 0 lets the kernel choose."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "TcpAddress":
        """Read `HOST:PORT`, `HOST`, `:PORT` or `[V6]:PORT`; no host means all.

        Raises:
            ConfigError: It is none of these.
        """
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
class ImageConfig:
    """One image and the name that clients know it by.

    Attributes:
        name: The export's name; `""` is the default export.
        path: The image as the operator wrote it.
    """

    name: str
    path: str

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
            path = text
            name = Path(text).stem
        if not path or "\0" in path:
            raise ConfigError(f"{text!r} names no image: write NAME=PATH or PATH")
        _judge_string("export name", name)
        return cls(name, path)


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Everything `nbdserve serve` needs to know.

    Attributes:
        images: At least one, each name once.
        listen: TCP addresses.
        unix: Paths of Unix sockets.
        format: The format of every image; None tells it by the magic.
        read_only: Whether changing requests are refused.
        create_size: Bytes of the image to make if the only one is missing.
        allow_backing: Folders whose files may back an image, besides its own.
        cache: When a write is acknowledged: as soon as the kernel has it, or once
            it is durable.
        description: What clients see when they list the exports.
        state_dir: Where redo records go; None leaves it to the environment.
        snapshot: Name or id of the internal snapshot to serve, read-only, instead of
            the active disk of the only image.
        allocation_depth: Whether clients can ask for qemu:allocation-depth.
        bitmaps: Names of bitmaps of what is changed while serving; clients see each as
            qemu:dirty-bitmap:NAME.
        limits: Names and values of what is not to be the default.
    """

    images: tuple[ImageConfig, ...]
    listen: tuple[TcpAddress, ...] = ()
    unix: tuple[str, ...] = ()
    format: ImageFormat | None = None
    read_only: bool = False
    create_size: int | None = None
    allow_backing: tuple[str, ...] = ()
    cache: CacheMode = "writeback"
    description: str = ""
    state_dir: str | None = None
    snapshot: str | None = None
    allocation_depth: bool = False
    bitmaps: tuple[str, ...] = ()
    limits: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            ConfigError: Two options, or two images, exclude each other.
        """
        self._judge_names()
        self._judge_create()
        if self.snapshot is not None and len(self.images) > 1:
            raise ConfigError("--snapshot is for one image, but several are given")
        _judge_string("description", self.description)
        for name in self.bitmaps:
            _judge_string("bitmap name", f"qemu:dirty-bitmap:{name}")
            if not name or self.bitmaps.count(name) > 1:
                raise ConfigError(f"--bitmap {name!r}: each needs a name of its own")
        for path in self.unix:
            if len(path.encode("utf-8", "surrogateescape")) > MAX_SOCKET_PATH_LENGTH:
                raise ConfigError(
                    f"{path}: too long for a Unix socket, whose path has at most"
                    f" {MAX_SOCKET_PATH_LENGTH} bytes"
                )

    def _judge_names(self) -> None:
        if not self.images:
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
        if len(self.images) > 1:
            raise ConfigError("--create makes one image, but several are given")
        if self.read_only:
            raise ConfigError("--create and --read-only exclude each other")
        if self.snapshot is not None:
            raise ConfigError("--create and --snapshot exclude each other")
