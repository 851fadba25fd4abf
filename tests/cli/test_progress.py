"""Long work: a bar for a person at a terminal, nothing for anybody else."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest


def stderr_on_a_terminal(*words: str, kind: str = "xterm", columns: int = 80) -> bytes:
    """Run a command whose stderr is a terminal, and return what appeared there."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": kind, "COLUMNS": str(columns)}
    process = subprocess.Popen(
        [sys.executable, "-m", "nbdserve", *words], stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 65536):
            shown += data
    except OSError:
        pass  # the last one who had the terminal open is gone
    os.close(ours)
    assert process.wait(30) == 0
    return shown


def test_a_bar_on_a_terminal_only(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(os.urandom(4 << 20))
    shown = stderr_on_a_terminal("image", "convert", str(disk), str(tmp_path / "a"))
    assert b"converting" in shown
    assert b"100%" in shown
    result = subprocess.run(
        [sys.executable, "-m", "nbdserve", "image", "convert", disk, tmp_path / "b"],
        capture_output=True,
        timeout=30,
        check=True,
    )
    assert (result.stdout, result.stderr) == (b"", b"")


@pytest.mark.parametrize("columns", [20, 40, 79, 80, 200])
def test_the_bar_is_one_line(tmp_path: Path, columns: int) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(os.urandom(4 << 20))
    words = ["image", "convert", str(disk), str(tmp_path / "a")]
    shown = stderr_on_a_terminal(*words, columns=columns)
    # the last line feed is rich's, which then erases the bar
    assert shown.count(b"\n") <= 1
    assert b"converting" in shown


def test_nothing_on_a_terminal_that_cannot_go_back(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(os.urandom(4 << 20))
    words = ["image", "convert", str(disk), str(tmp_path / "a")]
    assert stderr_on_a_terminal(*words, kind="dumb") == b""


def test_rich_is_loaded_for_a_bar_only(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(512))
    code = (
        "import sys; from nbdserve.cli.main import main;"
        f"main(['image', 'compare', {str(disk)!r}, {str(disk)!r}]);"
        "print('rich.progress' in sys.modules)"
    )
    said = subprocess.check_output(
        [sys.executable, "-c", code], text=True, stderr=subprocess.PIPE, timeout=30
    )
    assert said.splitlines()[-1] == "False"
