"""What the service manager hears."""

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.exports.registry import Registry
from nbdserve.server import notify
from nbdserve.server.server import Server


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield sock


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    assert not notify.notify("READY=1")


def test_reloading_tells_the_time(manager: socket.socket) -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert notify.notify_reloading()
    reloading, stamp = manager.recv(1000).decode().split("\n")
    assert reloading == "RELOADING=1"
    assert before <= int(stamp.removeprefix("MONOTONIC_USEC=")) < before + 5_000_000


@pytest.mark.parametrize(
    ("usec", "pid", "interval_s"),
    [
        ("", "", None),
        ("0", "", None),
        ("x", "", None),
        ("3000000", "", 1.5),
        ("3000000", "1", None),
        ("3000000", str(os.getpid()), 1.5),
    ],
)
def test_watchdog_interval(
    monkeypatch: pytest.MonkeyPatch, usec: str, pid: str, interval_s: float | None
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", pid)
    assert notify.watchdog_interval_s() == interval_s


async def test_a_server_reports_its_phases(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    server = Server(Registry(), [])
    server.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.03, stop.set)
    await server.serve_until(stop)
    heard = [manager.recv(1000).decode()]
    while heard[-1] != "STOPPING=1":
        heard.append(manager.recv(1000).decode())
    assert heard[0] == "READY=1\nSTATUS=Serving 0 export(s)"
    assert "WATCHDOG=1" in heard[1:-1]
