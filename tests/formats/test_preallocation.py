"""Preallocation when an image is made, converted or grown: what qemu-img shows of it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nbdserve.cli.main import main
from nbdserve.errors import ConfigError
from nbdserve.formats.create import create_image
from nbdserve.formats.open import open_image
from tests.helpers.tools import run

KIB = 1 << 10
MIB = 1 << 20
SIZE = 5 * MIB + 3 * KIB
MODES = ("off", "metadata", "falloc", "full")


def image(*words: object) -> int:
    """Run `nbdserve image` and return its exit code."""
    return main(["image", *map(str, words)])


def map_of(path: Path, image_format: str) -> list[dict[str, Any]]:
    """Return what qemu-img map shows."""
    shown: list[dict[str, Any]] = json.loads(
        run("qemu-img", "map", "-f", image_format, "--output=json", path)
    )
    return shown


def mapped(entries: list[dict[str, Any]]) -> int:
    """Return the bytes that have a place, in one piece from the beginning."""
    assert all("offset" in each for each in entries)
    return sum(each["length"] for each in entries)


def taken(path: Path) -> int:
    """Return the bytes that a file takes."""
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("cluster_size", ["4k", "64k", "2M"])
@pytest.mark.parametrize("mode", MODES)
def test_create_qcow2(tmp_path: Path, mode: str, cluster_size: str) -> None:
    path, theirs = tmp_path / "ours", tmp_path / "theirs"
    words = ["--preallocation", mode, "--cluster-size", cluster_size]
    assert image("create", path, SIZE, *words) == 0
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o",
        f"preallocation={mode},cluster_size={cluster_size}", theirs, str(SIZE))  # fmt: skip
    run("qemu-img", "check", path)
    ours, qemus = map_of(path, "qcow2"), map_of(theirs, "qcow2")
    if mode == "off":
        assert ours == qemus
        return
    assert mapped(ours) == mapped(qemus) == SIZE
    assert path.stat().st_size == theirs.stat().st_size
    if mode == "metadata":
        assert taken(path) < 300 * KIB
        assert all(each["zero"] for each in ours)
    else:
        assert taken(path) >= SIZE
    for each in ("ours", "theirs"):
        measured = json.loads(
            run("qemu-img", "measure", "--output=json", "-O", "qcow2", tmp_path / each)
        )
        assert measured["fully-allocated"] >= SIZE
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 7 1M {SIZE - MIB}", path)
    run("qemu-img", "check", path)


@pytest.mark.parametrize("mode", ["off", "falloc", "full"])
def test_create_raw(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "disk"
    assert image("create", path, SIZE, "--format", "raw", "--preallocation", mode) == 0
    assert path.stat().st_size == SIZE
    assert taken(path) >= (0 if mode == "off" else SIZE)
    assert not any(path.read_bytes())
    assert (taken(path) == 0) == (mode == "off")


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_create_with_a_data_file(
    tmp_path: Path, mode: str, raw: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, data = tmp_path / "disk", tmp_path / "data"
    more = ["--data-file-raw"] if raw else []
    words = ["--preallocation", mode, "--data-file", "data", *more]
    assert image("create", path, SIZE, *words) == 0
    run("qemu-img", "check", path)
    entries = map_of(path, "qcow2")
    if mode != "off" or raw:
        assert mapped(entries) == SIZE
        assert entries[0]["offset"] == 0
    assert data.stat().st_size == SIZE
    assert taken(path) < 300 * KIB
    assert (taken(data) >= SIZE) == (mode in {"falloc", "full"})


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("extra", ["", "data", "raw data"])
def test_grow(
    tmp_path: Path, mode: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, theirs = tmp_path / "ours", tmp_path / "theirs"
    for name in ("ours", "theirs"):
        options = ["-o", "cluster_size=4k"]
        if extra:
            whole = "on" if "raw" in extra else "off"
            options[1] += f",data_file={name}.data,data_file_raw={whole}"
        run("qemu-img", "create", "-q", "-f", "qcow2", *options, name, str(SIZE))
        run("qemu-io", "-f", "qcow2", "-c", f"write -P 7 5M {SIZE - 5 * MIB}", name)
    words = ["--preallocation", mode, "--allow-data-file", tmp_path]
    assert image("resize", path, "9M", *words) == 0
    run("qemu-img", "resize", "-q", "-f", "qcow2", f"--preallocation={mode}", theirs,
        "9M")  # fmt: skip
    run("qemu-img", "check", path)
    run("qemu-img", "compare", path, theirs)

    def places(name: Path) -> list[tuple[int, int]]:
        """Return what has a place, neighbours joined."""
        found: list[tuple[int, int]] = []
        for each in map_of(name, "qcow2"):
            start, length = each["start"], each["length"]
            if "offset" not in each:
                continue
            if found and sum(found[-1]) == start:
                start, length = found[-1][0], found[-1][1] + length
                found.pop()
            found.append((start, length))
        return found

    assert places(path) == places(theirs)
    file = tmp_path / "ours.data" if extra else path
    assert (taken(file) >= 3 * MIB) == (mode != "metadata")
    if extra:
        assert file.stat().st_size == 9 * MIB


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_grow_raw(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"data")
    words = ["--preallocation", mode, "--format", "raw"]
    assert image("resize", path, SIZE, *words) == 0
    assert path.read_bytes() == b"data".ljust(SIZE, b"\0")
    assert taken(path) >= SIZE - 4096


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_convert(tmp_path: Path, mode: str) -> None:
    source, path = tmp_path / "source", tmp_path / "disk"
    source.write_bytes((bytes(MIB) + b"content" * 10_000).ljust(SIZE, b"\0"))
    assert image("convert", source, path, "--preallocation", mode) == 0
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, path)
    assert mapped(map_of(path, "qcow2")) == SIZE
    assert (taken(path) >= SIZE) == (mode != "metadata")
    run("qemu-img", "check", path)


@pytest.mark.parametrize("mode", MODES)
def test_measure(tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    source.write_bytes((bytes(MIB) + b"content" * 10_000).ljust(SIZE, b"\0"))
    for words in (["--size", "10M"], [str(source)]):
        assert image("measure", "--json", "--preallocation", mode, *words) == 0
        options = f"preallocation={mode}"
        argv = ["qemu-img", "measure", "--output=json", "-O", "qcow2", "-o", options]
        theirs = json.loads(run(*argv, *words))
        ours = json.loads(capsys.readouterr().out)
        assert ours["required"] == theirs["required"]
        assert ours["fully-allocated"] == theirs["fully-allocated"]


def test_what_is_not_possible(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, raw, base = tmp_path / "disk", tmp_path / "raw", tmp_path / "base"
    raw.write_bytes(bytes(MIB))
    base.write_bytes(bytes(MIB))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path, "1M")
    for words, message in (
        (["create", tmp_path / "x", "1M", "--format", "raw", "--preallocation",
          "metadata"], "raw has no metadata"),
        (["create", tmp_path / "x", "1M", "--format", "qcow", "--preallocation",
          "full"], "qcow2 and raw only"),
        (["create", tmp_path / "x", "1M", "--preallocation", "all"], "metadata"),
        (["resize", path, "2M", "--preallocation", "full"], "hides the backing file"),
        (["resize", raw, "512", "--format", "raw", "--shrink", "--preallocation",
          "full"], "a larger size"),
        (["resize", raw, "2M", "--format", "raw", "--preallocation", "metadata"],
         "raw has no metadata"),
        (["convert", raw, tmp_path / "x", "--preallocation", "full", "--compress",
          "zlib"], "no place to preallocate"),
    ):  # fmt: skip
        assert image(*words) == 1, words
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert raw.stat().st_size == MIB


async def test_holes_of_mapped_clusters_are_known_as_zeros(tmp_path: Path) -> None:
    """Copying such an image reads only what was written."""
    path = tmp_path / "disk"
    create_image(path, 64 * MIB, preallocation="metadata")
    async with open_image(path) as device:
        await device.write(10 * MIB, b"x" * 4096)
        await device.flush()
        extents = await device.block_status(0, device.size)
    assert [(each.length, each.zero) for each in extents] == [
        (10 * MIB, True),
        (4096, False),
        (54 * MIB - 4096, True),
    ]
    assert all(each.data and each.present for each in extents)
    assert extents == [
        extents[0]._replace(
            length=each["length"], zero=each["zero"], offset=each["offset"]
        )
        for each in map_of(path, "qcow2")
    ]


async def test_preallocating_twice_takes_nothing_more(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    create_image(path, 4 * MIB)
    done: list[int] = []
    async with open_image(path) as device:
        await device.write(MIB, b"here" * KIB)
        await device.preallocate(0, 4 * MIB, "falloc", done.append)
        await device.preallocate(0, 4 * MIB, "metadata", done.append)
        assert await device.read(MIB, 4096) == b"here" * KIB
    assert done[-1] == 4 * MIB - 64 * KIB
    run("qemu-img", "check", path)
    assert path.stat().st_size < 5 * MIB


def test_full_file_systems_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't create"):
        create_image(tmp_path / "disk", 1 << 50, preallocation="falloc")
    assert not os.listdir(tmp_path)


def test_interrupted_writing_of_zeros_leaves_nothing(tmp_path: Path) -> None:
    words = ["image", "create", "disk", "1T", "--preallocation", "full"]
    with subprocess.Popen(
        [sys.executable, "-m", "nbdserve", *words, "--data-file", "data"], cwd=tmp_path
    ) as process:
        deadline_s = time.monotonic() + 20
        while not any(map(taken, tmp_path.iterdir())):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    assert not os.listdir(tmp_path)
