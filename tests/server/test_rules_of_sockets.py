"""What the specification asks of a server's sockets."""

import socket

import pytest

from nbdserve.server.server import _tune


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_nagle_is_off(family: int) -> None:
    with socket.socket(family) as sock:
        _tune(sock, 60)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_peer_that_is_gone_is_noticed_however_idle() -> None:
    """A mounted but idle disk is never cut off: only who does not answer probes."""
    with socket.socket() as sock:
        _tune(sock, 60)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle_s = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
        interval_s = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
        count = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
        assert idle_s + interval_s * count <= 120
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 120_000
