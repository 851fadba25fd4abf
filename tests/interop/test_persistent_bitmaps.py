"""Persistent bitmaps served beside qemu-nbd, to real clients, and across a kill."""

import json
import sys
from pathlib import Path

import pytest

from tests.helpers.bitmaps import Ranges, qemu_bitmaps, seen_by_qemu, served
from tests.helpers.servers import Server, nbdserve
from tests.helpers.tools import run

pytestmark = pytest.mark.interop

MIB = 1 << 20
WORK = ["-c", "write 1M 512", "-c", "discard 4M 1M", "-c", "write -z 9M 100k"]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """An image with a bitmap that has something in it, over one with another."""
    base, path = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "16M")
    run("qemu-img", "bitmap", "--add", "-g", "4k", base, "below")
    run("qemu-io", "-c", "write 10M 5k", base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", path)
    run("qemu-img", "bitmap", "--add", "-g", "512", path, "fine")
    run("qemu-io", "-c", "write 3M 3k", path)
    run("qemu-img", "bitmap", "--add", path, "b")
    return path


def as_qemu_nbd(path: Path, folder: Path, *options: str) -> Server:
    """Our server behind the command line of qemu-nbd."""
    socket = folder / "nbd.sock"
    code = "import sys; from nbdserve.cli.qemu_nbd import main; sys.exit(main())"
    argv = [sys.executable, "-c", code, "-t", "-k", str(socket), "-f", "qcow2"]
    return Server([*argv, *options, str(path)], folder, "", socket)


def through_qemu(server: Server, name: str) -> Ranges:
    """Return what qemu's own client sees, as backup tools ask it."""
    node = f"driver=nbd,server.type=unix,server.path={server.unix}"
    node += f",export={server.export},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
    mapped = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", node))
    return [(each["start"], each["length"]) for each in mapped if not each["data"]]


def require_refusal(server: Server, words: str) -> None:
    """It ends, and says why."""
    with pytest.raises(AssertionError, match=f"(?s)exit code 1\n.*{words}"):
        run(*server.argv)


def test_bitmaps_are_served_as_by_qemu_nbd(disk: Path, tmp_path: Path) -> None:
    names = ("fine", "below", "b")
    folder = tmp_path / "q"
    folder.mkdir()
    theirs = {name: seen_by_qemu(disk, name, folder) for name in names}
    assert theirs["fine"] == [(3 * MIB, 3072)]
    assert theirs["below"] == [(10 * MIB, 8192)]
    options = [word for name in names for word in ("--bitmap", name)]
    with nbdserve(disk, tmp_path, options=[*options, "--read-only"]) as server:
        assert {name: served(server, name) for name in names} == theirs
        assert through_qemu(server, "fine") == theirs["fine"]
    with as_qemu_nbd(disk, tmp_path, "-r", "-B", "fine", "-B", "below") as server:
        assert served(server, "fine") == theirs["fine"]
        assert served(server, "below") == theirs["below"]


def test_a_served_bitmap_is_kept(disk: Path, tmp_path: Path) -> None:
    with nbdserve(disk, tmp_path, options=["--bitmap", "b"]) as server:
        assert served(server, "b") == []
        run("qemu-io", "-f", "raw", *WORK, server.uri("unix"))
        expected = [(MIB, 65536), (4 * MIB, MIB), (9 * MIB, 131072)]
        assert served(server, "b") == through_qemu(server, "b") == expected
        flags = qemu_bitmaps(disk)
        assert all("in-use" in flags[name]["flags"] for name in ("b", "fine"))
    assert qemu_bitmaps(disk)["b"]["flags"] == ["auto"]
    run("qemu-img", "check", disk)
    (tmp_path / "q").mkdir()
    assert seen_by_qemu(disk, "b", tmp_path / "q") == expected
    fine = seen_by_qemu(disk, "fine", tmp_path / "q")
    assert fine[0] == (MIB, 512)
    assert fine[-1] == (9 * MIB, 100 << 10)


def test_a_kill_leaves_bitmaps_in_use(disk: Path, tmp_path: Path) -> None:
    server = nbdserve(disk, tmp_path, options=["--bitmap", "b"]).start()
    run("qemu-io", "-f", "raw", *WORK, server.uri("unix"))
    server.kill()
    bitmaps = qemu_bitmaps(disk)
    assert [each["flags"] for each in bitmaps.values()] == [["in-use", "auto"]] * 2
    with nbdserve(disk, tmp_path) as server:
        assert server.stderr.count("bitmap 'b' was not stored") == 1
        run("qemu-io", "-f", "raw", "-c", "write 2M 512", server.uri("unix"))
    assert qemu_bitmaps(disk) == bitmaps
    require_refusal(nbdserve(disk, tmp_path, options=["--bitmap", "b"]), "not stored")
    run(sys.executable, "-m", "nbdserve", "image", "bitmap", "remove", disk, "b")
    assert list(qemu_bitmaps(disk)) == ["fine"]
    run("qemu-img", "check", disk, expect=[0, 3])


def test_what_is_not_there(disk: Path, tmp_path: Path) -> None:
    """By another name a writable disk records in memory, and says so; qemu-nbd does not."""
    with nbdserve(disk, tmp_path, options=["--bitmap", "other"]) as server:
        assert "no persistent bitmap" in server.stderr
        run("qemu-io", "-f", "raw", "-c", "write 2M 512", server.uri("unix"))
        assert served(server, "other") == [(2 * MIB, 65536)]
    assert "other" not in qemu_bitmaps(disk)
    missing = "there is no bitmap 'other'"
    options = ["--bitmap", "other", "--read-only"]
    require_refusal(nbdserve(disk, tmp_path, options=options), missing)
    require_refusal(as_qemu_nbd(disk, tmp_path, "-B", "other"), missing)
    shifted = as_qemu_nbd(disk, tmp_path, "-B", "b", "-o", "512")
    require_refusal(shifted, "with an offset")
