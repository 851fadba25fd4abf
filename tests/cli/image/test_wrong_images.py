"""What `nbdserve image` says of what is no image, or not of the kind that is needed.

Each error is one line that names the thing and what to do, with the exit code that
scripts know; nothing is printed as JSON then, as qemu-img does it.
"""

import json
import os
from pathlib import Path

import pytest

from nbdserve.cli.main import main
from tests.helpers.encrypted import create_luks, secret_file
from tests.helpers.tools import run

#: Commands that describe an image, with the exit code of their failure.
DESCRIBING = {
    "info": (["info", "IMAGE"], 1),
    "check": (["check", "IMAGE"], 1),
    "map": (["map", "IMAGE"], 1),
    "measure": (["measure", "IMAGE"], 1),
    "compare": (["compare", "IMAGE", "IMAGE"], 2),
    "snapshot": (["snapshot", "list", "IMAGE"], 1),
}
CHANGING = {
    "amend": ["amend", "IMAGE", "--compat", "3"],
    "slots": ["amend", "IMAGE", "--remove-slot", "1"],
    "snapshot create": ["snapshot", "create", "IMAGE", "one"],
    "bitmap": ["bitmap", "add", "IMAGE", "one"],
    "compact": ["compact", "IMAGE"],
    "resize": ["resize", "IMAGE", "2M"],
    "repair": ["check", "IMAGE", "--repair", "all"],
}
#: Commands that read guest data, and so all that belongs to an image.
READING = ("map", "measure", "compare")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with all that is wrong."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "raw").write_bytes(bytes(4096))
    (tmp_path / "empty").touch()
    (tmp_path / "start").write_bytes(b"QFI\xfb\0\0\0\3")
    (tmp_path / "future").write_bytes(b"QFI\xfb\0\0\0\x09" + bytes(504))
    return tmp_path


def answer(
    words: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Return the exit code, and what was printed."""
    words = [name if word == "IMAGE" else word for word in words]
    code = main(["image", *words])
    output = capsys.readouterr()
    return code, output.out, output.err


WRONG = {
    "nothing": "No such file or directory",
    "dangling": "No such file or directory",
    "folder": "is a directory, not a file or block device",
    "fifo": "is a FIFO, not a file or block device",
    "start": "the file has 8 bytes",
    "future": "version",
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("command", [*DESCRIBING, *CHANGING])
def test_what_is_no_image(
    command: str, name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, wanted = DESCRIBING.get(command) or (CHANGING[command], 1)
    words = [*words, "--json"] if command in DESCRIBING else words
    path = str(folder / name)
    code, out, err = answer(words, path, capsys)
    assert (code, out) == (wanted, "")
    assert err.startswith(f"nbdserve: {path}: ")
    assert WRONG[name] in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", [*DESCRIBING, *CHANGING])
def test_an_empty_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, wanted = DESCRIBING.get(command) or (CHANGING[command], 1)
    code, _, err = answer(words, "", capsys)
    assert code == wanted
    assert err == "nbdserve: '': No such file or directory\n"


@pytest.mark.parametrize("words", [["convert", "raw"], ["create", "--format=raw"]])
def test_a_folder_that_is_not_there(
    words: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is named is what was asked for, not what it is called meanwhile."""
    monkeypatch.chdir(folder)
    command, first = words
    names = ["nodir/new", "1M"] if command == "create" else ["nodir/new"]
    code, _, err = answer([command, first, *names], "", capsys)
    told = "nbdserve: can't create nodir/new: No such file or directory\n"
    assert (code, err) == (1, told)


@pytest.mark.parametrize("command", ["convert", "rename"])
def test_an_empty_name_for_what_is_made(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = answer([command, str(folder / "raw"), ""], "", capsys)
    assert (code, err) == (1, "nbdserve: '': No such file or directory\n")


@pytest.mark.parametrize("command", [*DESCRIBING, *CHANGING])
def test_an_uri(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that read disks take one; the others say who does."""
    uri = f"nbd+unix:///disk?socket={tmp_path}/nobody"
    words, wanted = DESCRIBING.get(command) or (CHANGING[command], 1)
    code, out, err = answer(words, uri, capsys)
    assert (code, out) == (wanted, "")
    expected = "No such file" if command in {"measure", "compare"} else "is an NBD URI"
    assert expected in err
    assert err.count("\n") == 1


def test_a_file_that_is_named_like_a_uri(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nbd:disk").write_bytes(bytes(512))
    code, out, _ = answer(["info", "IMAGE", "--json"], "nbd:disk", capsys)
    assert (code, json.loads(out)["format"]) == (0, "raw")


@pytest.mark.parametrize("name", ["raw", "empty"])
def test_a_raw_image(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(folder / name)
    for command in ("info", "map", "measure", "compare"):
        code, out, err = answer([*DESCRIBING[command][0], "--json"], path, capsys)
        assert (code, err) == (0, "")
        json.loads(out)
    for words in (["check", "IMAGE", "--json"], ["check", "IMAGE", "--repair", "all"]):
        code, out, err = answer(words, path, capsys)
        assert (code, out) == (63, "")
        assert err.startswith(
            f"nbdserve: {path}: has no qcow or qcow2 header, so it is raw"
        )
    run("qemu-img", "check", "-f", "raw", "--output=json", path, expect=[63])


@pytest.mark.parametrize("kind", ["raw", "qcow"])
@pytest.mark.parametrize(
    "command", ["amend", "slots", "snapshot create", "bitmap", "compact", "snapshot"]
)
def test_what_only_qcow2_can(
    command: str, kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No hint that can't be followed, such as an option that the command has not."""
    path = folder / kind
    if kind == "qcow":
        run("qemu-img", "create", "-q", "-f", "qcow", path, "1M")
    before = path.read_bytes()
    words = CHANGING.get(command) or DESCRIBING[command][0]
    code, out, err = answer(words, str(path), capsys)
    assert (code, out) == (1, "")
    assert err.startswith(f"nbdserve: {path}: ")
    assert "only qcow2 images" in err
    assert "--format" not in err
    assert path.read_bytes() == before


def test_resize_has_the_option_that_it_names(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(folder / "raw")
    code, _, err = answer(CHANGING["resize"], path, capsys)
    assert code == 1
    assert "add --format raw if it is a raw disk" in err
    assert "--read-only" not in err
    assert answer([*CHANGING["resize"], "--format", "raw"], path, capsys)[0] == 0
    assert (folder / "raw").stat().st_size == 2 << 20


def assert_described(
    command: str,
    path: Path,
    problem: str,
    permission: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Assert that only what reads the disk needs a permission, and says which."""
    words, failed = DESCRIBING[command]
    code, out, err = answer([*words, "--json"], str(path), capsys)
    if command in READING:
        assert (code, out) == (failed, "")
        assert err.startswith(f"nbdserve: {path}: {problem}")
        assert permission[0] in err
        words = [*words, *permission]
        code, out, err = answer([*words, "--json"], str(path), capsys)
    assert (code, err) == (0, "")
    json.loads(out)


@pytest.mark.parametrize("command", DESCRIBING)
def test_an_encrypted_image(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is in the header needs no passphrase; what it lacks, it names."""
    secret, path = secret_file(tmp_path), tmp_path / "disk"
    create_luks(path, 1 << 20)
    permission = ["--secret-file", str(secret)]
    assert_described(command, path, "is encrypted", permission, capsys)


@pytest.mark.parametrize("command", DESCRIBING)
def test_an_image_with_a_data_file(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, data = tmp_path / "disk", tmp_path / "data"
    run(
        "qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data}", path, "1M"
    )
    permission = ["--allow-data-file", str(data)]
    assert_described(command, path, f"keeps its data in {data}", permission, capsys)
