"""`nbdserve image convert`, `compare` and `measure`, held against qemu-img."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nbdserve.cli.main import main
from nbdserve.formats.convert import Target, convert_to_file
from nbdserve.formats.open import open_image
from tests.cli.servers import serving
from tests.helpers.tools import run

MIB = 1 << 20
SIZE = 6 * MIB + 512


def fill(path: Path, *, seed: int, size: int = SIZE) -> Path:
    """Make a raw disk of holes, zeros, random and repetitive bytes."""
    generator = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        for start in range(0, size - 64 * 1024, 128 * 1024):
            file.seek(start + generator.randrange(3) * 4096)
            kind = generator.randrange(4)
            if kind == 1:
                file.write(generator.randbytes(generator.randrange(1, 60000)))
            elif kind == 2:
                file.write(b"nbd" * generator.randrange(1, 20000))
            elif kind == 3:
                file.write(bytes(4096) + b"x" + bytes(9000))
        file.seek(size - 1)
        file.write(b"\xff")
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A raw disk with something of everything."""
    return fill(tmp_path / "disk.raw", seed=1)


def same(first: Path, second: Path) -> None:
    """Compare two disks by qemu-img and by us."""
    run("qemu-img", "compare", first, second)
    assert main(["image", "compare", str(first), str(second)]) == 0


def sound(path: Path) -> None:
    """Check a qcow2 image by qemu-img and by us: neither corruption nor leak."""
    run("qemu-img", "check", path)
    assert main(["image", "check", str(path)]) == 0


# convert


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--compress zlib",
        "--compress zstd",
        "--compat 2 --compress zlib",
        "--cluster-size 512",
        "--cluster-size 512 --compress zlib",
        "--cluster-size 2M --compress zstd",
        "--cluster-size 4K --compress zlib --refcount-bits 1",
        "--compress zlib --refcount-bits 2",
        "--compress zstd --refcount-bits 64",
        "--preallocation falloc",
        "--extended-l2",
        "--extended-l2 --cluster-size 16K --compress zstd",
        "--extended-l2 --preallocation metadata",
    ],
)
def test_qcow2_holds_what_the_source_holds(
    options: str, disk: Path, tmp_path: Path
) -> None:
    copy, back = tmp_path / "copy.qcow2", tmp_path / "back.raw"
    assert main(["image", "convert", str(disk), str(copy), *options.split()]) == 0
    sound(copy)
    same(disk, copy)
    # ... and the way back, by both
    assert main(["image", "convert", str(copy), str(back), "--format", "raw"]) == 0
    same(disk, back)
    run("qemu-img", "convert", "-O", "raw", copy, back)
    assert back.read_bytes()[:SIZE] == disk.read_bytes()


def test_a_shared_refcount_above_255_is_counted(tmp_path: Path) -> None:
    source, copy = tmp_path / "disk.raw", tmp_path / "copy.qcow2"
    with source.open("wb") as file:
        for number in range(40 * 16):
            file.write(number.to_bytes(4, "big") * 1024)
    words = ["image", "convert", str(source), str(copy), "--compress", "zstd"]
    assert main([*words, "--cluster-size", "4K"]) == 0
    assert copy.stat().st_size < 200_000
    sound(copy)
    same(source, copy)


@pytest.mark.parametrize("image_format", ["raw", "qcow"])
def test_other_formats_are_as_sparse_as_the_source(
    image_format: str, disk: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    words = ["image", "convert", str(disk), str(copy), "--format", image_format]
    assert main(words) == 0
    same(disk, copy)
    assert copy.stat().st_blocks < disk.stat().st_blocks + 128


@pytest.mark.parametrize("written_by", ["qcow", "qcow2", "compressed", "extended"])
def test_what_qemu_wrote_is_read(written_by: str, disk: Path, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy.qcow2"
    options = {
        "compressed": ["-c", "-O", "qcow2"],
        "extended": ["-O", "qcow2", "-o", "extended_l2=on"],
    }.get(written_by, ["-O", written_by])
    run("qemu-img", "convert", *options, disk, source)
    assert main(["image", "convert", str(source), str(copy)]) == 0
    sound(copy)
    same(disk, copy)


@pytest.mark.parametrize("base_format", ["raw", "qcow", "qcow2"])
@pytest.mark.parametrize(
    "options",
    [
        "--format qcow2",
        "--format qcow2 --compat 2",
        "--format qcow2 --compress zlib --cluster-size 4K",
        "--format qcow2 --extended-l2",
        "--format qcow",
    ],
)
def test_over_a_backing_file_only_the_difference_is_stored(
    base_format: str, options: str, disk: Path, tmp_path: Path
) -> None:
    base, changed, copy = (tmp_path / name for name in ("base", "changed", "copy"))
    run("qemu-img", "convert", "-O", base_format, disk, base)
    changed.write_bytes(disk.read_bytes())
    with changed.open("r+b") as file:
        file.truncate(SIZE + MIB)
        for offset, data in ((MIB, b"new" * 999), (2 * MIB, bytes(300_000))):
            file.seek(offset)
            file.write(data)
    backing = ["--backing", "base", "--backing-format", base_format]
    words = ["image", "convert", str(changed), str(copy), *options.split(), *backing]
    assert main(words) == 0
    same(changed, copy)
    assert copy.stat().st_blocks * 512 < MIB
    info = json.loads(run("qemu-img", "info", "--output=json", copy))
    assert info["backing-filename"] == "base"
    if info["format"] == "qcow2":
        sound(copy)


def test_a_longer_backing_file_does_not_show_through(
    disk: Path, tmp_path: Path
) -> None:
    fill(tmp_path / "base.raw", seed=2, size=2 * SIZE)
    words = ["--backing", "base.raw", "--backing-format", "raw"]
    copy = tmp_path / "copy.qcow2"
    assert main(["image", "convert", str(disk), str(copy), *words]) == 0
    same(disk, copy)


def test_nothing_is_overwritten(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    copy.write_text("precious")
    assert main(["image", "convert", str(disk), str(copy)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert copy.read_text() == "precious"


@pytest.mark.parametrize(
    "options",
    [
        "--format raw --compress zlib",
        "--compress zstd --compat 2",
        "--compress zlib --preallocation falloc",
        "--backing base.raw",
        "--cluster-size 1000",
        "--extended-l2 --cluster-size 8K",
        "--extended-l2 --format raw",
    ],
)
def test_impossible_choices_leave_nothing(
    options: str, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(os.listdir(tmp_path))
    words = ["image", "convert", str(disk), str(tmp_path / "copy"), *options.split()]
    assert main(words) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("image_format", ["raw", "qcow", "qcow2"])
async def test_a_failure_on_the_way_leaves_nothing(
    image_format: str, disk: Path, tmp_path: Path
) -> None:
    def stop(done: int) -> None:
        raise OSError(28, "No space left on device")

    async with open_image(disk, format="raw", read_only=True) as source:
        with pytest.raises(OSError, match="No space left"):
            await convert_to_file(
                source,
                tmp_path / "copy",
                Target(format=image_format),
                progress=stop,
            )
    assert os.listdir(tmp_path) == ["disk.raw"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_an_interruption_leaves_nothing(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    socket = tmp_path / "s"
    # each read takes a second: it is certainly under way when the signal comes
    slow = ["nbdkit", "-f", "-U", str(socket), "--filter=delay", "pattern", "64M"]
    server = subprocess.Popen([*slow, "rdelay=1"], stderr=subprocess.DEVNULL)
    folder = tmp_path / "out"
    folder.mkdir()
    try:
        wait_until(socket.exists)
        uri = f"nbd+unix:///?socket={socket}"
        words = ["image", "convert", uri, str(folder / "copy.qcow2")]
        process = subprocess.Popen(
            [sys.executable, "-m", "nbdserve", *words],
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: bool(os.listdir(folder)))
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    finally:
        server.terminate()
        server.wait(30)
    assert process.returncode == code
    assert errors == "nbdserve: interrupted: nothing was written\n"
    assert os.listdir(folder) == []


def wait_until(condition: Any) -> None:
    """Wait until it is true, and no longer than a test may take."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_to_and_from_an_export(
    image_format: str, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = fill(tmp_path / "old", seed=3, size=8 * MIB)
    served = tmp_path / "served"
    run("qemu-img", "convert", "-O", image_format, target, served)
    expected = disk.read_bytes() + target.read_bytes()[SIZE:]
    options = ["--format", image_format, "--unix", "s"]
    with serving("served", *options, cwd=tmp_path) as server:
        uri, back = server.uris[0], tmp_path / "back.qcow2"
        assert main(["image", "convert", str(disk), uri]) == 0
        assert main(["image", "convert", uri, str(back), "--compress", "zlib"]) == 0
        assert main(["image", "compare", str(back), uri]) == 0
        capsys.readouterr()
        # the image itself is in use, for reading as well
        for command in ("convert", "compare"):
            words = ["image", command, str(served), str(tmp_path / "none")]
            assert main(words) in {1, 2}
            assert "in use by another process" in capsys.readouterr().err
    assert (
        main(["image", "convert", str(back), str(tmp_path / "r"), "--format=raw"]) == 0
    )
    # whole blocks of 4 KiB are written: zeros up to the end of the last one
    end = -(-SIZE // 4096) * 4096
    found = (tmp_path / "r").read_bytes()
    assert found[:SIZE] == expected[:SIZE]
    assert found[SIZE:end] == bytes(end - SIZE)
    assert found[end:] == expected[end:]


def test_what_a_killed_server_had_answered_is_copied_too(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    top, copy = tmp_path / "top.qcow2", tmp_path / "copy.raw"
    words = ["-f", "qcow2", "-b", disk.name, "-F", "raw"]
    run("qemu-img", "create", "-q", *words, top)
    with serving("top.qcow2", "--unix", "s", cwd=tmp_path) as server:
        # it has to copy from the backing file, so it is not linked at once
        command = ["-c", "write -P 0x77 1M 512", "-c", f"sigraise {signal.SIGKILL}"]
        uri = server.uris[0]
        run("qemu-io", "-t", "writeback", "-f", "raw", *command, uri, expect=[-9])
        server.end(signal.SIGKILL)
    assert list(tmp_path.glob("*.redo"))
    words = ["image", "convert", str(top), str(copy), "--format", "raw"]
    assert main(words) == 0
    expected = bytearray(disk.read_bytes())
    expected[MIB : MIB + 512] = b"\x77" * 512
    assert copy.read_bytes() == expected


def test_a_snapshot_is_copied(disk: Path, tmp_path: Path) -> None:
    image, copy = tmp_path / "disk.qcow2", tmp_path / "copy.qcow2"
    run("qemu-img", "convert", "-O", "qcow2", disk, image)
    run("qemu-img", "snapshot", "-c", "before", image)
    run("qemu-io", "-c", "write -P 1 0 3M", image)
    words = ["image", "convert", str(image), str(copy), "--snapshot", "before"]
    assert main(words) == 0
    same(disk, copy)


def test_an_export_that_is_too_small_stays_as_it_is(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving("d.qcow2", "--create", "1M", "--unix", "s", cwd=tmp_path) as server:
        assert main(["image", "convert", str(disk), server.uris[0]]) == 1
        assert "the destination has 1048576 bytes" in capsys.readouterr().err
        words = ["image", "convert", str(disk), server.uris[0], "--compress", "zlib"]
        assert main(words) == 1
        assert "--compress is for new images" in capsys.readouterr().err


# compare


def difference(first: Path, second: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """Return the first offset in which we say that two disks differ."""
    assert main(["image", "compare", str(first), str(second), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["identical"] is False
    offset: int = found["offset"]
    return offset


@pytest.mark.parametrize("offset", [0, 4095, 65536, 3 * MIB + 77, SIZE - 1])
def test_compare_names_the_first_byte(
    offset: int, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed, image = tmp_path / "changed.raw", tmp_path / "changed.qcow2"
    data = bytearray(disk.read_bytes())
    data[offset] ^= 0x55
    data[-1] ^= 0x55 if offset < SIZE - 1 else 0
    changed.write_bytes(data)
    run("qemu-img", "convert", "-O", "qcow2", changed, image)
    assert difference(disk, image, capsys) == offset
    theirs = run("qemu-img", "compare", disk, image, expect=[1])
    assert f"offset {offset // 512 * 512}!" in theirs
    assert main(["image", "compare", str(image), str(disk)]) == 1
    assert f"Content mismatch at offset {offset}!" in capsys.readouterr().out


def test_a_longer_disk_is_the_same_if_zeros_follow(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = tmp_path / "longer.raw"
    longer.write_bytes(disk.read_bytes())
    os.truncate(longer, 1 << 36)
    assert main(["image", "compare", str(disk), str(longer)]) == 0
    assert "size mismatch" in capsys.readouterr().out
    with longer.open("r+b") as file:
        file.seek(1 << 35)
        file.write(b"x")
    assert difference(longer, disk, capsys) == 1 << 35


@pytest.mark.parametrize("words", ["nothing", "--wrong", ""])
def test_compare_fails_with_2(
    words: str, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["image", "compare", str(disk), *words.split()]) == 2
    assert capsys.readouterr().err.startswith("nbdserve: ")


# measure


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("", ""),
        ("--format raw", "-O raw"),
        ("--cluster-size 4K", "-o cluster_size=4k"),
        (
            "--cluster-size 512 --refcount-bits 64",
            "-o cluster_size=512,refcount_bits=64",
        ),
        ("--cluster-size 2M --compat 2", "-o cluster_size=2M,compat=0.10"),
        ("--preallocation falloc", "-o preallocation=falloc"),
        ("--extended-l2", "-o extended_l2=on"),
        (
            "--extended-l2 --cluster-size 16K",
            "-o extended_l2=on,cluster_size=16k",
        ),
    ],
)
def test_measure_says_what_qemu_img_says(
    ours: str, theirs: str, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for what in ([str(disk)], ["--size", "1"], ["--size", "3T"]):
        if what[-1] == "3T" and "512" in ours:
            continue  # too many for such clusters
        output = "qcow2" if "-O" not in theirs else "raw"
        words = [word for word in theirs.split() if word not in {"-O", "raw"}]
        said = run("qemu-img", "measure", "--output=json", "-O", output, *words, *what)
        assert main(["image", "measure", *what, *ours.split(), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == json.loads(said)


def test_measured_is_enough(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.qcow2"
    assert main(["image", "measure", str(disk), "--json"]) == 0
    required = json.loads(capsys.readouterr().out)["required"]
    assert main(["image", "convert", str(disk), str(copy)]) == 0
    assert copy.stat().st_size <= required


def test_measure_wants_one_of_both(
    disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["image", "measure"]) == 1
    assert main(["image", "measure", str(disk), "--size", "1G"]) == 1
    assert "either SRC or --size" in capsys.readouterr().err


async def test_reading_a_compressed_image_from_a_thread_of_each_core(
    tmp_path: Path,
) -> None:
    """Many conversions side by side end as they should: nothing is shared."""
    disks = [fill(tmp_path / f"{seed}.raw", seed=seed, size=MIB) for seed in range(4)]

    async def convert(disk: Path) -> None:
        async with open_image(disk, format="raw", read_only=True) as source:
            await convert_to_file(
                source,
                disk.with_suffix(".qcow2"),
                Target(compression="zstd"),
                progress=lambda done: None,
            )

    await asyncio.gather(*map(convert, disks))
    for disk in disks:
        run("qemu-img", "compare", disk, disk.with_suffix(".qcow2"))
