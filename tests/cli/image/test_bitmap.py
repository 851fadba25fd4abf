"""`nbdserve image bitmap`: what it does, says and refuses, beside qemu-img bitmap."""

import json
from pathlib import Path

import pytest

from nbdserve.cli.main import main
from tests.helpers.bitmaps import qemu_bitmaps, seen_by_qemu
from tests.helpers.engine import make
from tests.helpers.tools import run

MIB = 1 << 20


def bitmap(*words: str | Path) -> int:
    """Run `nbdserve image bitmap` and return its exit code."""
    return main(["image", "bitmap", *map(str, words)])


def test_the_same_steps_as_with_qemu_img(tmp_path: Path) -> None:
    """After each step qemu-img tells the same of both images."""
    ours = make(tmp_path, 16 * MIB)
    theirs = tmp_path / "theirs.qcow2"
    theirs.write_bytes(ours.read_bytes())
    steps: list[tuple[list[str], list[str]]] = [
        (["add", "a"], ["--add", "a"]),
        (["add", "b", "--granularity", "512", "--disabled"],
         ["--add", "-g", "512", "--disable", "b"]),
        (["merge", "b", "a"], ["--merge", "a", "b"]),
        (["enable", "b"], ["--enable", "b"]),
        (["disable", "a"], ["--disable", "a"]),
        (["clear", "a"], ["--clear", "a"]),
        (["add", "c"], ["--add", "c"]),
        (["merge", "c", "a", "b"], ["--merge", "a", "--merge", "b", "c"]),
        (["remove", "a"], ["--remove", "a"]),
    ]  # fmt: skip
    for number, (words, qemu) in enumerate(steps):
        verb, *rest = words
        assert bitmap(verb, ours, *rest) == 0
        *options, name = qemu
        run("qemu-img", "bitmap", *options, theirs, name)
        assert qemu_bitmaps(ours) == qemu_bitmaps(theirs)
        run("qemu-img", "check", ours)
        for path in (ours, theirs):
            run("qemu-io", "-c", f"write {number}M 3k", path)
    for name in ("b", "c"):
        assert seen_by_qemu(ours, name, tmp_path) == seen_by_qemu(
            theirs, name, tmp_path
        )


def test_merging_from_another_image(tmp_path: Path) -> None:
    path = make(tmp_path, 16 * MIB)
    other = tmp_path / "other.qcow2"
    other.write_bytes(path.read_bytes())
    assert bitmap("add", path, "b") == 0
    assert bitmap("add", other, "source", "--granularity", "4k") == 0
    run("qemu-io", "-c", "write 5M 1k", other)
    assert bitmap("merge", path, "b", "source", "--from", other) == 0
    assert seen_by_qemu(path, "b", tmp_path) == [(5 * MIB, 65536)]


def test_an_image_whose_data_are_elsewhere(tmp_path: Path) -> None:
    data = tmp_path / "data"
    path = make(tmp_path, MIB, options=f"data_file={data},data_file_raw=on")
    assert bitmap("add", path, "b") == 1
    assert bitmap("add", path, "b", "--allow-data-file", data) == 0
    assert list(qemu_bitmaps(path)) == ["b"]
    run("qemu-img", "check", path)


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path, MIB)
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(MIB))
    for words, told in {
        ("add", path): "required: NAME",
        ("ad", path, "b"): "did you mean add?",
        ("remove", path, "b"): "there is no bitmap 'b'",
        ("merge", path, "b"): "needs a NAME and the SOURCEs",
        ("clear", path, "b", "c"): "takes one NAME",
        ("clear", path, "b", "--from", path): "takes one NAME",
        ("clear", path, "b", "--disabled"): "are for bitmap add",
        ("add", path, "b", "--granularity", "3k"): "power of two",
        ("add", raw, "b"): "raw",
        ("add", tmp_path / "none", "b"): "none",
    }.items():
        assert bitmap(*words) == 1
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
    assert not qemu_bitmaps(path)


def test_convert_copies_bitmaps_as_qemu_img(tmp_path: Path) -> None:
    path = make(tmp_path, 16 * MIB)
    for name, options in {"a": [], "b": ["-g", "512", "--disable"]}.items():
        run("qemu-img", "bitmap", "--add", *options, path, name)
    run("qemu-io", "-c", "write 5M 1k", "-c", "write 9M 1M", path)
    run("qemu-img", "bitmap", "--merge", "a", path, "b")
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    run("qemu-img", "convert", "--bitmaps", "-O", "qcow2", path, theirs)
    assert main(["image", "convert", "--bitmaps", str(path), str(ours)]) == 0
    run("qemu-img", "check", ours)
    run("qemu-img", "compare", path, ours)
    assert qemu_bitmaps(ours) == qemu_bitmaps(theirs) == qemu_bitmaps(path)
    for name in ("a", "b"):
        expected = seen_by_qemu(theirs, name, tmp_path)
        assert seen_by_qemu(ours, name, tmp_path) == expected
        assert expected


@pytest.mark.parametrize("cluster", ["64K", "512"])
def test_measure_counts_bitmaps_as_qemu_img(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cluster: str
) -> None:
    path = make(tmp_path, 99 * MIB)
    layout = ["-o", f"cluster_size={cluster}"]
    for name in ("", "one", "another"):
        if name:
            run("qemu-img", "bitmap", "--add", "-g", "4k", path, name)
        for qemu, options in (([], []), (["--output=json"], ["--json"])):
            said = run("qemu-img", "measure", "-O", "qcow2", *qemu, *layout, path)
            words = ["image", "measure", *options, "--cluster-size", cluster]
            assert main([*words, str(path)]) == 0
            told = capsys.readouterr().out
            assert json.loads(told) == json.loads(said) if options else told == said
    assert main(["image", "measure", str(path), "--compat", "2"]) == 0
    assert "bitmaps" not in capsys.readouterr().out


def test_convert_refuses_what_has_no_bitmaps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path, MIB)
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(MIB))
    for words, told in {
        (raw, tmp_path / "new"): "only a qcow2 image",
        (path, tmp_path / "new", "--format", "raw"): "only qcow2 images of version 3",
        (path, tmp_path / "new", "--compat", "2"): "only qcow2 images of version 3",
    }.items():
        assert main(["image", "convert", "--bitmaps", *map(str, words)]) == 1
        assert told in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_commit_is_recorded_below_and_not_above(tmp_path: Path) -> None:
    """The overlay reads as before, so that its bitmap has nothing to record."""
    for twin, commit in {
        "theirs": ["qemu-img", "commit", "-q"],
        "ours": ["nbdserve", "image", "commit"],
    }.items():
        folder = tmp_path / twin
        folder.mkdir()
        base, top = folder / "base.qcow2", folder / "top.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", base, "16M")
        run(
            "qemu-img", "create", "-q", "-f", "qcow2",
            "-b", base, "-F", "qcow2", top,
        )  # fmt: skip
        run("qemu-io", "-c", "write 5M 70k", top)
        for path in (base, top):
            run("qemu-img", "bitmap", "--add", path, "b")
        if twin == "ours":
            assert main([*commit[1:], str(top)]) == 0
        else:
            run(*commit, top)
        assert seen_by_qemu(top, "b", folder) == []
        assert seen_by_qemu(base, "b", folder) == [(5 * MIB, 2 * 65536)]
