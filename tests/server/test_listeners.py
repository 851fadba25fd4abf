"""Where the server listens, and what can go wrong there."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nbdserve.errors import ConfigError
from nbdserve.server.listeners import (
    TcpEndpoint,
    UnixEndpoint,
    activated_listeners,
    listen_tcp,
    listen_unix,
)


def test_port_0_is_the_same_free_port_for_every_address() -> None:
    listeners = listen_tcp("", 0)
    ports = {
        listener.endpoint.port
        for listener in listeners
        if isinstance(listener.endpoint, TcpEndpoint)
    }
    for listener in listeners:
        listener.close()
    assert len(ports) == 1
    assert 0 not in ports


def test_a_busy_port_is_named() -> None:
    (listener,) = listen_tcp("127.0.0.1", 0)
    assert isinstance(listener.endpoint, TcpEndpoint)
    port = listener.endpoint.port
    with pytest.raises(ConfigError, match=f"^127.0.0.1:{port}: in use by another"):
        listen_tcp("127.0.0.1", port)
    listener.close()


def test_a_foreign_address_and_an_unknown_host_are_named() -> None:
    with pytest.raises(ConfigError, match=r"^192\.0\.2\.1:0: cannot listen"):
        listen_tcp("192.0.2.1", 0)
    with pytest.raises(ConfigError, match=r"^no\.such\.host\.invalid: cannot find"):
        listen_tcp("no.such.host.invalid", 0)


def test_the_socket_of_a_dead_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    listener = listen_unix(str(path))
    assert listener.endpoint == UnixEndpoint(str(path))
    listener.close()
    assert not path.exists()


def test_the_socket_of_a_living_server_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listener = listen_unix(str(path))
    with pytest.raises(ConfigError, match=r"socket: in use by another server; stop "):
        listen_unix(str(path))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    listener.close()


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(ConfigError, match=r"precious: exists and is not a socket$"):
        listen_unix(str(path))
    assert path.read_text() == "data"
    with pytest.raises(ConfigError, match="cannot listen: No such file"):
        listen_unix(str(tmp_path / "missing" / "socket"))


def test_a_socket_that_another_server_took_over_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    first = listen_unix(str(path))
    path.unlink()
    second = listen_unix(str(path))
    first.close()
    assert path.exists()
    second.close()


def test_sockets_for_another_process_are_not_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_PID", "1")
    assert activated_listeners() == []


def test_a_number_of_sockets_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "x")
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    with pytest.raises(ConfigError, match=r"^LISTEN_FDS='x' is not a number"):
        activated_listeners()


_ACTIVATED = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_PID"] = str(os.getpid())
from nbdserve.server.listeners import activated_listeners
for listener in activated_listeners():
    print(listener.endpoint, listener.sock.get_inheritable(), "LISTEN_FDS" in os.environ)
"""


def activate(sock: socket.socket) -> str:
    """Return what a process prints that was given the socket as systemd does."""
    return subprocess.run(
        [sys.executable, "-c", _ACTIVATED, str(sock.fileno())],
        pass_fds=[sock.fileno()],
        env={**os.environ, "LISTEN_FDS": "1", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=False,
    ).stdout


def test_socket_activation(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        port = tcp.getsockname()[1]
        said = activate(tcp)
    assert said == f"TcpEndpoint(host='127.0.0.1', port={port}) False False\n"
    path = tmp_path / "activated"
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))
        unix.listen()
        said = activate(unix)
    assert said == f"UnixEndpoint(path='{path}') False False\n"
    assert path.exists(), "systemd's socket is systemd's to remove"


def test_an_activated_socket_that_does_not_listen_is_refused() -> None:
    with socket.socket(socket.AF_INET) as idle:
        assert activate(idle) == ""
