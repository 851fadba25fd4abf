"""`nbdserve image snapshot`, `resize`, `amend`: what they do, say and refuse."""

import asyncio
import json
import resource
from pathlib import Path

import pytest

from nbdserve.cli.main import main
from nbdserve.formats.mapped.redo import RedoLog, redo_path
from tests.cli.servers import serving
from tests.helpers.engine import (
    COPIED,
    HEADER_INCOMPATIBLE,
    HEADER_REFCOUNT_TABLE,
    convert,
    l2_entry_of,
    make,
    u64,
)
from tests.helpers.tools import run

MIB = 1 << 20


def image(*words: str | Path) -> int:
    """Run `nbdserve image` and return its exit code."""
    return main(["image", *map(str, words)])


def content(path: Path, *, snapshot: str | None = None) -> bytes:
    """Return what qemu-img reads."""
    out = path.with_suffix(".out")
    which = ["-l", snapshot] if snapshot else []
    run("qemu-img", "convert", *which, "-O", "raw", path, out)
    return out.read_bytes()


def test_snapshot_list_is_qemus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = convert(tmp_path, b"one" * 1000)
    assert image("snapshot", "list", path) == 0
    assert capsys.readouterr().out == ""
    assert image("snapshot", "create", path, "first one") == 0
    run("qemu-img", "snapshot", "-c", "theirs", path)
    assert image("snapshot", "list", path) == 0
    assert capsys.readouterr().out == run("qemu-img", "snapshot", "-l", path)
    assert image("snapshot", "list", path, "--json") == 0
    theirs = json.loads(run("qemu-img", "info", "--output=json", path))["snapshots"]
    assert json.loads(capsys.readouterr().out) == theirs


def test_snapshots_come_and_go(tmp_path: Path) -> None:
    old = b"old" * 10000 + bytes(720)
    path = convert(tmp_path, old)
    assert image("snapshot", "create", path, "before") == 0
    run("qemu-io", "-c", "write -P 1 0 30720", path)
    assert content(path, snapshot="before") == old
    assert image("snapshot", "apply", path, "before") == 0
    assert content(path) == old
    assert image("snapshot", "delete", path, "before") == 0
    run("qemu-img", "check", path)
    assert run("qemu-img", "snapshot", "-l", path) == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create", "IMAGE"], "snapshot create needs a NAME"),
        (["list", "IMAGE", "x"], "snapshot list takes no NAME"),
        (["apply", "IMAGE", "x"], "made.qcow2: there is no snapshot 'x'"),
        (["delete", "IMAGE", "x"], "made.qcow2: there is no snapshot 'x'"),
        (["create", "IMAGE", "x", "--json"], "--json is for snapshot list"),
        (["creat", "IMAGE", "x"], "did you mean create?"),
        (["create", "RAW", "x"], "only qcow2 images have internal snapshots"),
        (["list", "RAW"], "only qcow2 images have internal snapshots"),
        (["create", "OLD", "x"], "only qcow2 images have internal snapshots"),
    ],
)
def test_snapshot_refuses(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(4096))
    paths = {"IMAGE": make(tmp_path, MIB), "RAW": raw}
    paths["OLD"] = make(tmp_path, MIB, fmt="qcow")
    assert image("snapshot", *(str(paths.get(word, word)) for word in words)) == 1
    assert message in capsys.readouterr().err


def test_a_snapshot_that_is_there_already_names_its_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path, MIB)
    assert image("snapshot", "create", path, "before") == 0
    assert image("snapshot", "create", path, "before") == 1
    told = f"nbdserve: {path}: there is a snapshot 'before' already\n"
    assert capsys.readouterr().err == told


def test_serve_a_snapshot(tmp_path: Path) -> None:
    old = b"old" * 10000 + bytes(720)
    path = convert(tmp_path, old)
    assert image("snapshot", "create", path, "before") == 0
    run("qemu-io", "-c", "write -P 1 0 30720", path)
    socket = tmp_path / "socket"
    out = tmp_path / "out"
    with serving(
        str(path), "--snapshot", "before", "--unix", str(socket), cwd=tmp_path
    ):
        uri = f"nbd+unix:///?socket={socket}"
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, out)
        assert "is_read_only: true" in run("nbdinfo", uri)
    assert out.read_bytes() == old


@pytest.mark.parametrize(
    ("words", "size"),
    [
        (["3M"], 3 * MIB),
        (["+512K"], 3 * MIB // 2),
        (["-512K", "--shrink"], MIB // 2),
        (["1000", "--shrink"], 1024),
    ],
)
def test_resize(words: list[str], size: int, tmp_path: Path) -> None:
    path = make(tmp_path, MIB)
    assert image("resize", path, *words) == 0
    info = json.loads(run("qemu-img", "info", "--output=json", path))
    assert info["virtual-size"] == size
    run("qemu-img", "check", path)


def test_resize_raw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 4096)
    assert image("resize", path, "1M") == 1
    assert "no qcow or qcow2 header" in capsys.readouterr().err
    assert image("resize", path, "1M", "--format", "raw") == 0
    assert path.stat().st_size == MIB


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["512K"], "--shrink"),
        (["-2M", "--shrink"], "must be 0 to"),
        (["many"], "is not a size"),
        (["+"], "is not a size"),
    ],
)
def test_resize_refuses(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = make(tmp_path, MIB)
    assert image("resize", path, *words) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_a_preallocation_that_finds_no_room_says_what_is_done(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path, MIB)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, limits[1]))
    try:
        assert image("resize", path, "100M", "--preallocation", mode) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().err == (
        f"nbdserve: {path}: File too large; the disk has its new size already, not all"
        " of it preallocated\n"
    )
    info = json.loads(run("qemu-img", "info", "--output=json", path))
    assert info["virtual-size"] == 100 * MIB
    run("qemu-img", "check", path)


def test_an_image_in_use_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path, MIB)
    with serving(str(path), "--unix", "socket", cwd=tmp_path):
        assert image("resize", path, "2M") == 1
        assert image("snapshot", "create", path, "x") == 1
    assert capsys.readouterr().err.count("in use") == 2


# check --repair


def damaged(tmp_path: Path) -> Path:
    """Make an image with a leak and a COPIED flag missing."""
    path = convert(tmp_path, b"x" * 100_000, options="cluster_size=4k")
    data = bytearray(path.read_bytes())
    block = u64(data, u64(data, HEADER_REFCOUNT_TABLE))
    data[block + len(data) // 4096 * 2 + 1] = 1
    data += bytes(4096)
    entry = l2_entry_of(data, 0)
    data[entry] &= 0x7F
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("mode", ["leaks", "all"])
def test_repair_as_qemu_img(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = damaged(tmp_path)
    other = tmp_path / "other"
    other.write_bytes(path.read_bytes())
    theirs = run("qemu-img", "check", "-r", mode, other)
    assert image("check", path, "--repair", mode) == 0
    out = capsys.readouterr().out
    assert "    1 leaked clusters\n    1 corruptions\n" in out
    assert out.partition("Image end")[0] == theirs.partition("Image end")[0]
    run("qemu-img", "check", path)


def test_repair_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = damaged(tmp_path)
    assert image("check", path, "--repair", "all", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["leaks-fixed"], shown["corruptions-fixed"]) == (1, 1)
    assert image("check", path, "--repair", "all") == 0
    assert "repaired" not in capsys.readouterr().out


def test_repair_says_what_would_be_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = convert(tmp_path, b"x" * 100_000, options="cluster_size=4k")
    data = bytearray(path.read_bytes())
    entry = l2_entry_of(data, 8192)
    data[entry : entry + 8] = (1 << 40).to_bytes(8, "big")
    path.write_bytes(data)
    assert image("check", path, "--repair", "all") == 2
    err = capsys.readouterr().err
    assert "bytes 8192 to 12287: its place 0x10000000000 lies past the end" in err
    assert "--force repairs it" in err
    assert path.read_bytes() == data
    assert image("check", path, "--repair", "all", "--force") == 0
    run("qemu-img", "check", path)


def test_force_is_for_repair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert image("check", make(tmp_path, MIB), "--force") == 1
    assert "--force is for --repair" in capsys.readouterr().err


# amend


def test_amend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = convert(tmp_path, b"x" * 512 * 40)
    assert image("amend", path, "--compat", "2") == 0
    assert "compat: 0.10" in run("qemu-img", "info", path)
    assert image("amend", path, "--compat", "3", "--refcount-bits", "8") == 0
    assert image("amend", path, "--lazy-refcounts", "on") == 0
    shown = run("qemu-img", "info", path)
    assert "compat: 1.1" in shown
    assert "refcount bits: 8" in shown
    assert "lazy refcounts: true" in shown
    assert content(path) == b"x" * 512 * 40
    assert image("amend", path) == 1
    assert "nothing to amend" in capsys.readouterr().err


def test_repair_links_what_a_killed_server_left(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    path = convert(tmp_path, b"x" * 100_000, options="cluster_size=4k")
    # it looks like a leak, and is an acknowledged write
    data = bytearray(path.read_bytes())
    place = len(data)
    block = u64(data, u64(data, HEADER_REFCOUNT_TABLE))
    data[block + place // 4096 * 2 + 1] = 1
    path.write_bytes(data + b"new!" * 1024)
    status = path.stat()
    log = RedoLog(redo_path(tmp_path, status.st_dev, status.st_ino))
    old = u64(data, l2_entry_of(data, 0))

    async def acknowledge() -> None:
        log.link(0, old, COPIED | place)
        log.close(remove=False)

    asyncio.run(acknowledge())
    assert image("check", path, "--repair", "leaks") == 0
    assert "linked 1 acknowledged writes" in capsys.readouterr().err
    run("qemu-img", "check", path)
    assert content(path)[:4100] == b"new!" * 1024 + b"xxxx"


def test_repair_keeps_what_it_can_not_link(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    path = damaged(tmp_path)
    data = bytearray(path.read_bytes())
    data[HEADER_INCOMPATIBLE + 7] = 2
    path.write_bytes(data)
    status = path.stat()
    log = RedoLog(redo_path(tmp_path, status.st_dev, status.st_ino))
    log.close(remove=False)
    assert image("check", path, "--repair", "all") == 1
    assert "--force goes on without them" in capsys.readouterr().err
    assert image("check", path, "--repair", "all", "--force") == 0
    run("qemu-img", "check", path)
