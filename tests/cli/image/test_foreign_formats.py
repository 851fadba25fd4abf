"""Images of formats that nbdserve does not read are named, and never taken for raw."""

from pathlib import Path

import pytest

from nbdserve.cli import qemu_nbd
from nbdserve.cli.main import main
from tests.helpers.tools import run

FORMATS = ("vmdk", "vdi", "vhdx", "vpc", "qed", "parallels")
#: Each command with the option that takes the image as raw, if it has one.
COMMANDS = {
    "info": ("info IMAGE", "--format raw"),
    "map": ("map IMAGE", "--format raw"),
    "measure": ("measure IMAGE", "--from-format raw"),
    "convert": ("convert IMAGE copy.qcow2", "--from-format raw"),
    "compare": ("compare other IMAGE", "--format-b raw"),
    "check": ("check IMAGE", None),
    "repair": ("check IMAGE --repair all", None),
    "resize": ("resize IMAGE 9G", "--format raw"),
    "snapshot": ("snapshot list IMAGE", None),
    "bitmap": ("bitmap add IMAGE one", None),
    "compact": ("compact IMAGE", None),
}


def make(image_format: str, path: Path) -> Path:
    run("qemu-img", "create", "-q", "-f", image_format, path, "8M")
    return path


def assert_refused(
    code: int, path: Path, name: str, option: str | None, error: str
) -> None:
    """Assert that a command has said in one line what it is and what to do."""
    assert code
    assert error.count("\n") == 1
    assert f"{path}: looks like {name}, which nbdserve does not read" in error
    assert "convert it with qemu-img" in error
    assert f", or add {option or ''}" in error if option else "add" not in error


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = make("vmdk", tmp_path / "disk")
    Path("other").write_bytes(path.read_bytes())
    before = path.read_bytes()
    text, option = COMMANDS[command]
    words = ["image", *text.replace("IMAGE", str(path)).split()]
    if command == "compare":
        words += ["--format-a", "raw"]
    assert_refused(main(words), path, "vmdk", option, capsys.readouterr().err)
    assert path.read_bytes() == before
    assert not Path("copy.qcow2").exists()
    if option is not None:
        assert main([*words, *option.split()]) == 0


@pytest.mark.parametrize("image_format", FORMATS)
def test_serving(
    image_format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(image_format, tmp_path / "disk")
    place = ["--unix", str(tmp_path / "s")]
    for mode in ([], ["--read-only"], ["--format", "qcow2"]):
        code = main(["serve", str(path), *place, *mode])
        error = capsys.readouterr().err
        assert_refused(code, path, image_format, "--format raw", error)


@pytest.mark.parametrize("mode", ["-t", "-r", "-s"])
def test_serving_as_qemu_nbd(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make("vdi", tmp_path / "disk")
    code = qemu_nbd.main([mode, "-k", str(tmp_path / "s"), str(path)])
    assert_refused(code, path, "vdi", "-f raw", capsys.readouterr().err)


def test_a_backing_file_of_which_no_format_is_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make("vmdk", tmp_path / "base")
    top = tmp_path / "top"
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw"]
    run(*words, "-b", base, top, "8M")
    assert main(["image", "map", str(top)]) == 0
    # another type of header extension, which nobody knows
    header = top.read_bytes()
    top.write_bytes(header.replace(b"\xe2\x79\x2a\xca", b"\0\0\x12\x34"))
    assert main(["image", "map", str(top)]) == 1
    expected = f"{top}: records no format for its backing file {base}: looks like vmdk"
    assert expected in capsys.readouterr().err


def test_renaming_needs_no_format(tmp_path: Path) -> None:
    path = make("vmdk", tmp_path / "disk")
    assert main(["image", "rename", str(path), str(tmp_path / "other")]) == 0
    assert not path.exists()
