"""The systemd units are valid, confined, and their commands do what they say."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"
INSTALLED = "/opt/nbdserve/bin/nbdserve"

#: `systemd-analyze security`: 0 is sealed, 10 is open; "OK" ends at 2.
MAX_EXPOSURE = 1.5


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units as installed, with this environment's nbdserve."""
    nbdserve = Path(sys.executable).with_name("nbdserve")
    for name in ("nbdserve.service", "nbdserve.socket"):
        text = (DEPLOY / name).read_text()
        (tmp_path / name).write_text(text.replace(INSTALLED, str(nbdserve)))
    return tmp_path


def analyze(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze, which needs no systemd for this."""
    return subprocess.run(
        ["systemd-analyze", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"SYSTEMD_COLORS": "0", "SYSTEMD_PAGER": ""},
    )


def setting(unit: Path, name: str) -> str:
    """Return the only value of a setting."""
    (value,) = re.findall(rf"^{name}=(.*)$", unit.read_text(), re.MULTILINE)
    return str(value)


def test_both_units_are_valid(units: Path) -> None:
    result = analyze("verify", units / "nbdserve.service", units / "nbdserve.socket")
    assert (result.returncode, result.stderr) == (0, "")


def test_the_service_is_confined(units: Path) -> None:
    threshold = f"--threshold={round(10 * MAX_EXPOSURE)}"
    unit = units / "nbdserve.service"
    result = analyze("security", "--offline=true", threshold, unit)
    assert result.returncode == 0, result.stdout


def test_the_guide_installs_what_the_units_want() -> None:
    guide = (DEPLOY / "README.md").read_text()
    unit = DEPLOY / "nbdserve.service"
    assert setting(unit, "ExecStart").startswith(f"{INSTALLED} serve ")
    for path in ("/opt/nbdserve", setting(unit, "EnvironmentFile")):
        assert path in guide
    assert setting(unit, "Documentation").removeprefix("file:") in guide


def test_the_guide_finds_what_went_wrong(tmp_path: Path) -> None:
    """Also among the lines of systemd, which are no JSON."""
    nbdserve = [sys.executable, "-m", "nbdserve", "serve", "--log-format", "json"]
    failed = subprocess.run(
        [*nbdserve, "--unix", "s", "missing.qcow2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert failed.returncode == 1
    others = '{"event": "flushed", "level": "info"}\nnbdserve.service: Failed.\n'
    journal = f"Starting nbdserve.service...\n{failed.stderr}{others}"
    guide = (DEPLOY / "README.md").read_text()
    (command,) = re.findall(r"^journalctl .* \| (jq .*)$", guide, re.MULTILINE)
    found = subprocess.run(
        shlex.split(command),
        input=journal,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    told = json.loads(found.stdout)
    assert told["error"] == "missing.qcow2: No such file or directory"


def test_the_command_of_the_unit_serves_and_obeys_systemd(units: Path) -> None:
    """Play systemd: sockets, readiness, watchdog, reload and stop."""
    unit = units / "nbdserve.service"
    options = re.findall(
        "NBDSERVE_OPTIONS=([^']*)'", (DEPLOY / "README.md").read_text()
    )[0]
    command = shlex.split(
        setting(unit, "ExecStart").replace("$NBDSERVE_OPTIONS", options)
    )
    # what systemd does between fork and exec: descriptors from 3, and the pid
    between = (
        "import os, sys\n"
        "os.dup2(int(sys.argv[1]), 3)\n"
        "os.environ['LISTEN_PID'] = os.environ['WATCHDOG_PID'] = str(os.getpid())\n"
        "os.execv(sys.argv[2], sys.argv[2:])\n"
    )
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        manager.bind(str(units / "notify"))
        manager.settimeout(30)
        environment = os.environ | {
            "NOTIFY_SOCKET": str(units / "notify"),
            "LISTEN_FDS": "1",
            "WATCHDOG_USEC": "200000",
            "RUNTIME_DIRECTORY": str(units),
        }
        service = subprocess.Popen(
            [sys.executable, "-c", between, str(listening.fileno()), *command],
            cwd=units,
            env=environment,
            pass_fds=[listening.fileno()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

        def hear(state: str) -> None:
            while state not in manager.recv(4096).decode().split("\n"):
                pass

        try:
            hear("READY=1")
            uri = f"nbd://127.0.0.1:{listening.getsockname()[1]}/disk"
            size = subprocess.check_output(["nbdinfo", "--size", uri], timeout=30)
            assert int(size) == 10 << 30
            hear("WATCHDOG=1")
            service.send_signal(signal.SIGHUP)
            hear("RELOADING=1")
            hear("READY=1")
            service.send_signal(signal.SIGTERM)
            hear("STOPPING=1")
        except BaseException:
            service.kill()
            raise
        finally:
            output, log = service.communicate(timeout=30)
    assert service.returncode == 0, log
    assert output == ""
    events = [json.loads(line)["event"] for line in log.splitlines()]
    assert events[0] == "serving"
    assert "connection closed" in events
