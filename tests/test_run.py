"""`tests/run` itself, with stand-ins for what it starts: its verdict is its exit status."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "run"
TOOLS = "codespell deptry hadolint lint-imports mypy nbdserve python ruff shellcheck"
#: Fails where its arguments hold the words $BROKEN; hangs, with a child, where they hold $HANGING.
STAND_IN = """#!/bin/sh
case "$0 $*" in
    *"$HANGING"*) sleep 61 & echo $! >"$CHILD"; wait ;;
    *"$BROKEN"*) exit 3 ;;
    *--target*) mkdir -p "$NBDSERVE_VENV/compiled" ;;
esac
echo '(compiled)'
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    for tool in TOOLS.split():
        path = tmp_path / "venv/bin" / tool
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STAND_IN)
        path.chmod(0o755)
    return os.environ | {
        "NBDSERVE_VENV": str(tmp_path / "venv"),
        "TMPDIR": str(tmp_path),
        "CHILD": str(tmp_path / "child"),
        "BROKEN": "nothing",
        "HANGING": "nothing",
    }


def start(
    environment: dict[str, str], *arguments: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", RUN, *arguments],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
    )


@pytest.mark.parametrize("which", [[], ["--compiled"], ["tests/wire"]])
def test_all_passed(
    environment: dict[str, str], tmp_path: Path, which: list[str]
) -> None:
    run = start(environment, *which)
    assert (run.returncode, run.stderr) == (0, "")
    assert "tests/run: all passed" in run.stdout.splitlines()[-1]
    assert not list(tmp_path.glob("tmp.*"))


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("ruff check", "ruff check"),
        ("-m pytest -m not replaces", "pytest, compiled"),
        ("-m pytest", "pytest,pytest, compiled"),
        ("--no-deps --target", "pytest, compiled"),
        ("bin/mypy", "mypy"),
    ],
)
def test_what_failed(environment: dict[str, str], broken: str, told: str) -> None:
    run = start(environment | {"BROKEN": broken})
    assert run.returncode == 1
    assert run.stderr == f"tests/run: FAILED: {told}\n"


def test_stopped(environment: dict[str, str], tmp_path: Path) -> None:
    """What it started in the background ends with it, children and all."""
    child = tmp_path / "child"
    run = subprocess.Popen(
        ["bash", RUN],
        env=environment | {"HANGING": "--no-deps --target"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 20
    while not (child.exists() and child.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGINT)
    run.wait(20)
    while Path(f"/proc/{child.read_text().strip()}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not list(tmp_path.glob("tmp.*"))
