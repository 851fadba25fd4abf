"""Changing the backing file's name: every power cut leaves the old or the new one."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.errors import ImageFormatError
from nbdserve.formats.qcow2.backing_name import plan_backing_change
from nbdserve.formats.qcow2.extensions import (
    EXTENSION_DATA_FILE,
    EXTENSION_FEATURE_NAMES,
)
from nbdserve.formats.qcow2.header import Header, encode_header, parse_header
from tests.helpers.tools import run

SECTOR = 512
FILE_SIZE = 1 << 30


def made_by_qemu(folder: Path, options: str, name: str | None) -> bytes:
    """Return the first cluster of an image that qemu-img created."""
    path = folder / "image"
    words = [] if name is None else ["-u", "-b", name, "-F", "qcow2"]
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *words, path, "1M")
    data = path.read_bytes()
    return data[: 1 << int.from_bytes(data[20:24], "big")]


def states(cluster: bytes, writes: list[tuple[int, bytes]]) -> Iterator[bytes]:
    """Yield what a power cut may leave: any subset of the sectors of one write."""
    current = cluster
    yield current
    for offset, data in writes:
        after = bytearray(current)
        after[offset : offset + len(data)] = data
        first, end = offset // SECTOR, -(-(offset + len(data)) // SECTOR)
        sectors = range(first, end)
        for count in range(len(sectors)):
            for kept in itertools.combinations(sectors, count):
                torn = bytearray(current)
                for sector in kept:
                    start, stop = sector * SECTOR, (sector + 1) * SECTOR
                    torn[start:stop] = after[start:stop]
                yield bytes(torn)
        current = bytes(after)
        yield current


def said(cluster: bytes) -> tuple[bytes | None, str | None, Header]:
    """Return what a header says of its backing file, and the header."""
    header = parse_header(cluster, FILE_SIZE)
    return header.backing_name, header.backing_format, header


@pytest.mark.parametrize(
    "options",
    [
        "compat=1.1",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=1k",
        "cluster_size=4k",
        "cluster_size=8k",
        "cluster_size=2M",
        "compat=1.1,lazy_refcounts=on",
    ],
)
@pytest.mark.parametrize("old", [None, "o", "old.qcow2", "o" * 200])
@pytest.mark.parametrize("new", [None, "n", "new.raw", "n" * 200])
def test_a_cut_leaves_the_old_or_the_new_name(
    options: str, old: str | None, new: str | None, tmp_path: Path
) -> None:
    cluster = made_by_qemu(tmp_path, options, old)
    name = None if new is None else new.encode()
    before = said(cluster)
    writes = plan_backing_change(cluster, FILE_SIZE, name, "raw")
    seen = [said(state) for state in states(cluster, writes)]
    after = (name, None if name is None else "raw")
    assert seen[0][:2] == before[:2]
    assert seen[-1][:2] == after
    assert {each[:2] for each in seen} <= {before[:2], after}
    # nothing else has changed, not even the names of features
    names = EXTENSION_FEATURE_NAMES
    assert seen[-1][2].extension(names) == before[2].extension(names)
    fields = {header.l1_table_offset for _, _, header in seen}
    assert fields == {before[2].l1_table_offset}


def test_the_longest_name_fits_beside_another_one(tmp_path: Path) -> None:
    cluster = made_by_qemu(tmp_path, "cluster_size=4k", "o" * 1023)
    writes = plan_backing_change(cluster, FILE_SIZE, b"n" * 1023, "raw")
    *_, last = states(cluster, writes[-1:])
    assert len(said(last)[0] or b"") == 1023


def test_a_name_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    cluster = made_by_qemu(tmp_path, "cluster_size=1k", "o" * 500)
    with pytest.raises(ImageFormatError, match="no room"):
        plan_backing_change(cluster, FILE_SIZE, b"n" * 500, "raw")
    with pytest.raises(ImageFormatError, match="1024 bytes: at most 1023"):
        plan_backing_change(cluster, FILE_SIZE, b"n" * 1024, "raw")


def test_long_extensions_are_not_moved_unsafely(tmp_path: Path) -> None:
    header = said(made_by_qemu(tmp_path, "cluster_size=4k", None))[2]
    extensions = ((EXTENSION_DATA_FILE, b"d" * 600),)
    header = Header(
        cluster_bits=12,
        size=header.size,
        l1_size=header.l1_size,
        l1_table_offset=header.l1_table_offset,
        refcount_table_offset=header.refcount_table_offset,
        refcount_table_clusters=1,
        extensions=extensions,
    )
    cluster = encode_header(header).ljust(4096, b"\0")
    with pytest.raises(ImageFormatError, match="can't be changed safely"):
        plan_backing_change(cluster, FILE_SIZE, b"new", "raw")
