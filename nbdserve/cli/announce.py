"""What `nbdserve serve` prints: where the exports are, and commands to paste."""

import os
import shlex
import sys

import structlog

from nbdserve.app import Serving
from nbdserve.config.units import format_size
from nbdserve.observe.streams import point_to_nowhere
from nbdserve.server.listeners import Endpoint, TcpEndpoint, UnixEndpoint
from nbdserve.storage.names import shown
from nbdserve.wire.uri import NbdUri

#: What a client on this machine connects to where the server listens everywhere.
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 -- nothing is bound


def announce(serving: Serving) -> None:
    """Tell whoever started the server where its exports are.

    One that made the sockets itself knows, and its stdout may be ours
    (`nbdinfo --json -- [ nbdserve serve ... ]`): then only the log says it.
    """
    if serving.activated:
        uris = [
            _uri(endpoint, image.name, tls=serving.tls_required)
            for image in serving.images
            for endpoint in serving.endpoints
        ]
        structlog.get_logger().info("serving", uris=uris)
        return
    try:
        print(announcement(serving), flush=True)
    except BrokenPipeError:
        # no reason to take the disks away from their guests
        point_to_nowhere(sys.stdout.fileno())
        structlog.get_logger().warning("nobody reads where the exports are")


def announcement(serving: Serving) -> str:
    """Return the lines for a person, and for scripts that look for `nbd` URIs."""
    lines = []
    tls = serving.tls_required
    for image in serving.images:
        access = "read-only" if image.read_only else "read-write"
        size = "not open yet" if image.size is None else format_size(image.size)
        lines.append(f"{shown(image.path)}, {size}, {access}:")
        lines += [
            f"  {_uri(endpoint, image.name, tls=tls)}" for endpoint in serving.endpoints
        ]
    if not serving.images:
        return "no exports yet: add some to the configuration file, then SIGHUP"
    lines += ["", *_commands(serving.endpoints[0], serving.images[0].name, tls=tls)]
    return "\n".join(lines)


def _commands(endpoint: Endpoint, name: str, *, tls: bool) -> list[str]:
    """Return one command for each kind of client."""
    uri = _uri(endpoint, name, tls=tls)
    copy = shlex.join(["nbdcopy", uri, "copy.img"])
    if isinstance(endpoint, TcpEndpoint):
        where = [_reachable(endpoint.host), str(endpoint.port), "/dev/nbd0"]
    elif isinstance(endpoint, UnixEndpoint):
        where = ["-unix", os.path.abspath(endpoint.path), "/dev/nbd0"]
    else:
        return [copy]
    if tls:
        # these need to be told where certificates are; libnbd looks for them
        return [copy]
    drive = f"file={uri},format=raw,if=virtio"
    return [
        shlex.join(["qemu-system-x86_64", "-drive", drive]),
        shlex.join(["nbd-client", *where, "-N", name]),
        copy,
    ]


def _uri(endpoint: Endpoint, name: str, *, tls: bool) -> str:
    if isinstance(endpoint, TcpEndpoint):
        host = _reachable(endpoint.host)
        return str(NbdUri(name, host=host, port=endpoint.port, tls=tls))
    if isinstance(endpoint, UnixEndpoint):
        path = os.path.abspath(endpoint.path)
        return str(NbdUri(name, socket_path=path, tls=tls))
    # as virtual machines see this host: VMADDR_CID_HOST
    where = NbdUri(name, host="2", port=endpoint.port, tls=tls)
    return str(where).replace("://", "+vsock://", 1)


def _reachable(host: str) -> str:
    return _WILDCARDS.get(host, host)
