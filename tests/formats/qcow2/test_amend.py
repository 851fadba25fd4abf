"""Amended images: qemu-img finds them right, with the same bytes, in both directions."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from nbdserve.errors import ConfigError, ImageError
from nbdserve.formats.amend import amend_image, prepare_to_amend
from nbdserve.formats.open import open_image
from nbdserve.formats.qcow2.amend import Amendment
from nbdserve.formats.qcow2.image import Qcow2Image
from tests.helpers.engine import HEADER_INCOMPATIBLE, convert, make, put64, u64
from tests.helpers.tools import run

KIB = 1 << 10
MIB = 1 << 20
CONTENT = random.Random(1).randbytes(200 * KIB) + bytes(56 * KIB)


async def amend(path: Path, **wanted: Any) -> None:
    """Do what the command does."""
    await prepare_to_amend(path, Amendment(**wanted))
    amend_image(path, Amendment(**wanted))


def reads(path: Path, *, snapshot: str | None = None) -> bytes:
    """Return what qemu-img reads."""
    out = path.with_suffix(".raw")
    which = ["-l", snapshot] if snapshot else []
    run("qemu-img", "convert", *which, "-O", "raw", path, out)
    return out.read_bytes()


def info(path: Path) -> dict[str, Any]:
    """Return what qemu-img says of the format."""
    shown: dict[str, Any] = json.loads(run("qemu-img", "info", "--output=json", path))
    data: dict[str, Any] = shown["format-specific"]["data"]
    return data


@pytest.mark.parametrize("cluster", ["512", "4k", "64k", "2M"])
async def test_there_and_back(tmp_path: Path, cluster: str) -> None:
    """Version 2, 3 and 2 again: clean, and readable by qemu at each step."""
    path = convert(tmp_path, CONTENT, options=f"compat=0.10,cluster_size={cluster}")
    run("qemu-img", "snapshot", "-c", "one", path)
    await amend(path, version=3, lazy_refcounts=True)
    run("qemu-img", "check", path)
    assert (info(path)["compat"], info(path)["lazy-refcounts"]) == ("1.1", True)
    assert reads(path) == CONTENT
    run("qemu-io", "-c", "write -z 0 64k", "-c", "write -P 3 64k 64k", path)
    await amend(path, version=2)
    run("qemu-img", "check", path)
    assert info(path)["compat"] == "0.10"
    assert reads(path) == bytes(64 * KIB) + b"\3" * 64 * KIB + CONTENT[128 * KIB :]
    assert reads(path, snapshot="one") == CONTENT
    run("qemu-img", "amend", "-o", "compat=1.1", path)
    run("qemu-img", "snapshot", "-a", "one", path)
    run("qemu-img", "check", path)
    assert reads(path) == CONTENT


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
async def test_backing_names_stay(tmp_path: Path, compat: str) -> None:
    """The header gets longer or shorter, and the name moves with it."""
    base = tmp_path / ("base-" + "x" * 200 + ".raw")
    base.write_bytes(CONTENT)
    path = tmp_path / "top.qcow2"
    run(
        "qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "raw",
        "-o", f"compat={compat}", path,
    )  # fmt: skip
    run("qemu-io", "-c", "write -P 1 10k 20k", path)
    expected = reads(path)
    await amend(path, version=3 if compat == "0.10" else 2)
    shown = json.loads(run("qemu-img", "info", "--output=json", path))
    assert shown["backing-filename"] == base.name
    assert shown["backing-filename-format"] == "raw"
    run("qemu-img", "check", path)
    assert reads(path) == expected


async def test_zero_clusters_hide_the_backing_file(tmp_path: Path) -> None:
    """In the disk and in snapshots, shared or not, kept or not."""
    base = tmp_path / "base.raw"
    base.write_bytes(CONTENT)
    path = tmp_path / "top.qcow2"
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"]
    run(*argv, "-b", "base.raw", "-F", "raw", path, "1M")
    run("qemu-io", "-c", "write -z 0 20k", "-c", "write -P 5 40k 20k", path)
    run("qemu-io", "-c", "write -z 400k 40k", "-c", "write -z 48k 4k", path)
    run("qemu-img", "snapshot", "-c", "one", path)
    run("qemu-io", "-c", "write -P 6 4k 4k", "-c", "write -z 100k 8k", path)
    run("qemu-img", "snapshot", "-c", "two", path)
    before = [reads(path), reads(path, snapshot="one"), reads(path, snapshot="two")]
    await amend(path, version=2)
    run("qemu-img", "check", path)
    assert info(path)["compat"] == "0.10"
    after = [reads(path), reads(path, snapshot="one"), reads(path, snapshot="two")]
    assert after == before
    run("qemu-io", "-c", "write -P 7 0 600k", path)
    run("qemu-img", "check", path)
    assert reads(path, snapshot="one") == before[1]


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 32, 64])
async def test_refcount_width(tmp_path: Path, bits: int) -> None:
    """To each width and back; qemu goes on writing."""
    path = convert(tmp_path, CONTENT, options="cluster_size=512")
    await amend(path, refcount_bits=bits)
    run("qemu-img", "check", path)
    assert info(path)["refcount-bits"] == bits
    run("qemu-io", "-c", "write -P 3 200k 56k", path)
    run("qemu-img", "check", path)
    expected = CONTENT[: 200 * KIB] + b"\3" * 56 * KIB
    assert reads(path) == expected
    async with open_image(path) as image:
        await image.write(0, b"ours")
    await amend(path, refcount_bits=16, version=2)
    run("qemu-img", "check", path)
    assert reads(path) == b"ours" + expected[4:]


async def test_what_version_2_lacks(tmp_path: Path) -> None:
    """Each refusal names the reason, and changes nothing."""
    for options, match in (
        ("compression_type=zstd", "compression type"),
        ("refcount_bits=8", "add --refcount-bits 16"),
    ):
        path = make(tmp_path, MIB, options=options)
        before = path.read_bytes()
        with pytest.raises((ConfigError, ImageError), match=match):
            await amend(path, version=2)
        assert path.read_bytes() == before
    path = make(tmp_path, MIB)
    run("qemu-img", "bitmap", "--add", path, "b")
    with pytest.raises(ImageError, match="bitmaps"):
        await amend(path, version=2)
    path = make(tmp_path, MIB)
    run("qemu-img", "snapshot", "-c", "small", path)
    run("qemu-img", "resize", path, "2M")
    with pytest.raises(ImageError, match="snapshot 'small' has another size"):
        await amend(path, version=2)
    path = make(tmp_path, MIB, options="compat=0.10")
    with pytest.raises(ConfigError, match="lazy refcounts need version 3"):
        await amend(path, lazy_refcounts=True)
    with pytest.raises(ConfigError, match="have 16 bits"):
        await amend(path, refcount_bits=8)
    with pytest.raises(ConfigError, match="only qcow2"):
        await amend(make(tmp_path, MIB, fmt="qcow"), version=3)


async def test_one_bit_can_not_count_snapshots(tmp_path: Path) -> None:
    """A width that is too small is refused before anything is written."""
    path = convert(tmp_path, CONTENT)
    run("qemu-img", "snapshot", "-c", "one", path)
    with pytest.raises(ImageError, match="refcounts of 1 bits end at 1"):
        await amend(path, refcount_bits=1)
    run("qemu-img", "check", path)


async def test_corrupt_and_dirty(tmp_path: Path) -> None:
    """What is marked as corrupt is left alone; what is dirty is brought in order first."""
    path = convert(tmp_path, CONTENT)
    data = bytearray(path.read_bytes())
    put64(data, HEADER_INCOMPATIBLE, 2)
    path.write_bytes(data)
    with pytest.raises(ImageError, match="corrupt"):
        await amend(path, version=2)
    put64(data, HEADER_INCOMPATIBLE, 1)
    path.write_bytes(data)
    await amend(path, lazy_refcounts=False, refcount_bits=32)
    assert u64(path.read_bytes(), HEADER_INCOMPATIBLE) == 0
    run("qemu-img", "check", path)
    assert reads(path) == CONTENT


async def test_old_snapshots_get_a_size(tmp_path: Path) -> None:
    """Version 2 may lack the size in a snapshot, version 3 wants it."""
    path = convert(tmp_path, CONTENT, options="compat=0.10")
    run("qemu-img", "snapshot", "-c", "one", path)
    data = bytearray(path.read_bytes())
    table = u64(data, 64)
    # id, name and extra data follow the 40 bytes of the entry
    data[table + 36 : table + 40] = bytes(4)
    data[table + 40 : table + 44] = b"1one"
    path.write_bytes(data)
    await amend(path, version=3)
    async with open_image(path, read_only=True) as image:
        assert isinstance(image, Qcow2Image)
        assert [each.disk_size for each in await image.snapshots()] == [len(CONTENT)]
    run("qemu-img", "check", path)
    assert reads(path, snapshot="one") == CONTENT
