"""The qcow2 header: what qemu-img writes is understood, what is broken is refused."""

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.errors import ImageCorruptError, ImageError, ImageFormatError
from nbdserve.formats.qcow2 import extensions
from nbdserve.formats.qcow2.header import (
    CRYPT_LUKS,
    L1_GROUP_OFFSET,
    REFCOUNT_TABLE_GROUP_OFFSET,
    SNAPSHOTS_GROUP_OFFSET,
    Header,
    encode_header,
    encode_l1_group,
    encode_refcount_table_group,
    encode_snapshots_group,
    header_bytes_needed,
    parse_header,
    require_writable,
)
from tests.helpers.tools import run

FILE_SIZE = 1 << 20
CLUSTER = 4096


def parse_file(path: Path) -> Header:
    data = path.read_bytes()
    return parse_header(data[: header_bytes_needed(data)], len(data))


def base(**changes: object) -> bytes:
    """A valid header of 4 KiB clusters, 10 MiB of disk, with fields replaced."""
    fields: dict[str, object] = {
        "cluster_bits": 12,
        "size": 10 << 20,
        "l1_size": 5,
        "l1_table_offset": 3 * CLUSTER,
        "refcount_table_offset": CLUSTER,
        "refcount_table_clusters": 1,
        **changes,
    }
    return encode_header(Header(**fields))  # type: ignore[arg-type]


def patched(offset: int, layout: str, *values: object, data: bytes = b"") -> bytes:
    content = bytearray((data or base()).ljust(CLUSTER, b"\0"))
    struct.pack_into(layout, content, offset, *values)
    return bytes(content)


@pytest.mark.parametrize(
    ("options", "backing", "compat"),
    [
        ("cluster_size=512", False, "1.1"),
        ("cluster_size=512,refcount_bits=1", True, "1.1"),
        ("cluster_size=4k,refcount_bits=64,compression_type=zstd", True, "1.1"),
        ("cluster_size=64k,compat=0.10", True, "0.10"),
        ("cluster_size=64k,lazy_refcounts=on", False, "1.1"),
        ("cluster_size=512,compat=0.10", False, "0.10"),
        ("cluster_size=2M,refcount_bits=8,preallocation=metadata", False, "1.1"),
        ("cluster_size=64k,extended_l2=on", True, "1.1"),
        ("cluster_size=64k,preallocation=falloc", False, "1.1"),
    ],
)
def test_fields_agree_with_qemu(
    tmp_path: Path, options: str, backing: bool, compat: str
) -> None:
    path = tmp_path / "disk.qcow2"
    if backing:
        run("qemu-img", "create", "-q", "-f", "raw", tmp_path / "base.raw", "3M")
        options += ",backing_file=base.raw,backing_fmt=raw"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "5M")
    header = parse_file(path)
    info = json.loads(run("qemu-img", "info", "--output=json", path))
    specific = info["format-specific"]["data"]
    assert header.disk_size == info["virtual-size"] == 5 << 20
    assert header.cluster_size == info["cluster-size"]
    assert header.compat == specific["compat"] == compat
    assert header.refcount_bits == specific["refcount-bits"]
    assert header.lazy_refcounts == specific.get("lazy-refcounts", False)
    assert header.extended_l2 == specific.get("extended-l2", False)
    assert header.l1_size >= header.l1_needed
    assert header.backing_name == (b"base.raw" if backing else None)
    assert header.backing_format == ("raw" if backing else None)
    # Encoding what was read gives the same bytes.
    encoded = encode_header(header)
    assert path.read_bytes().startswith(encoded)
    assert parse_header(encoded, path.stat().st_size) == header


@pytest.mark.parametrize("size", ["0", "1000", "3T"])
def test_sizes(tmp_path: Path, size: str) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, size)
    header = parse_file(path)
    assert header.disk_size == {"0": 0, "1000": 1024, "3T": 3 << 40}[size]
    assert header.l1_size == header.l1_needed


#: Hostile headers: what is changed, the error and a word of its text.
HOSTILE = {
    "magic": (patched(0, ">4s", b"QFI\0"), ImageFormatError, "magic"),
    "version 0": (patched(4, ">I", 0), ImageFormatError, "version at byte 4 is 0"),
    "version 4": (patched(4, ">I", 4), ImageFormatError, "version at byte 4 is 4"),
    "cluster_bits 8": (patched(20, ">I", 8), ImageCorruptError, "is 8: must be 9"),
    "cluster_bits 22": (patched(20, ">I", 22), ImageCorruptError, "is 22"),
    "cluster_bits 63": (patched(20, ">I", 63), ImageCorruptError, "is 63"),
    "header 96": (patched(100, ">I", 96), ImageCorruptError, "header_length.*96"),
    "header 108": (patched(100, ">I", 108), ImageCorruptError, "header_length.*108"),
    "header > cluster": (patched(100, ">I", 4104), ImageCorruptError, "header_length"),
    "refcount_order 7": (patched(96, ">I", 7), ImageCorruptError, "refcount_order.* 7"),
    "short v2": (base()[:71], ImageCorruptError, "71 bytes"),
    "short v3": (base()[:103], ImageCorruptError, "103 bytes"),
    "l1 empty": (patched(36, ">I", 0), ImageCorruptError, "l1_size at byte 36 is 0"),
    "l1 too big": (patched(36, ">I", 4194305), ImageCorruptError, "l1_size.*at most"),
    "l1 too small": (patched(36, ">I", 4), ImageCorruptError, "need 5"),
    "l1 unaligned": (patched(40, ">Q", 12289), ImageCorruptError, "l1_table.*aligned"),
    "l1 over header": (patched(40, ">Q", 0), ImageCorruptError, "l1_table.*header"),
    "l1 past end": (
        patched(40, ">Q", FILE_SIZE), ImageCorruptError, "l1_table.*past the end"),
    "l1 over reftable": (patched(40, ">Q", CLUSTER), ImageCorruptError, "overlap"),
    "l1 at 2^63": (patched(40, ">Q", 1 << 63), ImageCorruptError, "l1_table.*past"),
    "reftable 0": (patched(56, ">I", 0), ImageCorruptError, "refcount_table_clusters"),
    "reftable huge": (patched(56, ">I", 2049), ImageCorruptError, "at most 2048"),
    "reftable unaligned": (patched(48, ">Q", 1), ImageCorruptError, "aligned"),
    "reftable past end": (
        patched(48, ">Q", FILE_SIZE), ImageCorruptError, "refcount_table.*past"),
    "65537 snapshots": (patched(60, ">I", 65537), ImageCorruptError, "nb_snapshots"),
    "snapshots unaligned": (patched(64, ">Q", 8), ImageCorruptError, "snapshots_offset"),
    "snapshots past end": (
        patched(60, ">IQ", 1, FILE_SIZE), ImageCorruptError, "snapshots_offset.*past"),
    "unknown bit": (patched(72, ">Q", 1 << 40), ImageFormatError, "bit 40"),
    "compression type": (patched(104, ">B", 7), ImageFormatError, "is 7"),
    "zstd without bit": (patched(104, ">B", 1), ImageCorruptError, "bit 3"),
    "bit without zstd": (patched(72, ">Q", 8), ImageCorruptError, "bit 3"),
    "raw bit alone": (patched(88, ">Q", 2), ImageCorruptError, "external data"),
    "ext L2 4k": (patched(72, ">Q", 16), ImageCorruptError, "extended L2"),
    "crypt 3": (patched(32, ">I", 3), ImageFormatError, "crypt_method.* 3"),
    "luks without header": (patched(32, ">I", 2), ImageCorruptError, "missing"),
    "backing > cluster": (
        patched(8, ">QI", 4097, 1), ImageCorruptError, "backing_file_offset"),
    "backing in header": (
        patched(8, ">QI", 100, 4), ImageCorruptError, "backing_file_offset"),
    "backing 1024": (patched(8, ">QI", 2000, 1024), ImageCorruptError, "1024"),
    "backing cut": (patched(8, ">QI", 4090, 7), ImageCorruptError, "at most 6"),
    "size 2^64": (patched(24, ">Q", (1 << 64) - 512), ImageCorruptError, "need"),
    "extension too long": (
        patched(112, ">II", 5, 5000), ImageCorruptError, "extension 0x00000005"),
    "format too long": (
        base(extensions=((extensions.EXTENSION_BACKING_FORMAT, bytes(16)),)),
        ImageCorruptError, "backing format"),
    "format twice": (
        base(extensions=((extensions.EXTENSION_BACKING_FORMAT, b"raw"),) * 2),
        ImageCorruptError, "appears again"),
    "luks unaligned": (
        base(
            crypt_method=CRYPT_LUKS,
            extensions=((extensions.EXTENSION_LUKS, struct.pack(">QQ", 100, 8)),),
        ),
        ImageCorruptError, "encryption header"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_by_name(case: str) -> None:
    data, error, text = HOSTILE[case]
    file_size = len(data) if len(data) < 112 else FILE_SIZE
    with pytest.raises(error, match=text):
        parse_header(data, file_size)


def test_unknown_feature_is_refused_by_the_images_own_name_for_it() -> None:
    row = struct.pack(">BB46s", 0, 40, b"time travel")
    data = base(
        incompatible_features=1 << 40 | 1 << 41,
        extensions=((extensions.EXTENSION_FEATURE_NAMES, row),),
    )
    with pytest.raises(ImageFormatError, match="'time travel', bit 41"):
        parse_header(data, FILE_SIZE)


def test_truncated_file_loses_its_tables() -> None:
    data = base()
    assert parse_header(data, 3 * CLUSTER + 40).l1_size == 5
    with pytest.raises(ImageCorruptError, match="l1_table_offset"):
        parse_header(data, 3 * CLUSTER + 39)


def test_unknown_extensions_fields_and_compatible_bits_are_kept() -> None:
    header = parse_header(
        base(
            header_length=128,
            unknown_fields=bytes(range(1, 24)),
            compatible_features=1 << 50,
            autoclear_features=1 << 51,
            extensions=((0x12345678, b"keep me"), (0x12345678, b"twice")),
            backing_name=b"base",
        ),
        FILE_SIZE,
    )
    again = parse_header(encode_header(header), FILE_SIZE)
    assert again == header
    assert again.extension(0x12345678) == b"keep me"
    assert again.unknown_fields == bytes(range(1, 24))


def test_header_of_104_bytes_and_version_2_stay_so() -> None:
    for header in (
        parse_header(base(header_length=104, unknown_fields=b""), FILE_SIZE),
        parse_header(base(version=2, header_length=72, unknown_fields=b""), FILE_SIZE),
    ):
        assert parse_header(encode_header(header), FILE_SIZE) == header


def test_what_does_not_fit_the_cluster_is_not_written() -> None:
    with pytest.raises(ImageFormatError, match="needs"):
        base(cluster_bits=9, size=512, l1_size=1, backing_name=bytes(400))


def test_known_features_may_all_be_there_at_once() -> None:
    data = base(
        cluster_bits=14,
        size=1 << 20,
        l1_table_offset=3 << 14,
        refcount_table_offset=1 << 14,
        incompatible_features=4 | 16,
        crypt_method=1,
    )
    header = parse_header(data, FILE_SIZE)
    assert header.external_data
    assert header.extended_l2


def test_corrupt_is_read_only_and_dirty_is_told() -> None:
    corrupt = parse_header(base(incompatible_features=2), FILE_SIZE)
    with pytest.raises(ImageCorruptError, match="read-only"):
        require_writable(corrupt)
    dirty = parse_header(base(incompatible_features=1), FILE_SIZE)
    require_writable(dirty)
    assert dirty.dirty
    assert not corrupt.dirty


def test_groups_lie_where_the_fields_are() -> None:
    data = bytearray(base().ljust(CLUSTER, b"\0"))
    for offset, group in (
        (L1_GROUP_OFFSET, encode_l1_group(7, 5 * CLUSTER)),
        (REFCOUNT_TABLE_GROUP_OFFSET, encode_refcount_table_group(8 * CLUSTER, 2)),
        (SNAPSHOTS_GROUP_OFFSET, encode_snapshots_group(3, 6 * CLUSTER)),
    ):
        data[offset : offset + len(group)] = group
    header = parse_header(bytes(data), FILE_SIZE)
    assert (header.l1_size, header.l1_table_offset) == (7, 5 * CLUSTER)
    assert header.refcount_table_offset == 8 * CLUSTER
    assert header.refcount_table_clusters == 2
    assert (header.nb_snapshots, header.snapshots_offset) == (3, 6 * CLUSTER)


@pytest.mark.parametrize(
    "fields",
    [(0, 0, 32, 4096), (65536, 0, 32, 4096), (1, 1, 32, 4096), (1, 0, 32, 4097),
     (1, 0, 1 << 30, 4096), (1, 0, 32, 0), (1, 0, 32, 1 << 63)],
)  # fmt: skip
def test_impossible_bitmaps_do_not_spoil_the_disk(fields: tuple[int, ...]) -> None:
    extension = struct.pack(">IIQQ", *fields)
    header = parse_header(
        base(extensions=((extensions.EXTENSION_BITMAPS, extension),)), FILE_SIZE
    )
    with pytest.raises(ImageCorruptError, match=r"bitmap"):
        extensions.parse_bitmaps_extension(extension, header.cluster_bits)


_FULL = base(
    backing_name=b"base.img",
    extensions=(
        (extensions.EXTENSION_BACKING_FORMAT, b"raw"),
        (extensions.EXTENSION_FEATURE_NAMES, extensions.encode_feature_names()),
        (0x99, b"unknown"),
    ),
)


@given(
    st.lists(
        st.tuples(st.integers(0, len(_FULL) - 1), st.integers(0, 255)), max_size=6
    ),
    st.integers(0, len(_FULL)),
    st.sampled_from([FILE_SIZE, 4096, 1 << 62]),
)
def test_any_mutation_parses_or_is_an_image_error(
    changes: list[tuple[int, int]], cut: int, file_size: int
) -> None:
    data = bytearray(_FULL)
    for offset, byte in changes:
        data[offset] = byte
    try:
        whole = parse_header(bytes(data), file_size)
    except ImageError:
        pass
    else:
        assert whole.l1_table_offset + whole.l1_size * 8 <= file_size
    try:
        parse_header(bytes(data[:cut]), cut)
    except ImageError:
        return
    raise AssertionError("a file of one cut cluster can't hold its tables")
