"""External data files: the same bytes as with qemu, opened only where that is allowed."""

import asyncio
import json
import os
import random
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from nbdserve.cli.main import main
from nbdserve.errors import (
    ConfigError,
    DataFileError,
    ImageCorruptError,
    ImageError,
    ImageInUseError,
)
from nbdserve.formats.create import create_image
from nbdserve.formats.open import open_image
from nbdserve.formats.qcow2.extensions import EXTENSION_DATA_FILE
from nbdserve.formats.qcow2.image import Qcow2Image
from nbdserve.storage.file import FileStorage
from tests.helpers.encrypted import patiently
from tests.helpers.tools import run

KIB = 1 << 10
MIB = 1 << 20
#: The last cluster is cut, even in 4 KiB ones.
SIZE = 3 * MIB + 5 * 512


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """qemu 7.2 counts a relative name from where it runs, and we from the image."""
    monkeypatch.chdir(tmp_path)


def image(*words: object) -> int:
    """Run `nbdserve image` and return its exit code."""
    return main(["image", *map(str, words)])


def made(folder: Path, options: str = "", *, size: int = SIZE) -> Path:
    """Let qemu-img make an image with a data file, whose name it takes from its folder."""
    more = f",{options}" if options else ""
    run("env", "-C", folder, "qemu-img", "create", "-q", "-f", "qcow2",
        "-o", f"data_file=disk.raw{more}", "disk.qcow2", str(size))  # fmt: skip
    return folder / "disk.qcow2"


def compared(path: Path, expected: bytes | bytearray) -> None:
    """Let qemu-img say that an image is sound and shows these bytes."""
    mirror = path.with_suffix(".mirror")
    mirror.write_bytes(expected)
    run("qemu-img", "check", path)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, mirror)


async def scribble(device: Any, mirror: bytearray, chance: random.Random) -> None:
    """Write, zero, trim and flush at random, and keep the mirror in step."""
    block = device.minimum_block
    for _ in range(60):
        offset = chance.randrange(len(mirror)) // block * block
        length = chance.choice((1, 512, 4096, 70_000, 300_000))
        length = -(-length // block) * block
        length = min(length, len(mirror) - offset)
        end = offset + length
        which = chance.random()
        if which < 0.6:
            data = chance.randbytes(length)
            await device.write(offset, data)
            mirror[offset:end] = data
        elif which < 0.8:
            unmap = chance.random() < 0.6
            await device.write_zeroes(offset, length, may_unmap=unmap)
            mirror[offset:end] = bytes(length)
        elif which < 0.9:
            await device.trim(offset, length)
            size = device._parts.geometry.grain
            first = -(-offset // size) * size
            last = end if end == len(mirror) else end // size * size
            if first < last:
                mirror[first:last] = bytes(last - first)
        else:
            await device.flush()
    assert await device.read(0, len(mirror)) == mirror


@pytest.mark.parametrize("redo", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        "",
        "cluster_size=4k",
        "data_file_raw=on",
        "preallocation=metadata",
        "extended_l2=on",
        "extended_l2=on,data_file_raw=on",
    ],
)
async def test_what_we_write_qemu_reads(
    tmp_path: Path, options: str, redo: bool
) -> None:
    path, data = made(tmp_path, options), tmp_path / "disk.raw"
    mirror = bytearray(SIZE)
    chance = random.Random(options)
    for _ in range(2):
        async with open_image(
            path, allow_data_file=[data], state_dir=tmp_path if redo else None
        ) as device:
            await scribble(device, mirror, chance)
        compared(path, mirror)
        if "raw" in options:
            assert data.read_bytes()[:SIZE] == mirror
    run("qemu-io", "-f", "qcow2", "-c", "write -P 9 100k 1M", "-c", "discard 2M 512k",
        "-c", "write -zu 64k 64k", path)  # fmt: skip
    mirror[100 * KIB : 1124 * KIB] = b"\x09" * MIB
    mirror[2 * MIB : 2 * MIB + 512 * KIB] = bytes(512 * KIB)
    mirror[64 * KIB : 128 * KIB] = bytes(64 * KIB)
    async with open_image(path, read_only=True, allow_data_file=[tmp_path]) as device:
        assert await device.read(0, SIZE) == mirror


async def test_old_bytes_of_the_file_never_show(tmp_path: Path) -> None:
    """What lies where nothing is mapped is not the guest's."""
    path, data = made(tmp_path), tmp_path / "disk.raw"
    data.write_bytes(b"\xee" * SIZE)
    async with open_image(path, allow_data_file=[data]) as device:
        assert await device.read(0, SIZE) == bytes(SIZE)
        await device.write(70_000, b"x" * 10)
        assert await device.read(65536, 65536) == (
            bytes(70_000 - 65536) + b"x" * 10 + bytes(131_072 - 70_010)
        )
        await device.write(SIZE - 700, b"y" * 10)
    expected = bytearray(SIZE)
    expected[70_000:70_010] = b"x" * 10
    expected[SIZE - 700 : SIZE - 690] = b"y" * 10
    compared(path, expected)
    assert data.stat().st_size == SIZE


async def test_discarded_clusters_are_given_back(tmp_path: Path) -> None:
    path, data = made(tmp_path), tmp_path / "disk.raw"
    async with open_image(path, allow_data_file=[data]) as device:
        await device.write(0, b"\x11" * 2 * MIB)
        await device.flush()
        full = data.stat().st_blocks
        await device.trim(0, 2 * MIB)
        await device.write(64 * KIB, b"\x22" * 100)
        await device.flush()
    assert data.stat().st_blocks < full // 4
    expected = bytearray(SIZE)
    expected[64 * KIB : 64 * KIB + 100] = b"\x22" * 100
    compared(path, expected)


@pytest.mark.parametrize("raw", [False, True])
def test_over_and_under_other_images(tmp_path: Path, raw: bool) -> None:
    base, overlay = made(tmp_path, "data_file_raw=on" if raw else ""), tmp_path / "top"
    run("qemu-io", "-f", "qcow2", "-c", "write -P 3 0 1M", base)
    run("env", "-C", tmp_path, "qemu-img", "create", "-q", "-f", "qcow2",
        "-b", "disk.qcow2", "-F", "qcow2", "-o", "data_file=top.raw", "top")  # fmt: skip
    allowed = [str(tmp_path / "disk.raw"), str(tmp_path / "top.raw")]

    async def change() -> None:
        async with open_image(overlay, allow_data_file=allowed) as device:
            await device.write(512 * KIB + 7, b"top")
            await device.write_zeroes(128 * KIB, 64 * KIB)

    asyncio.run(change())
    expected = bytearray(b"\x03" * MIB + bytes(SIZE - MIB))
    expected[512 * KIB + 7 : 512 * KIB + 10] = b"top"
    expected[128 * KIB : 192 * KIB] = bytes(64 * KIB)
    compared(overlay, expected)
    options = [word for each in allowed for word in ("--allow-data-file", each)]
    assert image("commit", overlay, *options) == 0
    compared(base, expected)
    compared(overlay, expected)
    assert image("rebase", overlay, "--backing", "", *options) == 0
    base.unlink()
    compared(overlay, expected)


async def test_locks_are_those_of_qemu(tmp_path: Path) -> None:
    path, data = made(tmp_path), tmp_path / "disk.raw"
    async with open_image(path, allow_data_file=[data]):
        out = run("qemu-img", "create", "-q", "-f", "raw", data, "1M", expect=[1])
        assert not out
        run("qemu-io", "-f", "raw", "-c", "write 0 512", data, expect=[1])
        with pytest.raises(ImageInUseError):
            FileStorage(data)
    storage = FileStorage(data)
    try:
        with pytest.raises(ImageInUseError, match=r"disk\.raw"):
            await open_image(path, allow_data_file=[data])
    finally:
        await storage.close()


# -- names


def renamed(path: Path, name: bytes | None) -> None:
    """Put another name into the extension, or leave the extension out."""
    content = bytearray(path.read_bytes())
    at = content.index(struct.pack(">II", EXTENSION_DATA_FILE, len("disk.raw")))
    if name is None:
        content[at : at + 4] = b"\x12\x34\x56\x78"
    else:
        old = content[at + 16 : 4096]
        body = struct.pack(">II", EXTENSION_DATA_FILE, len(name)) + name
        body += bytes(-len(body) % 8)
        content[at : at + len(body) + len(old)] = body + old
    path.write_bytes(content)


async def test_beside_the_image_is_not_allowed_by_itself(tmp_path: Path) -> None:
    path, data = made(tmp_path), tmp_path / "disk.raw"
    for read_only in (False, True):
        with pytest.raises(DataFileError) as caught:
            await open_image(path, read_only=read_only)
        assert str(caught.value) == (
            f"{path}: keeps its data in {data}, which is opened only where that is"
            f" allowed: add --allow-data-file {data}"
        )
    (tmp_path / "other").mkdir()
    with pytest.raises(DataFileError, match="--allow-data-file"):
        await open_image(path, allow_data_file=[tmp_path / "other", "/etc"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "does not record the name"),
        (b"", "does not record the name"),
        (b"nbd://localhost/x", "not a plain file name"),
        (b'json:{"driver":"raw"}', "not a plain file name"),
        (b"a\0b", "NUL byte"),
        (b"missing", "No such file"),
        (b"n" * 255, "No such file"),
        (b"./" * 2100 + b"n" * 300, "File name too long"),
        (b"new\nline", r"new\\nline"),
        (b"loop", "form a loop"),
        (b"disk.qcow2", "is the image itself"),
        (b"link", "is the image itself"),
        (b"hard", "is the image itself"),
        (b"outside", "keeps its data in /etc/passwd"),
        (b"/etc/passwd", "keeps its data in /etc/passwd"),
        (b"../../etc/passwd", "passwd"),
        (b"fifo", "is a FIFO"),
        (b"folder", "is"),
    ],
)
async def test_names_that_lead_astray(
    tmp_path: Path, name: bytes | None, message: str
) -> None:
    path = made(tmp_path)
    renamed(path, name)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to("disk.qcow2")
    (tmp_path / "outside").symlink_to("/etc/passwd")
    os.link(path, tmp_path / "hard")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    before = path.read_bytes()
    with pytest.raises(DataFileError, match=message):
        await open_image(path, allow_data_file=[tmp_path])
    assert path.read_bytes() == before


async def test_a_backing_file_can_not_be_the_data_file_too(tmp_path: Path) -> None:
    path = made(tmp_path)
    run("qemu-img", "rebase", "-u", "-b", "disk.raw", "-F", "raw", path)
    with pytest.raises(DataFileError, match="another file of its chain"):
        await open_image(path, allow_data_file=[tmp_path])


async def test_a_link_to_an_allowed_file_is_followed(tmp_path: Path) -> None:
    path = made(tmp_path)
    place = tmp_path / "elsewhere"
    place.mkdir()
    (tmp_path / "disk.raw").rename(place / "data")
    (tmp_path / "disk.raw").symlink_to("elsewhere/data")
    async with open_image(path, allow_data_file=[place]) as device:
        await device.write(0, b"there")
    assert (place / "data").read_bytes()[:5] == b"there"


# -- metadata that contradict themselves


def l2_words(path: Path) -> tuple[int, int]:
    """Return the host offset of the first L2 table, and its first word."""
    content = path.read_bytes()
    l1 = int.from_bytes(content[40:48], "big")
    table = int.from_bytes(content[l1 : l1 + 8], "big") & 0x00FF_FFFF_FFFF_FE00
    return table, int.from_bytes(content[table : table + 8], "big")


@pytest.mark.parametrize(
    ("index", "word"),
    [
        (1, 1 << 63),
        (1, 1 << 63 | 3 << 16),
        (0, 1 << 63 | 1 << 16),
        (1, 1 << 62 | 5 << 16),
        (1, 1 << 63 | 2 << 16 | 1),
    ],
)
def test_an_entry_names_its_own_place_or_none(
    tmp_path: Path, index: int, word: int
) -> None:
    path = made(tmp_path, "preallocation=metadata")
    table, _ = l2_words(path)
    with path.open("r+b") as file:
        file.seek(table + 8 * index)
        file.write(word.to_bytes(8, "big"))

    async def look() -> None:
        async with open_image(path, allow_data_file=[tmp_path]) as device:
            await device.write(4 << 16, b"fine")
            with pytest.raises(ImageCorruptError, match="is not valid"):
                await device.read(index << 16, 512)
            for work in (
                device.write(index << 16, bytes(512)),
                device.write_zeroes(index << 16, 65536),
            ):
                with pytest.raises(ImageCorruptError):
                    await work

    asyncio.run(look())
    assert image("check", path) == 2
    assert image("check", path, "--repair", "all", "--force") == 0
    assert image("check", path) == 0


async def test_the_first_cluster_needs_no_offset(tmp_path: Path) -> None:
    path = made(tmp_path)
    async with open_image(path, allow_data_file=[tmp_path]) as device:
        await device.write(0, b"first")
    table, _ = l2_words(path)
    assert l2_words(path) == (table, 1 << 63)
    async with open_image(path, allow_data_file=[tmp_path]) as device:
        assert await device.read(0, 5) == b"first"
        await device.write(5, b" second")
        assert (await device.block_status(0, 1))[0].offset == 0
    run("qemu-io", "-f", "qcow2", "-c", "read -P 0 12 100", path)
    compared(path, b"first second".ljust(SIZE, b"\0"))


def test_a_raw_file_and_a_backing_file_exclude_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made(tmp_path, "data_file_raw=on")
    (tmp_path / "base.raw").write_bytes(bytes(SIZE))
    words = ["--backing", "base.raw", "--backing-format", "raw"]
    assert image("rebase", path, *words, "--unsafe") == 1
    assert "can't have a backing" in capsys.readouterr().err


# -- the commands


@pytest.mark.parametrize("raw", [False, True])
def test_create_is_qemus(tmp_path: Path, raw: bool) -> None:
    (tmp_path / "theirs").mkdir()
    path, theirs = tmp_path / "disk.qcow2", tmp_path / "theirs" / "disk.qcow2"
    more = ["--data-file-raw"] if raw else []
    assert image("create", path, SIZE, "--data-file", "disk.raw", *more) == 0
    made(tmp_path / "theirs", "data_file_raw=on" if raw else "")
    assert path.read_bytes()[:4096] == theirs.read_bytes()[:4096]
    assert (tmp_path / "disk.raw").stat().st_size == SIZE
    run("qemu-img", "check", path)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 1000k 1M", path)
    run("qemu-img", "check", path)
    assert (tmp_path / "disk.raw").read_bytes()[1000 * KIB] == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compat": 2}, "needs compat 3"),
        ({"format": "raw"}, "qcow2 only"),
        ({"data_file": "nbd:x"}, "URI"),
        ({"data_file": ""}, "empty"),
        ({"data_file": "there"}, "exists already"),
        ({"data_file": "disk"}, "its own data file"),
        (
            {"backing": "there", "backing_format": "raw", "data_file_raw": True},
            "can't be a backing file",
        ),
        ({"data_file": None, "data_file_raw": True}, "needs a data file"),
        ({"data_file": "no/such"}, "No such file"),
    ],
)
def test_impossible_choices_leave_nothing(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "there").write_bytes(b"precious")
    with pytest.raises(ConfigError, match=message):
        create_image(tmp_path / "disk", SIZE, **({"data_file": "data"} | options))
    assert os.listdir(tmp_path) == ["there"]
    assert (tmp_path / "there").read_bytes() == b"precious"


@pytest.mark.parametrize("raw", [False, True])
def test_convert_there_and_back(tmp_path: Path, raw: bool) -> None:
    content = random.Random(7).randbytes(MIB) + bytes(MIB) + b"z" * 70_000
    content = content.ljust(SIZE, b"\0")
    source, path = tmp_path / "source.raw", tmp_path / "disk.qcow2"
    source.write_bytes(content)
    more = ["--data-file-raw"] if raw else []
    assert image("convert", source, path, "--data-file", "disk.raw", *more) == 0
    compared(path, content)
    data = tmp_path / "disk.raw"
    assert not raw or data.read_bytes() == content
    assert data.stat().st_size == SIZE
    assert data.stat().st_blocks * 512 < 2 * MIB
    back = tmp_path / "back.raw"
    words = ["--format", "raw", "--allow-data-file", tmp_path]
    assert image("convert", path, back, *words) == 0
    assert back.read_bytes() == content
    assert image("compare", path, back, "--allow-data-file", tmp_path) == 0
    # nothing is left of one that fails
    assert image("convert", source, path, "--data-file", "new.raw") == 1
    words = ["--data-file", "new.raw", "--compress", "zlib"]
    assert image("convert", source, tmp_path / "x", *words) == 1
    assert not (tmp_path / "new.raw").exists()


@pytest.mark.parametrize("options", ["", "data_file_raw=on"])
def test_resize_is_qemus(tmp_path: Path, options: str) -> None:
    path, data = made(tmp_path, options), tmp_path / "disk.raw"
    run("qemu-io", "-f", "qcow2", "-c", "write -P 5 3M 2k", path)
    allowed = ["--allow-data-file", data]
    assert image("resize", path, "9M", *allowed) == 0
    assert data.stat().st_size == 9 * MIB
    expected = (bytes(3 * MIB) + b"\x05" * 2048).ljust(9 * MIB, b"\0")
    compared(path, expected)
    if options:
        shown = json.loads(run("qemu-img", "map", "--output=json", path))
        assert all(each["present"] and "offset" in each for each in shown)
        assert data.read_bytes() == expected
    assert image("resize", path, "1M", "--shrink", *allowed) == 0
    assert data.stat().st_size == MIB
    compared(path, bytes(MIB))
    # what was cut off does not come back
    assert image("resize", path, SIZE, *allowed) == 0
    compared(path, bytes(SIZE))


def test_info_and_check_need_no_data_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made(tmp_path, "data_file_raw=on")
    theirs = json.loads(run("qemu-img", "info", "--output=json", path))
    (tmp_path / "disk.raw").unlink()
    assert image("info", path, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["format-specific"] == theirs["format-specific"]
    assert image("check", path) == 0


@pytest.mark.parametrize("options", ["", "data_file_raw=on"])
def test_map_is_qemus(
    tmp_path: Path, options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made(tmp_path, options)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 5 1M 1M", "-c", "write -z 2M 64k",
        "-c", "write -zu 1M 128k", path)  # fmt: skip
    theirs = json.loads(run("qemu-img", "map", "--output=json", path))

    async def look(entry: dict[str, Any]) -> None:
        async with open_image(
            path, read_only=True, allow_data_file=[tmp_path]
        ) as device:
            for extent in await device.block_status(entry["start"], entry["length"]):
                assert extent.data == entry["data"]
                assert extent.present == entry["present"]
                # we look for holes in the data file as well
                assert extent.zero or not entry["zero"]

    for entry in theirs:
        asyncio.run(look(entry))
    assert image("map", path, "--allow-data-file", tmp_path) == 0
    assert f"0x120000        0xe0000         0x120000        {tmp_path}/disk.raw" in (
        capsys.readouterr().out
    )


def test_amend_and_snapshot_say_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made(tmp_path)
    allowed = ["--allow-data-file", str(tmp_path)]
    for words, message in (
        (["amend", path, "--compat", "2", *allowed], "external data file"),
        (["amend", path, "--data-file-raw", "on", *allowed], "new images"),
        (["snapshot", "create", path, "x", *allowed], "data in another file"),
    ):
        assert image(*words) == 1
        assert message in capsys.readouterr().err
    assert image("snapshot", "list", path, *allowed) == 0


def test_amend_changes_name_and_raw_bit(tmp_path: Path) -> None:
    path = made(tmp_path, "data_file_raw=on")
    allowed = ["--allow-data-file", str(tmp_path)]
    assert image("amend", path, "--data-file-raw", "off", *allowed) == 0
    (tmp_path / "disk.raw").rename(tmp_path / "another.raw")
    assert image("amend", path, "--data-file", "another.raw", *allowed) == 0
    shown = json.loads(run("qemu-img", "info", "--output=json", path))
    specific = shown["format-specific"]["data"]
    assert specific["data-file"] == "another.raw"
    assert specific["data-file-raw"] is False
    run("qemu-io", "-f", "qcow2", "-c", "write -P 5 1M 1M", path)
    run("qemu-img", "check", path)


async def test_snapshots_beside_a_data_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    run("qemu-img", "snapshot", "-c", "x", path)
    content = bytearray(path.read_bytes())
    content[79] |= 4
    body = struct.pack(">II", EXTENSION_DATA_FILE, 4) + b"data" + bytes(4)
    content[112:4096] = (body + content[112:])[: 4096 - 112]
    path.write_bytes(content)
    (tmp_path / "data").write_bytes(bytes(MIB))
    with pytest.raises(ImageError, match="there can't be both"):
        await open_image(path, allow_data_file=[tmp_path])


async def test_bitmaps_are_kept_beside_a_raw_data_file(tmp_path: Path) -> None:
    path = made(tmp_path, "data_file_raw=on")
    run("qemu-img", "bitmap", "--add", "-g", "64k", path, "since")
    async with open_image(path, allow_data_file=[tmp_path]) as device:
        await device.write(MIB, b"changed")
    assert path.read_bytes()[95] == 3  # both autoclear bits
    run("qemu-img", "check", path)
    async with open_image(path, allow_data_file=[tmp_path]) as device:
        assert isinstance(device, Qcow2Image)
        bitmap = await device.dirty_bitmap("since")
        assert list(bitmap.dirty()) == [(MIB, 64 * KIB)]


async def test_there_is_nothing_to_compact(tmp_path: Path) -> None:
    path = made(tmp_path)
    async with open_image(path, allow_data_file=[tmp_path]) as device:
        assert isinstance(device, Qcow2Image)
        with pytest.raises(ConfigError, match="each cluster has its place"):
            await device.compact()


async def test_a_killed_servers_links_into_the_data_file_are_made(
    tmp_path: Path,
) -> None:
    """The redo log covers first writes, which wait for a barrier."""
    path, state = made(tmp_path), tmp_path / "state"
    state.mkdir()
    program = f"""
import asyncio, os, nbdserve
async def main():
    image = await nbdserve.open_image(
        {str(path)!r}, allow_data_file=[{str(tmp_path)!r}], state_dir={str(state)!r})
    await image.write(70_000, b"acknowledged")
    os.kill(os.getpid(), 9)
asyncio.run(main())
"""
    run(sys.executable, "-c", program, expect=[-9])
    async with open_image(path, allow_data_file=[tmp_path], state_dir=state) as device:
        assert any("linked 1" in note for note in device.notes)
        assert await device.read(70_000, 12) == b"acknowledged"
    run("qemu-img", "check", path)
    run("qemu-io", "-f", "qcow2", "-c", "read -P 0 64k 1k", path)


@pytest.mark.parametrize("relative", [False, True])
def test_rename_the_data_file(tmp_path: Path, relative: bool) -> None:
    path, new = made(tmp_path), tmp_path / "sub" / "new.raw"
    new.parent.mkdir()
    if not relative:
        words = ["--data-file", tmp_path / "disk.raw"]
        assert image("amend", path, *words) == 0
    run("qemu-io", "-f", "qcow2", "-c", "write -P 5 0 1M", path)
    assert image("rename", "disk.raw", new, "--referrer", path) == 0
    shown = json.loads(run("qemu-img", "info", "--output=json", path))
    name = shown["format-specific"]["data"]["data-file"]
    assert name == ("sub/new.raw" if relative else str(new))
    assert not (tmp_path / "disk.raw").exists()
    run("qemu-io", "-f", "qcow2", "-c", "read -P 5 0 1M", path)
    run("qemu-img", "check", path)


def test_rename_an_image_into_another_folder(tmp_path: Path) -> None:
    path, new = made(tmp_path), tmp_path / "sub" / "disk.qcow2"
    new.parent.mkdir()
    run("qemu-io", "-f", "qcow2", "-c", "write -P 5 0 1M", path)
    assert image("rename", path, new) == 0

    async def look() -> None:
        async with open_image(new, allow_data_file=[tmp_path / "disk.raw"]) as device:
            assert await device.read(0, 4) == b"\x05" * 4

    asyncio.run(look())
    shown = json.loads(run("qemu-img", "info", "-U", "--output=json", new))
    assert shown["format-specific"]["data"]["data-file"] == "../disk.raw"


@pytest.mark.parametrize("raw", ["off", "on"])
async def test_encrypted_data_in_a_file_of_their_own(tmp_path: Path, raw: str) -> None:
    path, data = tmp_path / "disk.qcow2", tmp_path / "disk.raw"
    secret = ["--object", "secret,id=s,data=abc"]
    luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    options = f"data_file=disk.raw,data_file_raw={raw},{luks}"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", *secret, "-o", options]
    patiently(*create, path, "2M")
    opened = f"driver=qcow2,file.filename={path},encrypt.key-secret=s"
    run("qemu-io", *secret, "--image-opts", opened, "-c", "write -P 7 0 2M")
    expected = bytearray(b"\x07" * 2 * MIB)
    async with open_image(path, allow_data_file=[data], secrets=[b"abc"]) as device:
        assert await device.read(0, 512) == b"\x07" * 512
        await scribble(device, expected, random.Random(8))
        await device.resize(3 * MIB + 512)
        expected += bytes(MIB + 512)
        await scribble(device, expected, random.Random(9))
        await device.write(0, b"plain text" * 512)
    expected[:5120] = b"plain text" * 512
    run("qemu-img", "convert", *secret, "--image-opts", "-O", "raw", opened, "out")
    assert (tmp_path / "out").read_bytes() == expected
    assert b"plain text" not in data.read_bytes()
