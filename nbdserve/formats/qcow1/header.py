"""The header of a qcow version 1 image: bytes in, a judged value out, and back.

The format has no specification; these are the rules that qemu's driver
(block/qcow.c) enforces, plus one: the L1 table has to lie inside the file.
The header is 48 bytes; the name of the backing file may lie anywhere
behind it and follows it at once in all images known.
"""

import struct
from dataclasses import dataclass, replace

from nbdserve.errors import ImageCorruptError, ImageFormatError

MAGIC = b"QFI\xfb"
VERSION = 1
LENGTH = 48

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 16
MIN_L2_BITS = 6
MAX_L2_BITS = 13
MAX_BACKING_NAME = 1023
#: The name follows the header in practice; a file that puts it past this is refused.
MAX_BACKING_OFFSET = 2 << 20
MAX_L1_ENTRIES = ((1 << 31) - 1) // 8

CRYPT_NONE = 0
CRYPT_AES = 1

_HEADER = struct.Struct(">4sIQIIQBBHIQ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A qcow version 1 header; offsets and sizes are bytes.

    Attributes:
        backing_file_offset: Where the backing name lies, 0 without one.
        backing_name: The name as it is stored, None without one.
        mtime: Meant as the backing file's time, ignored by everyone.
        size: Bytes of the disk; see `disk_size` for what a guest gets.
        cluster_bits: log2 of the cluster size.
        l2_bits: log2 of the entries of an L2 table.
        crypt_method: `CRYPT_NONE` or `CRYPT_AES`.
        l1_table_offset: Need not be aligned.
    """

    backing_file_offset: int = 0
    backing_name: bytes | None = None
    mtime: int = 0
    size: int
    cluster_bits: int
    l2_bits: int
    crypt_method: int = CRYPT_NONE
    l1_table_offset: int

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def disk_size(self) -> int:
        """Bytes that a guest sees: whole sectors, as in qemu."""
        return self.size & ~511

    @property
    def l2_entries(self) -> int:
        """Entries of an L2 table."""
        return 1 << self.l2_bits

    @property
    def l2_bytes(self) -> int:
        """Bytes of an L2 table; it may be larger or smaller than a cluster."""
        return 8 << self.l2_bits

    @property
    def l1_size(self) -> int:
        """Entries of the L1 table; the format does not store it."""
        covered_bits = self.cluster_bits + self.l2_bits
        return (self.size + (1 << covered_bits) - 1) >> covered_bits


def header_bytes_needed(data: bytes) -> int:
    """Return how many bytes of the file `parse_header` has to see.

    Args:
        data: The first 48 bytes or more.

    Returns:
        At most `MAX_BACKING_OFFSET` + `MAX_BACKING_NAME`: 2 MiB and a bit.

    Raises:
        ImageFormatError: Not a qcow version 1 image.
        ImageCorruptError: The backing file's name can't be where it is said to be.
    """
    header, name_length = _parse_fields(data)
    return max(LENGTH, header.backing_file_offset + name_length)


def parse_header(data: bytes, file_size: int) -> Header:
    """Read and judge a header.

    Args:
        data: The file's beginning: at least min(`file_size`,
            `header_bytes_needed(data)`) bytes. More does no harm.
        file_size: Bytes of the image file; the L1 table must lie inside.

    Raises:
        ImageFormatError: Not qcow version 1, or an unknown encryption.
        ImageCorruptError: A field is out of range or points past the file.
    """
    header, name_length = _parse_fields(data)
    _check_geometry(header)
    _check_l1(header, file_size)
    if name_length == 0:
        return header
    start = header.backing_file_offset
    name = bytes(data[start : start + name_length])
    if len(name) < name_length:
        raise ImageCorruptError(
            f"the backing file name at byte {start} runs past the end of the file"
        )
    return replace(header, backing_name=name)


def _parse_fields(data: bytes) -> tuple[Header, int]:
    if len(data) < 8 or data[:4] != MAGIC:
        raise ImageFormatError("not a qcow image: the magic at byte 0 is missing")
    version = int.from_bytes(data[4:8], "big")
    if version != VERSION:
        raise ImageFormatError(f"version at byte 4 is {version}: not qcow version 1")
    if len(data) < LENGTH:
        raise ImageCorruptError(
            f"the file has {len(data)} bytes: shorter than a qcow header"
        )
    (
        _magic,
        _version,
        backing_file_offset,
        backing_file_size,
        mtime,
        size,
        cluster_bits,
        l2_bits,
        _padding,
        crypt_method,
        l1_table_offset,
    ) = _HEADER.unpack_from(data)
    if backing_file_offset:
        if backing_file_size > MAX_BACKING_NAME:
            raise ImageCorruptError(
                f"backing_file_size at byte 16 is {backing_file_size}: at most"
                f" {MAX_BACKING_NAME}"
            )
        if not LENGTH <= backing_file_offset <= MAX_BACKING_OFFSET:
            raise ImageCorruptError(
                f"backing_file_offset at byte 8 is {backing_file_offset}: must be"
                f" {LENGTH} to {MAX_BACKING_OFFSET}"
            )
    header = Header(
        backing_file_offset=backing_file_offset,
        mtime=mtime,
        size=size,
        cluster_bits=cluster_bits,
        l2_bits=l2_bits,
        crypt_method=crypt_method,
        l1_table_offset=l1_table_offset,
    )
    return header, backing_file_size if backing_file_offset else 0


def _check_geometry(header: Header) -> None:
    if header.size < 2:
        raise ImageCorruptError(f"size at byte 24 is {header.size}: at least 2")
    if not MIN_CLUSTER_BITS <= header.cluster_bits <= MAX_CLUSTER_BITS:
        raise ImageCorruptError(
            f"cluster_bits at byte 32 is {header.cluster_bits}: must be"
            f" {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}"
        )
    if not MIN_L2_BITS <= header.l2_bits <= MAX_L2_BITS:
        raise ImageCorruptError(
            f"l2_bits at byte 33 is {header.l2_bits}: must be {MIN_L2_BITS} to"
            f" {MAX_L2_BITS}"
        )
    if header.crypt_method not in (CRYPT_NONE, CRYPT_AES):
        raise ImageFormatError(
            f"crypt_method at byte 36 is {header.crypt_method}: unknown"
        )


def _check_l1(header: Header, file_size: int) -> None:
    covered_bits = header.cluster_bits + header.l2_bits
    if header.size > (1 << 64) - 1 - (1 << covered_bits):
        raise ImageCorruptError(f"size at byte 24 is {header.size}: too large")
    if header.l1_size > MAX_L1_ENTRIES:
        raise ImageCorruptError(
            f"size at byte 24 is {header.size}: needs {header.l1_size} L1 entries, at"
            f" most {MAX_L1_ENTRIES}"
        )
    if header.l1_table_offset < LENGTH:
        raise ImageCorruptError(
            f"l1_table_offset at byte 40 is {header.l1_table_offset}: lies in the header"
        )
    if header.l1_table_offset + header.l1_size * 8 > file_size:
        raise ImageCorruptError(
            f"l1_table_offset at byte 40 is {header.l1_table_offset:#x}: the table's"
            f" {header.l1_size * 8} bytes run past the end of the file"
            f" ({file_size} bytes)"
        )


def encode_header(header: Header) -> bytes:
    """Return the file's beginning for `header`.

    Returns:
        Bytes from offset 0 to the end of the header, or of the backing name,
        which follows the header unless `backing_file_offset` says otherwise.
    """
    name = header.backing_name or b""
    name_offset = max(header.backing_file_offset, LENGTH) if name else 0
    encoded = _HEADER.pack(
        MAGIC,
        VERSION,
        name_offset,
        len(name),
        header.mtime,
        header.size,
        header.cluster_bits,
        header.l2_bits,
        0,
        header.crypt_method,
        header.l1_table_offset,
    )
    return encoded.ljust(name_offset, b"\0") + name
