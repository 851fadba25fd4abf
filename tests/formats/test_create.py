"""New images equal those of qemu-img, and appear whole or not at all."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from nbdserve.errors import ConfigError
from nbdserve.formats.create import create_image
from tests.helpers.tools import run

SIZE = 5_000_000


def info(path: Path) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(run("qemu-img", "info", "--output=json", path))
    for varying in ("filename", "actual-size"):
        shown.pop(varying)
    return shown


@pytest.mark.parametrize(
    ("cluster_size", "compat", "refcount_bits", "backed"),
    [
        (512, 2, 16, True),
        (512, 3, 1, False),
        (512, 3, 64, True),
        (4096, 3, 2, True),
        (4096, 2, 16, False),
        (65536, 3, 16, True),
        (65536, 3, 4, False),
        (2 << 20, 3, 8, False),
        (2 << 20, 3, 32, True),
    ],
)
def test_qcow2_equals_that_of_qemu(
    tmp_path: Path, cluster_size: int, compat: int, refcount_bits: int, backed: bool
) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    options = (
        f"cluster_size={cluster_size},refcount_bits={refcount_bits},"
        f"compat={'0.10' if compat == 2 else '1.1'}"
    )
    if backed:
        create_image(tmp_path / "base.qcow2", SIZE)
        options += ",backing_file=base.qcow2,backing_fmt=qcow2"
    create_image(
        ours,
        SIZE,
        cluster_size=cluster_size,
        compat=compat,
        refcount_bits=refcount_bits,
        backing="base.qcow2" if backed else None,
        backing_format="qcow2" if backed else None,
    )
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, theirs, str(SIZE))
    assert info(ours) == info(theirs)
    header = min(cluster_size, 4096)
    assert ours.read_bytes()[:header] == theirs.read_bytes()[:header]
    run("qemu-img", "check", ours)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 1000k 1M", ours)
    run("qemu-img", "check", ours)


@pytest.mark.parametrize("cluster_size", [512, 65536, 2 << 20])
@pytest.mark.parametrize("refcount_bits", [1, 4, 16, 64])
def test_preallocated_qcow2(
    tmp_path: Path, cluster_size: int, refcount_bits: int
) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(
        path,
        SIZE,
        cluster_size=cluster_size,
        refcount_bits=refcount_bits,
        preallocation="falloc",
    )
    checked = json.loads(run("qemu-img", "check", "--output=json", path))
    assert checked["allocated-clusters"] == checked["total-clusters"]
    assert checked.get("fragmented-clusters", 0) == 0
    assert path.stat().st_blocks * 512 >= SIZE
    mapped = json.loads(run("qemu-img", "map", "--output=json", path))
    assert [entry["data"] for entry in mapped] == [True]
    end = path.stat().st_size
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 7 0 {SIZE // 512 * 512}", path)
    run("qemu-img", "check", path)
    assert path.stat().st_size == end


def test_large_qcow2_needs_several_refcount_blocks(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, 8 << 30, cluster_size=512)
    run("qemu-img", "check", path)
    assert info(path)["virtual-size"] == 8 << 30


def test_empty_qcow2(tmp_path: Path) -> None:
    create_image(tmp_path / "disk.qcow2", 0)
    run("qemu-img", "check", tmp_path / "disk.qcow2")


@pytest.mark.parametrize("backed", [False, True])
def test_qcow_equals_that_of_qemu(tmp_path: Path, backed: bool) -> None:
    ours, theirs = tmp_path / "ours.qcow", tmp_path / "theirs.qcow"
    backing: list[str] = []
    if backed:
        create_image(tmp_path / "base.qcow2", SIZE)
        backing = ["-b", "base.qcow2", "-F", "qcow2"]
    create_image(
        ours,
        SIZE,
        format="qcow",
        backing="base.qcow2" if backed else None,
        backing_format="qcow2" if backed else None,
    )
    run("qemu-img", "create", "-q", "-f", "qcow", *backing, theirs, str(SIZE))
    assert info(ours) == info(theirs)
    assert ours.read_bytes()[:512] == theirs.read_bytes()[:512]
    run("qemu-io", "-f", "qcow", "-c", "write -P 7 1000k 1M", ours)
    run("qemu-io", "-f", "qcow", "-c", "read -P 7 1000k 1M", ours)


@pytest.mark.parametrize("preallocation", [None, "off", "falloc"])
def test_raw_has_its_size_to_the_byte(
    tmp_path: Path, preallocation: str | None
) -> None:
    path = tmp_path / "disk.img"
    create_image(path, 100_001, format="raw", preallocation=preallocation)
    status = path.stat()
    assert status.st_size == 100_001
    assert (status.st_blocks > 0) == (preallocation == "falloc")
    assert not any(path.read_bytes())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"format": "vmdk"}, "qcow2, qcow, raw"),
        ({"cluster_size": 300}, "power of two from 512"),
        ({"cluster_size": 4 << 20}, "power of two from 512"),
        ({"compat": 4}, "must be 2 or 3"),
        ({"refcount_bits": 3}, "1, 2, 4, 8, 16, 32 or 64"),
        ({"compat": 2, "refcount_bits": 8}, "version 2 has 16"),
        ({"preallocation": "all"}, "off, metadata, falloc, full"),
        ({"size": -1}, "size -1"),
        ({"size": 1 << 62}, "larger clusters"),
        ({"size": 200 << 30, "cluster_size": 512}, "at most"),
        ({"size": 0, "format": "qcow"}, "at least 1"),
        ({"size": 1 << 60, "format": "qcow"}, "too many for qcow"),
        ({"format": "qcow", "cluster_size": 4096}, "qcow2 only"),
        ({"format": "raw", "compat": 3}, "qcow2 only"),
        ({"format": "qcow", "preallocation": "falloc"}, "qcow2 and raw"),
        ({"format": "raw", "backing": "b.raw", "backing_format": "raw"}, "raw image"),
        ({"backing": "b.raw"}, "format must be given"),
        ({"backing": "b.raw", "backing_format": "vmdk"}, "format must be given"),
        ({"backing": "b.raw", "backing_format": "qcow2"}, "is raw, not qcow2"),
        ({"backing": "none", "backing_format": "raw"}, "No such file"),
        ({"backing": "nbd:x", "backing_format": "raw"}, "URI"),
        ({"backing": "json:{}", "backing_format": "raw"}, "URI"),
        ({"backing": "", "backing_format": "raw"}, "empty"),
        ({"backing": "./" * 600 + "b.raw", "backing_format": "raw"}, "at most 1023"),
        (
            {"backing": "./" * 200 + "b.raw", "backing_format": "raw",
             "cluster_size": 512},
            "header",
        ),
        (
            {"backing": "b.raw", "backing_format": "raw", "preallocation": "falloc"},
            "preallocation",
        ),
    ],
)  # fmt: skip
def test_impossible_choices_leave_nothing(
    tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    (tmp_path / "b.raw").write_bytes(bytes(4096))
    size = options.pop("size", SIZE)
    with pytest.raises(ConfigError, match=text):
        create_image(tmp_path / "disk", size, **options)
    assert os.listdir(tmp_path) == ["b.raw"]


def test_a_raw_disk_that_holds_an_image_can_back_qcow2_but_not_qcow(
    tmp_path: Path,
) -> None:
    create_image(tmp_path / "b.raw", SIZE)
    options: dict[str, str] = {"backing": "b.raw", "backing_format": "raw"}
    create_image(tmp_path / "disk.qcow2", SIZE, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is qcow2, not raw"):
        create_image(tmp_path / "disk.qcow", SIZE, format="qcow", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["file", "dangling link", "folder"])
def test_nothing_is_overwritten(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "disk.qcow2"
    if kind == "file":
        path.write_bytes(b"precious")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"disk\.qcow2 exists already"):
        create_image(path, SIZE)
    assert os.listdir(tmp_path) == ["disk.qcow2"]
    assert kind != "file" or path.read_bytes() == b"precious"


def test_a_file_that_appears_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.qcow2"
    monkeypatch.setattr(os, "fsync", lambda _: path.write_bytes(b"precious"))
    with pytest.raises(ConfigError, match="exists already"):
        create_image(path, SIZE)
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["disk.qcow2"]


@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "fsync", "link"])
def test_a_failing_call_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(ConfigError, match=r"disk\.qcow2: No space left"):
        create_image(tmp_path / "disk.qcow2", SIZE)
    assert os.listdir(tmp_path) == []


def test_without_hard_links_nothing_is_overwritten_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.qcow2"

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    create_image(path, SIZE)
    run("qemu-img", "check", path)
    assert os.listdir(tmp_path) == ["disk.qcow2"]
    other = tmp_path / "other"
    monkeypatch.setattr(os.path, "lexists", lambda name: ".new" in str(name))
    other.write_bytes(b"precious")
    with pytest.raises(ConfigError, match="exists already"):
        create_image(other, SIZE)
    assert other.read_bytes() == b"precious"


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere/disk: No such file"):
        create_image(tmp_path / "nowhere" / "disk", SIZE)


def test_relative_path_and_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    create_image("disk.img", 4096, format="raw")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "disk.img").stat().st_mode & 0o777 == 0o666 & ~umask
