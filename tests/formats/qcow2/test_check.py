"""Our check counts what `qemu-img check` counts, on whole and on damaged images."""

import json
import os
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdserve.errors import ImageCorruptError, ImageError
from nbdserve.formats.check import check_image
from nbdserve.formats.check_result import MAX_MESSAGES, CheckResult
from nbdserve.formats.qcow2.header import parse_header
from tests.helpers.encrypted import patiently
from tests.helpers.tools import run

COPIED = 1 << 63
OFFSET = 0x00FF_FFFF_FFFF_FE00


def ours(path: Path) -> CheckResult:
    result = check_image(path)
    assert result is not None
    return result


def theirs(path: Path) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(
        run("qemu-img", "check", "--output=json", path, expect=[0, 1, 2, 3])
    )
    return shown


def assert_agree(path: Path) -> CheckResult:
    result = ours(path)
    assert result.as_json() == theirs(path), result.as_text()
    return result


def exercise(path: Path, cluster_size: int, seed: int, count: int) -> None:
    """Write, zero, discard and compress at random places."""
    generator = random.Random(seed)
    words: list[str] = []
    for _ in range(count):
        offset = generator.randrange(0, 3 << 20) // 512 * 512
        length = generator.choice([512, 4096, 65536, 200 << 10])
        command = generator.choice(
            ["write -P 1", "write -P 2", "write -z", "write -zu", "discard", "write -c"]
        )
        if command == "write -c":
            offset, length = offset // cluster_size * cluster_size, cluster_size
        words += ["-c", f"{command} {offset} {length}"]
    # Compressed writes over allocated clusters are refused: that is no failure here.
    run("qemu-io", "-f", "qcow2", *words, path, expect=[0, 1])


IMAGES = [
    ("cluster_size=512", 0),
    ("cluster_size=512,compat=0.10", 1),
    ("cluster_size=4k,refcount_bits=1", 0),
    ("cluster_size=4k,refcount_bits=64,compression_type=zstd", 2),
    ("cluster_size=64k,refcount_bits=8", 1),
    ("cluster_size=64k,extended_l2=on", 1),
    ("cluster_size=1k,refcount_bits=2", 1),
    ("cluster_size=1k,refcount_bits=32", 0),
    ("cluster_size=2M", 1),
]


def make(path: Path, options: str, snapshots: int, seed: int) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "4M")
    cluster_size = json.loads(run("qemu-img", "info", "--output=json", path))[
        "cluster-size"
    ]
    exercise(path, cluster_size, seed, 8)
    for number in range(snapshots):
        run("qemu-img", "snapshot", "-c", f"s{number}", path)
        exercise(path, cluster_size, seed + number + 1, 4)


@pytest.mark.parametrize(("options", "snapshots"), IMAGES)
def test_whole_images(tmp_path: Path, options: str, snapshots: int) -> None:
    path = tmp_path / "disk.qcow2"
    make(path, options, snapshots, seed=len(options) + snapshots)
    result = assert_agree(path)
    assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0)
    assert "No errors were found" in result.as_text()
    if "refcount_bits=1," in options + "," or "0.10" in options:
        return
    run("qemu-img", "bitmap", "--add", path, "bits")
    run("qemu-io", "-f", "qcow2", "-c", "write 0 1M", path)
    assert assert_agree(path).corruptions == 0


def test_text_says_what_qemu_says(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    make(path, "cluster_size=4k", 0, seed=3)
    assert ours(path).as_text() == run("qemu-img", "check", path)


def test_other_clusters_than_the_guests(tmp_path: Path) -> None:
    secret = "secret,id=s,data=abc"
    luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    path = tmp_path / "luks.qcow2"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "--object", secret]
    patiently(*create, "-o", luks, path, "1M")
    # qemu-img wants the key even for a check.
    result = ours(path)
    assert (result.corruptions, result.leaks) == (0, 0)
    path = tmp_path / "external.qcow2"
    data = f"data_file={tmp_path / 'data'},preallocation=metadata"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", data, path, "1M")
    assert assert_agree(path).leaks == 0


class Damaged:
    """A copy of an image in which words can be replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = bytearray(path.read_bytes())
        self.header = parse_header(bytes(self.data), len(self.data))
        self.refcount_table = self.header.refcount_table_offset
        self.refcount_block = self.word(self.refcount_table)
        self.l1 = self.header.l1_table_offset
        words = [self.word(self.l1 + 8 * i) for i in range(self.header.l1_size)]
        self.l2 = next(word for word in words if word) & OFFSET

    def word(self, offset: int) -> int:
        word: int = struct.unpack_from(">Q", self.data, offset)[0]
        return word

    def put(self, offset: int, word: int) -> None:
        struct.pack_into(">Q", self.data, offset, word)

    def save(self) -> Path:
        self.path.write_bytes(self.data)
        return self.path


@pytest.fixture
def image(tmp_path: Path) -> Damaged:
    """64 KiB clusters: 4 data clusters, 1 compressed, 1 zero, 16-bit refcounts."""
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
    commands = ("write 0 256k", "write -z 256k 64k", "write -c -P 7 512k 64k")
    run("qemu-io", "-f", "qcow2", *(w for c in commands for w in ("-c", c)), path)
    return Damaged(path)


#: What is changed, and how many (corruptions, leaks) that is.
DAMAGES: dict[str, tuple[Callable[[Damaged], None], tuple[int, int]]] = {
    "leak": (lambda i: i.put(i.l2, 0), (0, 1)),
    "refcount 0": (lambda i: i.put(i.refcount_block + 8, 0), (4 + 4, 0)),
    "refcount 2": (lambda i: i.put(i.refcount_block, 0x1_0001_0001_0002), (0, 1)),
    "leaked table": (lambda i: i.put(i.l1, 0), (0, 6)),
    "duplicate": (lambda i: i.put(i.l2 + 8, i.word(i.l2)), (1, 1)),
    "cluster is L2 table": (lambda i: i.put(i.l2, COPIED | i.l2), (1, 1)),
    "cluster is header": (lambda i: i.put(i.l2, COPIED), (0, 1)),
    "not COPIED": (lambda i: i.put(i.l2, i.word(i.l2) ^ COPIED), (1, 0)),
    "L1 not COPIED": (lambda i: i.put(i.l1, i.l2), (1, 0)),
    "reserved in L2": (lambda i: i.put(i.l2, i.word(i.l2) | 2), (1, 0)),
    "reserved in L1": (lambda i: i.put(i.l1, i.word(i.l1) | 1 << 60), (1, 0)),
    "unaligned cluster": (lambda i: i.put(i.l2, i.word(i.l2) | 512), (2, 0)),
    "cluster past end": (lambda i: i.put(i.l2, COPIED | 1 << 40), (2, 1)),
    "L2 past end": (lambda i: i.put(i.l1, COPIED | 1 << 40), (2, 6)),
    "COPIED compressed": (
        lambda i: i.put(i.l2 + 64, i.word(i.l2 + 64) | COPIED), (1, 0)),
    "compressed past end": (
        lambda i: i.put(i.l2 + 64, 1 << 62 | 1 << 40), (1, 1)),
    "reserved in reftable": (
        lambda i: i.put(i.refcount_table, i.refcount_block | 1), (1, 1)),
    "second reftable entry": (
        lambda i: i.put(i.refcount_table + 8, i.refcount_block), (2, 0)),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage(image: Damaged, damage: str) -> None:
    spoil, expected = DAMAGES[damage]
    spoil(image)
    result = assert_agree(image.save())
    assert (result.corruptions, result.leaks) == expected
    assert len(result.messages) == sum(expected)


def test_zero_flag_in_version_2_is_found(tmp_path: Path) -> None:
    """qemu-img check does not mention it, yet qemu and we read EIO there."""
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", path, "1M")
    run("qemu-io", "-f", "qcow2", "-c", "write 0 128k", path)
    image = Damaged(path)
    image.put(image.l2, image.word(image.l2) | 1)
    image.put(image.l2 + 16, 1)
    assert ours(image.save()).corruptions == 2


def test_misplaced_refcount_block_is_no_guess(image: Damaged) -> None:
    image.put(image.refcount_table, image.refcount_block + 512)
    path = image.save()
    result = ours(path)
    assert result.corruptions
    assert result.check_errors
    run("qemu-img", "check", path, expect=[1])


def test_truncated_file_is_corrupt(image: Damaged) -> None:
    del image.data[len(image.data) - (128 << 10) :]
    assert assert_agree(image.save()).corruptions


def test_metadata_past_the_end_refuse_the_check(image: Damaged) -> None:
    del image.data[image.l1 :]
    with pytest.raises(ImageCorruptError, match=r"disk\.qcow2: l1_table_offset"):
        check_image(image.save())


def test_shared_snapshot_tables_are_walked_once(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "1M")
    run("qemu-io", "-f", "qcow2", "-c", "write 0 1M", path)
    for number in range(4):
        run("qemu-img", "snapshot", "-c", f"s{number}", path)
    assert_agree(path)
    damaged = Damaged(path)
    damaged.put(damaged.l2, damaged.word(damaged.l2) | 2)
    assert assert_agree(damaged.save()).corruptions == 5


@pytest.mark.parametrize("seed", range(4))
def test_random_damage(tmp_path: Path, seed: int) -> None:
    """Words of the L2 tables are replaced; both checks must count the same."""
    path = tmp_path / "disk.qcow2"
    options, snapshots = IMAGES[seed]
    make(path, options, snapshots, seed)
    whole = Damaged(path)
    cluster_size = whole.header.cluster_size
    generator = random.Random(seed)
    for _ in range(4):
        damaged = Damaged(path)
        words = [
            offset
            for offset in range(damaged.l2, damaged.l2 + cluster_size, 8)
            if damaged.word(offset)
        ] or [damaged.l2]
        for _ in range(2):
            damaged.put(
                generator.choice(words),
                generator.choice(
                    [
                        COPIED | generator.randrange(len(damaged.data)) & OFFSET,
                        generator.randrange(len(damaged.data)) & -cluster_size,
                        1 << 62 | generator.randrange(len(damaged.data)),
                        generator.getrandbits(64),
                    ]
                ),
            )
        assert_agree(damaged.save())
        path.write_bytes(whole.data)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(
        st.tuples(st.integers(0, 0x6FFF), st.binary(min_size=1, max_size=8)),
        min_size=1,
        max_size=6,
    )
)
def test_any_damage_ends_in_a_result_or_an_image_error(
    small_image: bytes, tmp_path: Path, changes: list[tuple[int, bytes]]
) -> None:
    data = bytearray(small_image)
    for offset, piece in changes:
        data[offset : offset + len(piece)] = piece
    path = tmp_path / "damaged.qcow2"
    path.write_bytes(data)
    try:
        result = check_image(path)
    except ImageError:
        return
    assert result is None or len(result.messages) <= MAX_MESSAGES
    assert result is None or result.as_text().endswith("\n")


@pytest.fixture(scope="module")
def small_image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """All kinds of metadata in little space."""
    path = tmp_path_factory.mktemp("small") / "disk.qcow2"
    make(path, "cluster_size=512", 1, seed=5)
    return path.read_bytes()


def test_a_sparse_giant_is_checked_quickly(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    options = "preallocation=metadata"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "64G")
    os.truncate(path, 1 << 43)
    result = assert_agree(path)
    assert result.allocated_clusters == 1 << 20


def test_raw_has_no_check(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    assert check_image(path) is None
    assert (
        subprocess.run(
            ["qemu-img", "check", path], capture_output=True, check=False
        ).returncode
        == 63
    )
