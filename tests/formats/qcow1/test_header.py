"""The qcow version 1 header: what qemu-img writes is understood, what is broken is refused."""

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.errors import ImageCorruptError, ImageError, ImageFormatError
from nbdserve.formats.qcow1.header import (
    Header,
    encode_header,
    header_bytes_needed,
    parse_header,
)
from tests.helpers.tools import run

FILE_SIZE = 1 << 20


def base(**changes: object) -> bytes:
    fields: dict[str, object] = {
        "size": 10 << 20,
        "cluster_bits": 12,
        "l2_bits": 9,
        "l1_table_offset": 512,
        **changes,
    }
    return encode_header(Header(**fields))  # type: ignore[arg-type]


def patched(offset: int, layout: str, *values: int | bytes) -> bytes:
    data = bytearray(base())
    struct.pack_into(layout, data, offset, *values)
    return bytes(data)


@pytest.mark.parametrize("backed", [False, True])
def test_image_of_qemu(tmp_path: Path, backed: bool) -> None:
    path = tmp_path / "disk.qcow"
    backing: list[str] = []
    if backed:
        run("qemu-img", "create", "-q", "-f", "raw", tmp_path / "base.raw", "1M")
        backing = ["-b", "base.raw", "-F", "raw"]
    run("qemu-img", "create", "-q", "-f", "qcow", *backing, path, "10M")
    data = path.read_bytes()
    header = parse_header(data, len(data))
    assert header.disk_size == 10 << 20
    assert header.cluster_size == (512 if backed else 4096)
    assert header.l2_bytes == (32768 if backed else 4096)
    assert header.l1_size == 5
    assert header.backing_name == (b"base.raw" if backed else None)
    assert data.startswith(encode_header(header))
    needed = header_bytes_needed(data[:48])
    assert parse_header(data[:needed], len(data)) == header


HOSTILE = {
    "magic": (patched(0, ">4s", b"QFI\0"), ImageFormatError, "magic"),
    "version": (patched(4, ">I", 2), ImageFormatError, "version at byte 4 is 2"),
    "cluster_bits 8": (patched(32, ">B", 8), ImageCorruptError, "cluster_bits.* 8"),
    "cluster_bits 17": (patched(32, ">B", 17), ImageCorruptError, "cluster_bits.* 17"),
    "l2_bits 5": (patched(33, ">B", 5), ImageCorruptError, "l2_bits.* 5"),
    "l2_bits 14": (patched(33, ">B", 14), ImageCorruptError, "l2_bits.* 14"),
    "size 0": (patched(24, ">Q", 0), ImageCorruptError, "size at byte 24 is 0"),
    "size huge": (patched(24, ">Q", 1 << 60), ImageCorruptError, "L1 entries"),
    "size 2^64": (patched(24, ">Q", (1 << 64) - 1), ImageCorruptError, "too large"),
    "crypt 2": (patched(36, ">I", 2), ImageFormatError, "crypt_method.* 2"),
    "backing 1024": (patched(8, ">QI", 48, 1024), ImageCorruptError, "1024"),
    "backing in header": (patched(8, ">QI", 8, 4), ImageCorruptError, "offset.* 8"),
    "backing far away": (patched(8, ">QI", 1 << 40, 4), ImageCorruptError, "offset"),
    "backing cut": (patched(8, ">QI", 48, 4), ImageCorruptError, "runs past"),
    "l1 in header": (patched(40, ">Q", 40), ImageCorruptError, "in the header"),
    "l1 past end": (patched(40, ">Q", FILE_SIZE), ImageCorruptError, "past the end"),
    "l1 at 2^63": (patched(40, ">Q", 1 << 63), ImageCorruptError, "past the end"),
    "short": (base()[:47], ImageCorruptError, "47 bytes"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_by_name(case: str) -> None:
    data, error, text = HOSTILE[case]
    with pytest.raises(error, match=text):
        parse_header(data, FILE_SIZE)


def test_encryption_is_described() -> None:
    assert parse_header(base(crypt_method=1), FILE_SIZE).crypt_method == 1


def test_truncation() -> None:
    assert parse_header(base(), 512 + 40).l1_size == 5
    with pytest.raises(ImageCorruptError, match="l1_table_offset"):
        parse_header(base(), 512 + 39)


_FULL = base(backing_name=b"base.img")


@given(
    st.lists(st.tuples(st.integers(0, 55), st.integers(0, 255)), max_size=6),
    st.integers(0, 56),
    st.sampled_from([FILE_SIZE, 1 << 62]),
)
def test_any_mutation_parses_or_is_an_image_error(
    changes: list[tuple[int, int]], cut: int, file_size: int
) -> None:
    data = bytearray(_FULL)
    for offset, byte in changes:
        data[offset] = byte
    try:
        assert header_bytes_needed(bytes(data)) <= (2 << 20) + 1023
        header = parse_header(bytes(data[:cut]), file_size)
    except ImageError:
        return
    assert header.l1_table_offset + header.l1_size * 8 <= file_size
