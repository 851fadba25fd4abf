"""`nbdserve image commit`, `rebase` and `rename`: what an overlay shows, before and after."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from nbdserve.cli.main import main
from nbdserve.formats.commit_overlay import commit_overlay
from nbdserve.formats.rebase import rebase
from tests.cli.servers import serving
from tests.helpers.tools import run

MIB = 1 << 20
SIZE = 5 * MIB


def raw_disk(path: Path, *, seed: int, size: int = SIZE) -> Path:
    """Make a raw disk of holes and random bytes."""
    generator = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        for start in range(0, size, 256 * 1024):
            if generator.random() < 0.6:
                file.seek(start + generator.randrange(9) * 4096)
                file.write(generator.randbytes(generator.randrange(1, 150_000)))
        file.truncate(size)
    return path


def info(path: Path) -> dict[str, Any]:
    """Return what qemu-img says of an image."""
    found: dict[str, Any] = json.loads(run("qemu-img", "info", "--output=json", path))
    return found


def overlay(path: Path, base: Path, options: str, size: int = SIZE) -> Path:
    """Make a qcow2 overlay that has written, zeroed and discarded clusters."""
    base_format = info(base)["format"]
    words = ["-f", "qcow2", "-o", options, "-b", base.name, "-F", base_format]
    run("qemu-img", "create", "-q", *words, path, str(size))
    for command in (
        "write -P 7 1M 300k",
        "write -P 9 3333k 65k",
        "write -z 2M 512k",
        "write -z -u 2800k 200k",
        "write -P 8 2900k 4k",
        f"write -P 3 {size - 70_656} 69k",
    ):
        run("qemu-io", "-f", "qcow2", "-c", command, path)
    return path


def shown_by(path: Path) -> Path:
    """Return a raw disk with what an image shows now."""
    raw = path.with_suffix(".shown")
    run("qemu-img", "convert", "-O", "raw", path, raw)
    return raw


def same(first: Path, second: Path) -> None:
    """Compare two disks by qemu-img, and by us."""
    run("qemu-img", "compare", first, second)
    assert main(["image", "compare", str(first), str(second)]) == 0


def sound(*paths: Path) -> None:
    """Check qcow2 images: neither corruption nor leak."""
    for path in paths:
        run("qemu-img", "check", path)
        assert main(["image", "check", str(path)]) == 0


def held_by(path: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """Return how many bytes an image decides itself."""
    capsys.readouterr()
    assert main(["image", "map", str(path), "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    return sum(e["length"] for e in entries if e["present"] and not e["depth"])


# commit


@pytest.mark.parametrize("base_format", ["raw", "qcow", "qcow2"])
@pytest.mark.parametrize(
    "options", ["compat=1.1", "compat=0.10", "cluster_size=4k", "cluster_size=2M"]
)
def test_commit_moves_everything_into_the_base(
    base_format: str,
    options: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    disk = raw_disk(tmp_path / "disk", seed=1)
    run("qemu-img", "convert", "-O", base_format, disk, base)
    expected = shown_by(overlay(top, base, options))
    assert main(["image", "commit", str(top)]) == 0
    assert str(base) in capsys.readouterr().out
    same(expected, base)
    same(expected, top)
    sound(top)
    assert held_by(top, capsys) == 0


@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
def test_commit_grows_a_smaller_base(base_format: str, tmp_path: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    disk = raw_disk(tmp_path / "disk", seed=2, size=MIB + 512)
    run("qemu-img", "convert", "-O", base_format, disk, base)
    expected = shown_by(overlay(top, base, "compat=1.1"))
    assert main(["image", "commit", str(top), "--keep"]) == 0
    same(expected, base)
    same(expected, top)
    assert info(base)["virtual-size"] == SIZE
    sound(top)


def test_commit_does_what_qemu_img_does(tmp_path: Path) -> None:
    raw_disk(tmp_path / "base", seed=3)
    top = overlay(tmp_path / "top", tmp_path / "base", "compat=1.1")
    twins = tmp_path / "twins"
    twins.mkdir()
    run("cp", tmp_path / "base", top, twins)
    run("qemu-img", "commit", twins / "top")
    assert main(["image", "commit", str(top)]) == 0
    assert (tmp_path / "base").read_bytes() == (twins / "base").read_bytes()


def test_commit_of_version_1_has_to_be_told_that_its_base_is_raw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, top = raw_disk(tmp_path / "base", seed=4), tmp_path / "top"
    disk = raw_disk(tmp_path / "disk", seed=5)
    words = ["--format", "qcow", "--backing", "base", "--backing-format", "raw"]
    assert main(["image", "convert", str(disk), str(top), *words]) == 0
    assert main(["image", "commit", str(top)]) == 1
    assert "add --backing-format raw" in capsys.readouterr().err
    assert main(["image", "commit", str(top), "--backing-format", "raw"]) == 0
    same(disk, base)


async def test_an_interrupted_commit_has_changed_nothing_that_shows(
    tmp_path: Path,
) -> None:
    raw_disk(tmp_path / "base", seed=6)
    top = overlay(tmp_path / "top", tmp_path / "base", "compat=1.1")
    expected = shown_by(top)
    calls = 0

    def stop(done: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await commit_overlay(top, progress=stop)
    run("qemu-img", "compare", expected, top)
    run("qemu-img", "check", top)
    await commit_overlay(top, progress=lambda done: None)
    run("qemu-img", "compare", "-F", "raw", expected, tmp_path / "base")


# rebase


NEW = {
    "raw": ["--backing", "new", "--backing-format", "raw"],
    "qcow2": ["--backing", "new.qcow2", "--backing-format", "qcow2"],
    "none": ["--backing", ""],
}


@pytest.mark.parametrize("new", NEW)
@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ("compat=1.1", (SIZE, SIZE, SIZE)),
        ("compat=0.10", (SIZE, 2 * MIB, SIZE)),
        ("compat=1.1", (SIZE + 512, 2 * MIB + 512, SIZE + MIB)),
        ("cluster_size=4k", (SIZE, SIZE, 2 * MIB)),
        ("cluster_size=2M", (SIZE, 3 * MIB + 4096, SIZE)),
    ],
)
def test_rebase_changes_nothing_that_shows(
    new: str, options: str, sizes: tuple[int, int, int], tmp_path: Path
) -> None:
    size, old_size, new_size = sizes
    base = raw_disk(tmp_path / "base", seed=7, size=old_size)
    other = raw_disk(tmp_path / "new", seed=8, size=new_size)
    run("qemu-img", "convert", "-O", "qcow2", other, tmp_path / "new.qcow2")
    top = overlay(tmp_path / "top", base, options, size)
    expected = shown_by(top)
    assert main(["image", "rebase", str(top), *NEW[new]]) == 0
    same(expected, top)
    sound(top)
    assert info(top).get("backing-filename", "") == NEW[new][1]
    # ... and qemu-img takes it back
    run("qemu-img", "rebase", "-b", "base", "-F", "raw", top)
    same(expected, top)


def test_rebase_copies_only_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = raw_disk(tmp_path / "base", seed=9)
    new = tmp_path / "new"
    new.write_bytes(base.read_bytes())
    with new.open("r+b") as file:
        file.seek(4 * MIB)
        file.write(random.Random(1).randbytes(100))
    top = overlay(tmp_path / "top", base, "compat=1.1")
    before = held_by(top, capsys)
    assert main(["image", "rebase", str(top), *NEW["raw"]]) == 0
    assert held_by(top, capsys) == before + 65536


def test_rebase_below_the_chain(tmp_path: Path) -> None:
    root = raw_disk(tmp_path / "root", seed=10)
    middle = overlay(tmp_path / "middle", root, "compat=1.1")
    words = ["-f", "qcow2", "-b", "middle", "-F", "qcow2"]
    top = tmp_path / "top"
    run("qemu-img", "create", "-q", *words, top)
    expected = shown_by(middle)
    words = ["--backing", "root", "--backing-format", "raw"]
    assert main(["image", "rebase", str(top), *words]) == 0
    middle.unlink()
    same(expected, top)


def test_an_image_is_no_backing_file_of_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    middle = overlay(
        tmp_path / "middle", raw_disk(tmp_path / "root", seed=11), "compat=1.1"
    )
    run(
        "qemu-img",
        "create",
        "-qf",
        "qcow2",
        "-b",
        "middle",
        "-Fqcow2",
        tmp_path / "top",
    )
    for name in ("top", "middle"):
        words = ["--backing", name, "--backing-format", "qcow2"]
        assert main(["image", "rebase", str(middle), *words]) == 1
        assert "can't be its backing file" in capsys.readouterr().err


def test_an_unsafe_rebase_changes_the_name_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = raw_disk(tmp_path / "base", seed=12)
    top = overlay(tmp_path / "top", base, "compat=1.1")
    expected = shown_by(top)
    moved = base.rename(tmp_path / f"{'long' * 60}.raw")
    words = ["--backing", moved.name, "--backing-format", "raw"]
    assert main(["image", "rebase", str(top), *words]) == 1
    assert "base can't be opened" in capsys.readouterr().err
    assert main(["image", "rebase", str(top), *words, "--unsafe"]) == 0
    assert info(top)["backing-filename-format"] == "raw"
    same(expected, top)
    sound(top)


def test_a_version_1_image_takes_a_name_that_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw_disk(tmp_path / "base", seed=13)
    disk = raw_disk(tmp_path / "disk", seed=14)
    raw_disk(tmp_path / "new", seed=15)
    top = tmp_path / "top"
    words = ["--format", "qcow", "--backing", "base", "--backing-format", "raw"]
    assert main(["image", "convert", str(disk), str(top), *words]) == 0
    assert main(["image", "rebase", str(top), *NEW["raw"]]) == 0
    same(disk, top)
    assert info(top)["backing-filename"] == "new"
    words = ["--backing", "new.qcow2", "--backing-format", "qcow2", "--unsafe"]
    assert main(["image", "rebase", str(top), *words]) == 1
    assert "convert the image to qcow2" in capsys.readouterr().err


async def test_an_interrupted_rebase_has_changed_nothing_that_shows(
    tmp_path: Path,
) -> None:
    base = raw_disk(tmp_path / "base", seed=16)
    raw_disk(tmp_path / "new", seed=17)
    top = overlay(tmp_path / "top", base, "compat=1.1")
    expected = shown_by(top)

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await rebase(top, "new", "raw", progress=stop)
    assert info(top)["backing-filename"] == "base"
    run("qemu-img", "compare", expected, top)
    run("qemu-img", "check", top)


# rename


def linked(path: Path, name: str, base_format: str = "qcow2") -> Path:
    """Make an empty overlay that names its backing file so."""
    words = ["-f", "qcow2", "-b", name, "-F", base_format]
    run("qemu-img", "create", "-q", *words, path)
    return path


def test_rename_tells_those_that_refer_to_it(tmp_path: Path) -> None:
    folder = tmp_path / "vms"
    folder.mkdir()
    raw_disk(tmp_path / "root", seed=18)
    base = overlay(tmp_path / "base", tmp_path / "root", "compat=1.1")
    expected = shown_by(base)
    referrers = [
        linked(tmp_path / "relative", "base"),
        linked(folder / "absolute", str(base)),
        linked(folder / "below", "../base"),
    ]
    new = folder / "a-much-longer-name.qcow2"
    words = [word for path in referrers for word in ("--referrer", str(path))]
    assert main(["image", "rename", str(base), str(new), *words]) == 0
    assert not base.exists()
    # its own backing file has a relative name, which counts from another folder now
    run("qemu-img", "compare", expected, new)
    sound(new, *referrers)
    names = []
    for referrer in referrers:
        run("qemu-img", "compare", expected, referrer)
        names.append(info(referrer)["backing-filename"])
    assert names == [f"vms/{new.name}", str(new), new.name]
    assert info(new)["backing-filename"] == "../root"


def test_rename_of_a_raw_image_within_a_folder(tmp_path: Path) -> None:
    old = raw_disk(tmp_path / "old", seed=19)
    data = old.read_bytes()
    top = linked(tmp_path / "top", "old", "raw")
    new = tmp_path / "new:er"
    words = ["--referrer", str(top)]
    assert main(["image", "rename", str(old), str(new), *words]) == 0
    assert new.read_bytes() == data
    assert info(top)["backing-filename"] == "./new:er"
    run("qemu-img", "compare", "-F", "raw", top, new)


def test_rename_refuses_before_it_changes_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = raw_disk(tmp_path / "old", seed=20)
    top = linked(tmp_path / "top", "old", "raw")
    other = linked(tmp_path / "other", "top")
    link = tmp_path / "link"
    link.symlink_to("old")
    for words, message in (
        ([old, top], "exists already"),
        ([tmp_path / "nothing", tmp_path / "new"], "No such file"),
        ([link, tmp_path / "new"], "is a symbolic link"),
        ([old, tmp_path / "new", "--referrer", top, "--referrer", other], "not "),
        ([old, tmp_path / "no/new", "--referrer", top], "No such file"),
    ):
        assert main(["image", "rename", *map(str, words)]) == 1
        assert message in capsys.readouterr().err
        assert sorted(os.listdir(tmp_path)) == ["link", "old", "other", "top"]
        assert info(top)["backing-filename"] == "old"


# all of them


def test_an_image_that_is_served_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = raw_disk(tmp_path / "base", seed=21)
    top = linked(tmp_path / "top", "base", "raw")
    raw_disk(tmp_path / "new", seed=22)
    with serving("top", "--unix", "s", cwd=tmp_path):
        for words in (
            ["commit", top],
            ["rebase", top, *NEW["raw"]],
            ["rebase", top, *NEW["raw"], "--unsafe"],
            ["rename", top, tmp_path / "renamed"],
            ["rename", base, tmp_path / "renamed", "--referrer", top],
        ):
            assert main(["image", *map(str, words)]) == 1
            assert "in use by another process" in capsys.readouterr().err
    sound(top)
    assert info(top)["backing-filename"] == "base"


@pytest.mark.parametrize("command", ["commit", "rebase --backing= --unsafe"])
def test_a_raw_image_has_no_backing_file(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = raw_disk(tmp_path / "disk", seed=23)
    words = command.split()
    assert main(["image", words[0], str(disk), *words[1:]]) == 1
    assert "which has no backing file" in capsys.readouterr().err
