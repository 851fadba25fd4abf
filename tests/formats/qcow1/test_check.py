"""The check of version 1 images, which qemu-img does not have."""

import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdserve.errors import ImageCorruptError
from nbdserve.formats.check import check_image
from nbdserve.formats.check_result import CheckResult
from nbdserve.formats.qcow1.header import parse_header
from tests.helpers.tools import run


def check(path: Path) -> CheckResult:
    result = check_image(path)
    assert result is not None
    return result


def make(path: Path, *, backed: bool) -> None:
    backing: list[str] = []
    if backed:
        base = path.with_name("base.raw")
        run("qemu-img", "create", "-q", "-f", "raw", base, "4M")
        backing = ["-b", "base.raw", "-F", "raw"]
    run("qemu-img", "create", "-q", "-f", "qcow", *backing, path, "4M")
    cluster = 512 if backed else 4096
    commands = [
        "write -P 1 0 16k",
        f"write -c -P 2 64k {cluster}",
        f"write -c -P 3 128k {cluster}",
        "write -P 4 3M 100k",
    ]
    run("qemu-io", "-f", "qcow", *(w for c in commands for w in ("-c", c)), path)


@pytest.mark.parametrize("backed", [False, True])
def test_images_of_qemu_are_clean(tmp_path: Path, backed: bool) -> None:
    path = tmp_path / "disk.qcow"
    make(path, backed=backed)
    result = check(path)
    assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0)
    assert result.compressed_clusters == 2
    cluster = 512 if backed else 4096
    assert result.allocated_clusters == (116 << 10) // cluster + 2
    assert result.total_clusters == (4 << 20) // cluster
    assert result.image_end_offset <= path.stat().st_size + cluster
    assert result.as_json()["format"] == "qcow"


class Damaged:
    """An image whose words can be replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = bytearray(path.read_bytes())
        self.l1 = parse_header(bytes(self.data), len(self.data)).l1_table_offset
        self.l2 = self.word(self.l1)

    def word(self, offset: int) -> int:
        word: int = struct.unpack_from(">Q", self.data, offset)[0]
        return word

    def put(self, offset: int, word: int) -> None:
        struct.pack_into(">Q", self.data, offset, word)


DAMAGES: dict[str, tuple[Callable[[Damaged], None], str]] = {
    "L2 past end": (lambda i: i.put(i.l1, 1 << 40), "L1 entry 0.*past the end"),
    "L2 cut": (lambda i: i.put(i.l1, len(i.data) // 512 * 512), "past the end"),
    "L2 unaligned": (lambda i: i.put(i.l1, i.l2 + 8), "not aligned"),
    "L2 twice": (lambda i: i.put(i.l1 + 8, i.l2), "L1 entry 1.*overlaps"),
    "L2 in header": (lambda i: i.put(i.l1 + 8, 1), "not aligned"),
    "cluster past end": (lambda i: i.put(i.l2, 1 << 40), "past the end"),
    "cluster unaligned": (lambda i: i.put(i.l2, i.word(i.l2) + 1), "not aligned"),
    "cluster twice": (lambda i: i.put(i.l2 + 8, i.word(i.l2)), "overlaps"),
    "cluster is table": (lambda i: i.put(i.l2, i.l2), "entry 0 of.*overlaps"),
    "compressed past end": (
        lambda i: i.put(i.l2, 1 << 63 | 100 << 51 | 1 << 40), "past the end"),
    "compressed of nothing": (lambda i: i.put(i.l2, 1 << 63 | 4096), "none"),
    "compressed over table": (
        lambda i: i.put(i.l2, 1 << 63 | 100 << 51 | i.l2), "overlap something"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "disk.qcow"
    make(path, backed=False)
    image = Damaged(path)
    spoil, text = DAMAGES[damage]
    spoil(image)
    path.write_bytes(image.data)
    result = check(path)
    assert result.corruptions >= 1
    found = "\n".join(result.messages)
    assert re.search(text, found), found


def test_l1_past_the_end_refuses_the_check(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow"
    make(path, backed=False)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ImageCorruptError, match=r"disk\.qcow: l1_table_offset"):
        check_image(path)
