"""A dirty image, as a killed qemu leaves it, is made whole again."""

import os
import signal
import struct
from pathlib import Path

import pytest

from nbdserve.errors import ImageCorruptError
from nbdserve.formats.qcow2.check import read_header
from nbdserve.formats.qcow2.rebuild import RebuildResult, rebuild_refcounts
from tests.helpers.tools import run

ABORTED = -signal.SIGABRT


def rebuild(path: Path) -> RebuildResult:
    fd = os.open(path, os.O_RDWR)
    try:
        return rebuild_refcounts(fd, str(path))
    finally:
        os.close(fd)


def make_dirty(path: Path, *commands: str) -> None:
    arguments = [word for command in commands for word in ("-c", command)]
    run("qemu-io", "-f", "qcow2", *arguments, "-c", "abort", path, expect=[ABORTED])


def content(path: Path) -> bytes:
    raw = path.with_suffix(".raw")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    return raw.read_bytes()


@pytest.mark.parametrize("cluster_size", [512, 65536])
@pytest.mark.parametrize("refcount_bits", [1, 16, 64])
@pytest.mark.parametrize("snapshot", [False, True])
def test_killed_qemu(
    tmp_path: Path, cluster_size: int, refcount_bits: int, snapshot: bool
) -> None:
    if snapshot and refcount_bits == 1:
        refcount_bits = 2
    path = tmp_path / "disk.qcow2"
    options = (
        f"lazy_refcounts=on,cluster_size={cluster_size},refcount_bits={refcount_bits}"
    )
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "8M")
    if snapshot:
        run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", path)
        run("qemu-img", "snapshot", "-c", "before", path)
    make_dirty(
        path,
        "write -P 3 64k 3M",
        "flush",
        "write -z 1M 300k",
        "flush",
        "write -P 9 5000k 100k",
        "flush",
    )
    run("qemu-img", "check", path, expect=[2])
    before = content(path)
    assert before[5_000 << 10 : 5_100 << 10] == b"\x09" * (100 << 10)
    result = rebuild(path)
    assert result.refcounts_raised > 0
    run("qemu-img", "check", path)
    assert content(path) == before
    fd = os.open(path, os.O_RDONLY)
    assert not read_header(fd).dirty
    assert read_header(fd).lazy_refcounts
    os.close(fd)
    assert rebuild(path) == RebuildResult(0, 0, 0)


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """An image of 512-byte clusters with data in the ranges of many refcount blocks."""
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "8M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 5 1M 1M", path)
    return path


def refcount_words(path: Path) -> list[int]:
    data = path.read_bytes()
    (offset,) = struct.unpack_from(">Q", data, 48)
    return list(struct.unpack_from(">64Q", data, offset))


def test_missing_blocks_are_made_and_flags_set(clean: Path) -> None:
    data = bytearray(clean.read_bytes())
    (table,) = struct.unpack_from(">Q", data, 48)
    (l1,) = struct.unpack_from(">Q", data, 40)
    words = refcount_words(clean)
    used = sum(1 for word in words if word)
    assert used > 3
    data[table + 8 : table + used * 8] = bytes((used - 1) * 8)
    l1_words = struct.unpack_from(">320Q", data, l1)
    first = next(i for i, word in enumerate(l1_words) if word)
    struct.pack_into(">Q", data, l1 + first * 8, l1_words[first] & (1 << 63) - 1)
    struct.pack_into(">Q", data, 72, 1)
    before = content(clean)
    clean.write_bytes(data)
    result = rebuild(clean)
    assert result.refcounts_raised > 1000
    assert result.flags_fixed == 1
    run("qemu-img", "check", clean)
    assert content(clean) == before
    assert sum(1 for word in refcount_words(clean) if word) >= used


def test_leaks_are_reclaimed(clean: Path) -> None:
    data = bytearray(clean.read_bytes())
    (l1,) = struct.unpack_from(">Q", data, 40)
    words = struct.unpack_from(">320Q", data, l1)
    first = next(i for i, word in enumerate(words) if word)
    data[l1 + first * 8 : l1 + first * 8 + 8] = bytes(8)
    clean.write_bytes(data)
    run("qemu-img", "check", clean, expect=[3])
    assert rebuild(clean) == RebuildResult(0, 65, 0)
    run("qemu-img", "check", clean)


@pytest.mark.parametrize(
    ("word", "text"),
    [
        (0x8000_0000_0000_0001, "reserved"),
        (0x80FF_FFFF_0000_0000, "past the end"),
    ],
)
def test_broken_pointers_are_not_guessed_at(clean: Path, word: int, text: str) -> None:
    data = bytearray(clean.read_bytes())
    (l1,) = struct.unpack_from(">Q", data, 40)
    struct.pack_into(">Q", data, l1, word)
    struct.pack_into(">Q", data, 72, 1)
    clean.write_bytes(data)
    with pytest.raises(ImageCorruptError, match=text):
        rebuild(clean)
    assert clean.read_bytes() == data


def test_order_of_writes(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash at any point leaves the dirty bit, until all the rest is durable."""
    data = bytearray(clean.read_bytes())
    (table,) = struct.unpack_from(">Q", data, 48)
    data[table + 8 : table + 24] = bytes(16)
    struct.pack_into(">Q", data, 72, 1)
    clean.write_bytes(data)
    states: list[bytes] = []
    real = os.fsync

    def spy(fd: int) -> None:
        real(fd)
        states.append(clean.read_bytes())

    monkeypatch.setattr(os, "fsync", spy)
    rebuild(clean)
    assert [state[79] & 1 for state in states] == [1] * (len(states) - 1) + [0]
    # New blocks are in the file before the table names them.
    assert states[0][table + 8 : table + 24] == bytes(16)
    assert states[1][table + 8 : table + 24] != bytes(16)
    assert len(states[0]) == len(states[-1]) > len(data)
    for state in states[:-1]:
        clean.write_bytes(state)
        rebuild(clean)
        run("qemu-img", "check", clean)
