"""Listening sockets: TCP, Unix, vsock, and those that systemd hands over."""

import errno
import os
import re
import socket
import stat
from dataclasses import dataclass
from typing import Final

from nbdserve.errors import ConfigError

#: Linux cuts it to net.core.somaxconn. nbdcopy and fio open many connections at once.
_BACKLOG: Final = 1024
#: sd_listen_fds(3): SD_LISTEN_FDS_START.
_FIRST_ACTIVATED_FD: Final = 3
_STALE_PROBE_TIMEOUT_S: Final = 1.0
_WAY_OUT: Final = "stop that one, or choose another address"


@dataclass(frozen=True, slots=True)
class TcpEndpoint:
    """Where a TCP socket listens; the port is the real one, never 0."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class UnixEndpoint:
    """Where a Unix socket listens."""

    path: str


@dataclass(frozen=True, slots=True)
class VsockEndpoint:
    """Where a vsock socket listens, for virtual machines of this host: vsock(7)."""

    cid: int
    port: int


Endpoint = TcpEndpoint | UnixEndpoint | VsockEndpoint


class Listener:
    """A listening socket.

    Attributes:
        sock: The socket, not blocking.
        endpoint: Where clients find it.
    """

    def __init__(
        self,
        sock: socket.socket,
        endpoint: Endpoint,
        identity: tuple[int, int] | None = None,
    ) -> None:
        """Take over a socket.

        Args:
            sock: A listening socket.
            endpoint: Where clients find it.
            identity: Device and inode of the file of a Unix socket that we made,
                and so have to remove.
        """
        sock.setblocking(False)
        self.sock = sock
        self.endpoint = endpoint
        self._identity = identity

    def close(self) -> None:
        """Stop listening; remove the file of a Unix socket if it is still ours."""
        if self._identity is not None and isinstance(self.endpoint, UnixEndpoint):
            if _identity(self.endpoint.path) == self._identity:
                os.unlink(self.endpoint.path)
            self._identity = None
        self.sock.close()


def listen_tcp(host: str, port: int) -> list[Listener]:
    """Listen on every address of a host.

    Args:
        host: A name, an IPv4 or IPv6 address; "" for all addresses.
        port: 0 lets the kernel choose one, the same for all addresses.

    Raises:
        ConfigError: The name or the address is not ours, or the port is busy.
    """
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{host}: cannot find this host: {reason}") from error
    listeners: list[Listener] = []
    try:
        for family, _, _, _, address in dict.fromkeys(found):
            try:
                listeners.append(_bind_tcp(family, (address[0], port, *address[2:])))
            except OSError as error:
                if error.errno == errno.EAFNOSUPPORT and not host and listeners:
                    continue  # no IPv6 here, and nobody asked for it
                raise _cannot_listen(f"{_bracketed(host)}:{port}", error) from error
            port = port or listeners[0].sock.getsockname()[1]
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _bind_tcp(family: int, address: tuple[object, ...]) -> Listener:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # a restarted server must not wait for old connections in TIME_WAIT
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
        host, port = sock.getsockname()[:2]
    except BaseException:
        sock.close()
        raise
    return Listener(sock, TcpEndpoint(host, port))


def listen_vsock(cid: int | None, port: int) -> Listener:
    """Listen for virtual machines of this host.

    Args:
        cid: Of this machine, to be reached by this one only; None for all.
        port: The kernel knows no port 0.

    Raises:
        ConfigError: This kernel has no vsock, or the port is busy.
    """
    where = f"vsock port {port}"
    try:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    except OSError as error:
        raise _cannot_listen(where, error) from error
    try:
        sock.bind((socket.VMADDR_CID_ANY if cid is None else cid, port))
        sock.listen(_BACKLOG)
        endpoint = VsockEndpoint(*sock.getsockname())
    except OSError as error:
        sock.close()
        raise _cannot_listen(where, error) from error
    return Listener(sock, endpoint)


def listen_unix(path: str, mode: int | None = None) -> Listener:
    """Listen on a Unix socket; replace the file that a dead server left.

    Args:
        path: The file.
        mode: Its permissions, which say who may connect; None leaves it to the umask.

    Raises:
        ConfigError: Another server listens there, the file is something else, or
            the folder can't be written.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _remove_stale(path)
            sock.bind(path)
        identity = _identity(path)
        if mode is not None:
            os.chmod(path, mode)  # nobody can connect before listen()
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise _cannot_listen(path, error) from error
    except BaseException:
        sock.close()
        raise
    return Listener(sock, UnixEndpoint(path), identity)


def _remove_stale(path: str) -> None:
    """Remove a socket on which nobody listens.

    Raises:
        ConfigError: Somebody does, or it is no socket.
    """
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise ConfigError(f"{path}: exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_STALE_PROBE_TIMEOUT_S)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except TimeoutError:
            pass  # its backlog is full: busy, but alive
    raise ConfigError(f"{path}: in use by another server; {_WAY_OUT}")


def activated_listeners() -> list[Listener]:
    """Take over the sockets of socket activation: sd_listen_fds(3).

    Raises:
        ConfigError: One of them is not a listening stream socket.
    """
    count = os.environ.get("LISTEN_FDS", "")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not count:
        return []
    if not re.fullmatch("[0-9]{1,4}", count):
        raise ConfigError(f"LISTEN_FDS={count!r} is not a number of sockets")
    # not for our children
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    fds = range(_FIRST_ACTIVATED_FD, _FIRST_ACTIVATED_FD + int(count))
    return [_activated(fd) for fd in fds]


def _activated(fd: int) -> Listener:
    try:
        sock = socket.socket(fileno=fd)
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ConfigError(
            f"activated file descriptor {fd} is not a socket: {error.strerror}"
        ) from error
    if sock.type != socket.SOCK_STREAM or not listens:
        sock.detach()
        raise ConfigError(
            f"activated socket {fd} does not listen for streams"
            " (ListenStream= and Accept=no)"
        )
    sock.set_inheritable(False)
    address = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return Listener(sock, UnixEndpoint(os.fsdecode(address)))
    if sock.family == socket.AF_VSOCK:
        return Listener(sock, VsockEndpoint(*address))
    return Listener(sock, TcpEndpoint(*address[:2]))


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _cannot_listen(where: str, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"{where}: in use by another server; {_WAY_OUT}")
    return ConfigError(f"{where}: cannot listen: {error.strerror}")
