"""`nbdserve image`: what its commands print, and the exit codes that scripts read."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nbdserve.cli.image.check import exit_code
from nbdserve.cli.main import main
from nbdserve.formats.check_result import CheckResult
from tests.cli.servers import serving

MIB = 1 << 20


def qemu_img(*words: str | Path) -> str:
    """Run qemu-img and return what it prints."""
    return subprocess.run(
        ["qemu-img", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """A qcow2 image with data, over another one."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu_img("create", "-f", "qcow2", base, "4M")
    qemu_img("create", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top, "8M")
    for path, offset in ((base, "0"), (top, "192k")):
        subprocess.run(
            ["qemu-io", "-c", f"write -P 1 {offset} 128k", path],
            capture_output=True,
            timeout=30,
            check=True,
        )
    return top


def printed_json(capsys: pytest.CaptureFixture[str], *words: str | Path) -> Any:
    """Run a command that prints JSON."""
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# create


@pytest.mark.parametrize("image_format", ["qcow2", "qcow", "raw"])
def test_create_makes_what_qemu_reads(image_format: str, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    assert main(["image", "create", str(path), "10M", "--format", image_format]) == 0
    info = json.loads(qemu_img("info", "--output=json", path))
    assert (info["format"], info["virtual-size"]) == (image_format, 10 * MIB)


def test_create_hands_every_option_on(tmp_path: Path) -> None:
    base, path = tmp_path / "base", tmp_path / "disk"
    assert main(["image", "create", str(base), "1M", "--format", "raw"]) == 0
    layout = "--cluster-size 4K --compat 3 --refcount-bits 64 --preallocation off"
    backing = "--backing base --backing-format raw"
    words = [*layout.split(), *backing.split()]
    assert main(["image", "create", str(path), "2M", *words]) == 0
    info = json.loads(qemu_img("info", "--output=json", path))
    assert info["cluster-size"] == 4096
    assert info["backing-filename"] == "base"
    assert info["backing-filename-format"] == "raw"
    assert info["format-specific"]["data"]["refcount-bits"] == 64
    older = tmp_path / "older"
    assert main(["image", "create", str(older), "1M", "--compat", "2"]) == 0
    info = json.loads(qemu_img("info", "--output=json", older))
    assert info["format-specific"]["data"]["compat"] == "0.10"


def test_create_overwrites_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "disk"
    path.write_text("precious")
    assert main(["image", "create", str(path), "1M"]) == 1
    assert f"{path} exists" in capsys.readouterr().err
    assert path.read_text() == "precious"


# info


def test_info_has_the_fields_of_qemu_img(
    overlay: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = printed_json(capsys, "image", "info", overlay)
    theirs = json.loads(qemu_img("info", "--output=json", overlay))
    assert ours.items() >= theirs.items()
    assert ours.keys() - theirs.keys() == {"file-size", "geometry", "header"}
    assert ours["header"]["version"] == 3


def test_info_for_people(overlay: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "info", str(overlay)]) == 0
    text = capsys.readouterr().out
    assert "virtual size: 8 MiB (8388608 bytes)" in text
    assert "backing file: base.qcow2" in text
    assert "geometry: 16/16/63" in text
    assert "    incompatible-features: 0x0" in text


# check


def test_a_clean_image_is_0_with_the_fields_of_qemu_img(
    overlay: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = printed_json(capsys, "image", "check", overlay)
    assert ours == json.loads(qemu_img("check", "--output=json", overlay))
    assert main(["image", "check", str(overlay)]) == 0
    assert "No errors were found" in capsys.readouterr().out


def test_a_leak_is_3(overlay: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refcount_block = 2 * 65536  # where qemu-img create puts the first one
    with overlay.open("r+b") as file:
        file.seek(refcount_block + 2 * 20)
        file.write(b"\0\1")  # cluster 20, which nothing uses
        file.truncate(21 * 65536)
    assert main(["image", "check", str(overlay)]) == 3
    assert "1 leaked" in capsys.readouterr().out


def test_a_corruption_is_2(overlay: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refcount_block = 2 * 65536
    with overlay.open("r+b") as file:
        file.seek(refcount_block + 2 * 4)
        file.write(b"\0\0")  # cluster 4, the L2 table
    assert main(["image", "check", str(overlay)]) == 2
    assert "ERROR" in capsys.readouterr().out


def test_raw_is_63(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(512))
    assert main(["image", "check", str(path)]) == 63
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == (
        f"nbdserve: {path}: has no qcow or qcow2 header, so it is raw, and there is nothing"
        " in it that could be checked\n"
    )


def test_what_could_not_be_checked_is_1() -> None:
    result = CheckResult(filename="x", format="qcow2", leaks=1, corruptions=1)
    assert exit_code(result) == 2
    result.check_error("cluster 5: can't be read")
    assert exit_code(result) == 1


def test_an_image_that_is_being_written_is_not_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving("d.qcow2", "--create", "1M", "--unix", "s", cwd=tmp_path):
        assert main(["image", "check", str(tmp_path / "d.qcow2")]) == 1
        assert "in use by another process" in capsys.readouterr().err


# map


def _what_it_says(entries: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return, for each 64 KiB, what a map says of it; `depth` only of data."""
    blocks = []
    for entry in entries:
        for start in range(entry["start"], entry["start"] + entry["length"], 65536):
            offset = entry.get("offset")
            place = None if offset is None else offset + start - entry["start"]
            depth = entry["depth"] if entry["data"] else None
            blocks.append((start, entry["zero"], entry["data"], depth, place))
    return blocks


def test_map_says_what_qemu_img_says(
    overlay: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = printed_json(capsys, "image", "map", overlay)
    theirs = json.loads(qemu_img("map", "--output=json", overlay))
    assert _what_it_says(ours) == _what_it_says(theirs)
    assert theirs[0].keys() <= ours[0].keys()


def test_map_for_people_names_the_file(
    overlay: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["image", "map", str(overlay)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [
        "0x0",
        "0x20000",
        "0x50000",
        f"{overlay.parent}/base.qcow2",
    ]
    assert lines[2].split() == ["0x30000", "0x20000", "0x50000", str(overlay)]


def test_map_of_an_empty_disk_is_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "disk.img"
    path.touch()
    assert printed_json(capsys, "image", "map", path) == []


def test_map_needs_leave_for_a_backing_file_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bases").mkdir()
    (tmp_path / "vms").mkdir()
    base, top = tmp_path / "bases/base", tmp_path / "vms/top"
    qemu_img("create", "-f", "qcow2", base, "1M")
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "qcow2", top, "1M")
    assert main(["image", "map", str(top)]) == 1
    assert f"--allow-backing {base.parent}" in capsys.readouterr().err
    words = ["image", "map", str(top), "--allow-backing", str(base.parent)]
    assert main(words) == 0


def test_info_and_map_work_on_an_image_that_is_being_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "d.qcow2"
    with serving("d.qcow2", "--create", "4M", "--unix", "s", cwd=tmp_path) as server:
        subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "write 0 1M", "-c", "flush", server.uris[0]],
            capture_output=True,
            timeout=30,
            check=True,
        )
        assert printed_json(capsys, "image", "info", path)["virtual-size"] == 4 * MIB
        entries = printed_json(capsys, "image", "map", path)
        assert sum(entry["length"] for entry in entries if entry["data"]) == MIB


# whatever the command


@pytest.mark.parametrize("command", ["info", "check", "map"])
def test_what_cannot_be_read_is_one_line_that_names_it(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.qcow2"
    broken.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(600))
    for path in (tmp_path / "nothing", tmp_path, broken):
        assert main(["image", command, str(path)]) == 1
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith(f"nbdserve: {path}")
        assert output.err.count("\n") == 1
