"""`nbdserve image compact`: what it does and says."""

import json
from pathlib import Path

import pytest

from nbdserve.cli.main import main
from tests.helpers.tools import run

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of 4 MiB of which the first half was discarded."""
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
    run("qemu-io", "-c", "write -P 7 0 4M", "-c", "discard 0 2M", path)
    return path


def test_the_file_is_smaller(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = image.stat().st_size
    assert main(["image", "compact", str(image)]) == 0
    assert capsys.readouterr().out.startswith(f"{image}: 4.31 MiB -> 2.")
    assert image.stat().st_size < before - MIB
    run("qemu-img", "check", image)
    run("qemu-io", "-c", "read -P 0 0 2M", "-c", "read -P 7 2M 2M", image)
    assert main(["image", "compact", str(image), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["size-after"] == report["size-before"] == image.stat().st_size
    assert report["moved-bytes"] == 0


def test_leaks_do_not_keep_it_long(image: Path) -> None:
    data = bytearray(image.read_bytes())
    table = int.from_bytes(data[48:56], "big")
    block = int.from_bytes(data[table : table + 8], "big")
    cluster = len(data) // 65536 + 2
    data[block + 2 * cluster : block + 2 * cluster + 2] = b"\0\1"
    data += bytes(4 * 65536)
    image.write_bytes(data)
    assert main(["image", "compact", str(image)]) == 0
    run("qemu-img", "check", image)
    assert image.stat().st_size < 3 * MIB


@pytest.mark.parametrize(("kind", "text"), [("raw", "raw"), ("qcow", "qcow")])
def test_other_formats_are_refused(
    tmp_path: Path, kind: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "disk"
    run("qemu-img", "create", "-q", "-f", kind, path, "1M")
    assert main(["image", "compact", str(path)]) == 1
    error = capsys.readouterr().err
    assert f"is a {text} image, and only qcow2 images can be compacted" in error
    assert error.count("\n") == 1


def test_with_a_data_file_there_is_nothing_to_move(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, data = tmp_path / "disk.qcow2", tmp_path / "disk.raw"
    assert main(["image", "create", str(path), "1M", "--data-file", str(data)]) == 0
    before = path.read_bytes()
    assert main(["image", "compact", str(path)]) == 1
    error = capsys.readouterr().err
    assert "has its data in another file" in error
    assert "--allow-data-file" not in error  # which this command does not take
    assert error.count("\n") == 1
    assert path.read_bytes() == before


def test_a_corrupt_image_is_left_alone(
    image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray(image.read_bytes())
    table = int.from_bytes(data[48:56], "big")
    block = int.from_bytes(data[table : table + 8], "big")
    last = len(data) // 65536 - 1
    data[block + 2 * last : block + 2 * last + 2] = b"\0\0"
    image.write_bytes(data)
    assert main(["image", "compact", str(image)]) == 1
    assert "run 'nbdserve image check'" in capsys.readouterr().err
    assert image.stat().st_size == len(data)
