"""What `nbdserve serve` prints: where the exports are, and commands to paste."""

import os
import shlex

import structlog

from nbdserve.app import Serving
from nbdserve.cli.output import discard_stdout
from nbdserve.config.units import format_size
from nbdserve.server.listeners import Endpoint, TcpEndpoint
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
            _uri(endpoint, image.name)
            for image in serving.images
            for endpoint in serving.endpoints
        ]
        structlog.get_logger().info("serving", uris=uris)
        return
    try:
        print(announcement(serving), flush=True)
    except BrokenPipeError:
        # no reason to take the disks away from their guests
        discard_stdout()
        structlog.get_logger().warning("nobody reads where the exports are")


def announcement(serving: Serving) -> str:
    """Return the lines for a person, and for scripts that look for `nbd` URIs."""
    lines = []
    for image in serving.images:
        access = "read-only" if image.read_only else "read-write"
        lines.append(f"{shown(image.path)}, {format_size(image.size)}, {access}:")
        lines += [f"  {_uri(endpoint, image.name)}" for endpoint in serving.endpoints]
    lines += ["", *_commands(serving.endpoints[0], serving.images[0].name)]
    return "\n".join(lines)


def _commands(endpoint: Endpoint, name: str) -> list[str]:
    """Return one command for each kind of client."""
    uri = _uri(endpoint, name)
    if isinstance(endpoint, TcpEndpoint):
        where = [_reachable(endpoint.host), str(endpoint.port), "/dev/nbd0"]
    else:
        where = ["-unix", os.path.abspath(endpoint.path), "/dev/nbd0"]
    drive = f"file={uri},format=raw,if=virtio"
    return [
        shlex.join(["qemu-system-x86_64", "-drive", drive]),
        shlex.join(["nbd-client", *where, "-N", name]),
        shlex.join(["nbdcopy", uri, "copy.img"]),
    ]


def _uri(endpoint: Endpoint, name: str) -> str:
    if isinstance(endpoint, TcpEndpoint):
        host = _reachable(endpoint.host)
        return str(NbdUri(name, host=host, port=endpoint.port))
    return str(NbdUri(name, socket_path=os.path.abspath(endpoint.path)))


def _reachable(host: str) -> str:
    return _WILDCARDS.get(host, host)
