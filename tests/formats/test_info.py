"""`image info` says what `qemu-img info` says."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nbdserve.errors import ConfigError, ImageCorruptError, ImageFormatError
from nbdserve.formats.create import create_image
from nbdserve.formats.crypto.luks import CipherSpec
from nbdserve.formats.crypto.new_luks import NewLuks
from nbdserve.formats.header_details import geometry
from nbdserve.formats.info import human_size, image_info
from tests.helpers.encrypted import create_luks
from tests.helpers.engine import u32, u64
from tests.helpers.tools import run


def theirs(path: Path) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(run("qemu-img", "info", "--output=json", path))
    return shown


def assert_agree(path: Path) -> None:
    info = image_info(path)
    assert info.as_json() == theirs(path)
    assert info.as_text() == run("qemu-img", "info", path)


@pytest.mark.parametrize(
    "options",
    [
        "",
        "compat=0.10",
        "cluster_size=512,refcount_bits=1,lazy_refcounts=on",
        "cluster_size=2M,compression_type=zstd,refcount_bits=64",
        "extended_l2=on",
        "data_file=data.raw,data_file_raw=on",
        "preallocation=falloc",
    ],
)
def test_qcow2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "disk.qcow2"
    chosen = ["-o", options] if options else []
    run("qemu-img", "create", "-q", "-f", "qcow2", *chosen, path, "1500k")
    assert_agree(path)


def test_snapshots_and_bitmaps(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1G")
    run("qemu-img", "snapshot", "-c", "first", path)
    run("qemu-img", "snapshot", "-c", "second", path)
    run("qemu-img", "bitmap", "--add", path, "b0")
    run("qemu-img", "bitmap", "--add", "-g", "512", path, "b1")
    run("qemu-img", "bitmap", "--disable", path, "b1")
    assert_agree(path)


@pytest.mark.parametrize("backing_format", ["raw", "qcow", "qcow2"])
@pytest.mark.parametrize("image_format", ["qcow", "qcow2"])
@pytest.mark.parametrize("folder", [".", "sub"])
def test_backing_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backing_format: str,
    image_format: str,
    folder: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    os.makedirs(folder, exist_ok=True)
    base, disk = Path(folder, "base"), Path(folder, "disk")
    run("qemu-img", "create", "-q", "-f", backing_format, base, "1M")
    run(
        "qemu-img", "create", "-q", "-f", image_format, "-b", "base",
        "-F", backing_format, disk, "2M",
    )  # fmt: skip
    assert_agree(disk)
    # The backing file is not looked at.
    base.unlink()
    assert image_info(disk).backing_filename == "base"


def test_raw(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(3 * 512))
    assert_agree(path)
    # qemu rounds up to sectors, we serve every byte.
    path.write_bytes(bytes(1000))
    assert image_info(path).virtual_size == 1000


def test_encrypted_and_dirty_images_are_described(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    data = bytearray(path.read_bytes())
    data[35], data[79] = 1, 3
    path.write_bytes(data)
    info = image_info(path)
    assert info.as_json()["encrypted"] is True
    assert info.as_json()["dirty-flag"] is True
    assert info.as_json()["format-specific"]["data"]["corrupt"] is True
    assert "cleanly shut down: no" in info.as_text()


@pytest.mark.parametrize(
    ("mode", "iv", "iv_hash", "length"),
    [
        ("xts", "plain64", "", 64),
        ("xts", "plain", "", 32),
        ("cbc", "essiv", "sha256", 32),
        ("ecb", "", "", 16),
    ],
)
def test_luks_headers_are_described(
    tmp_path: Path, mode: str, iv: str, iv_hash: str, length: int
) -> None:
    path = tmp_path / "disk.qcow2"
    cipher = CipherSpec("aes", mode, iv, iv_hash, length)
    luks = NewLuks(cipher, "sha256", b"secret", 1)
    create_image(path, 1 << 20, encryption=luks)
    assert_agree(path)


def test_a_broken_luks_header_is_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_luks(path, 1 << 20)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"LUKS\xba\xbe", b"broken"))
    info = image_info(path)
    assert info.encrypted
    assert "warning: the LUKS header has no magic" in info.as_text()


def test_broken_tables_are_warnings(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    run("qemu-img", "snapshot", "-c", "first", path)
    data = bytearray(path.read_bytes())
    offset = int.from_bytes(data[64:72], "big")
    data[offset + 36 : offset + 40] = b"\xff" * 4
    path.write_bytes(data)
    info = image_info(path)
    assert info.snapshots == ()
    assert "warning: snapshot 0" in info.as_text()


def test_format_is_told_by_magic_or_by_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    assert image_info(path).format == "qcow2"
    assert image_info(path, format="qcow2").format == "qcow2"
    raw = image_info(path, format="raw")
    assert (raw.format, raw.virtual_size) == ("raw", path.stat().st_size)
    with pytest.raises(ImageFormatError, match="is qcow2, not qcow"):
        image_info(path, format="qcow")
    with pytest.raises(ConfigError, match="missing: No such file"):
        image_info(tmp_path / "missing")


def test_broken_headers_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(16))
    with pytest.raises(ImageCorruptError, match="disk: cluster_bits at byte 20"):
        image_info(path)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1 KiB"),
        (200704, "196 KiB"),
        (1 << 33, "8 GiB"),
        ((1 << 64) - 1, "16 EiB"),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert human_size(size) == text


@pytest.mark.parametrize(
    ("size", "expected"),
    [(512, (1, 16, 63)), (1 << 30, (2080, 16, 63)), (1 << 40, (16383, 16, 63))],
)
def test_geometry(size: int, expected: tuple[int, int, int]) -> None:
    """As hdparm and VirtualBox show it for such a disk."""
    assert geometry(size) == expected


@pytest.mark.parametrize("image_format", ["raw", "qcow", "qcow2"])
def test_what_qemu_img_does_not_show(image_format: str, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    (tmp_path / "base").write_bytes(bytes(1 << 20))
    backing = [] if image_format == "raw" else ["-b", "base", "-F", "raw"]
    run("qemu-img", "create", "-q", "-f", image_format, *backing, path, "64M")
    info = image_info(path)
    details, text = info.details_json(), info.details_text()
    assert details["file-size"] == path.stat().st_size
    assert f"({path.stat().st_size} bytes)" in text
    assert details["geometry"] == {"cylinders": 130, "heads": 16, "sectors": 63}
    assert "geometry: 130/16/63" in text
    header = details["header"]
    if image_format == "raw":
        assert not header
        return
    data = path.read_bytes()
    assert header["version"] == u32(data, 4) == (1 if image_format == "qcow" else 3)
    assert header["size"] == u64(data, 24)
    assert header["l1-table-offset"] == u64(data, 40)
    assert f"l1-table-offset: {u64(data, 40):#x}" in text
    assert header["backing-name"] == "base"
    if image_format == "qcow2":
        assert header["refcount-table-offset"] == u64(data, 48)
        assert header["header-length"] == u32(data, 100)
        kinds = [each["type"] for each in header["extensions"]]
        assert kinds == ["0xe2792aca", "0x6803f857"]
    json.dumps(details)
