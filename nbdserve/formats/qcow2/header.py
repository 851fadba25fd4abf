"""The header of a qcow2 image: bytes in, a judged value out, and back.

Everything here follows docs/interop/qcow2.rst of qemu, sections "Header" and
"Header extensions". The first cluster holds the header proper, the extensions
and the name of the backing file, so that cluster is all a caller has to
read; `header_bytes_needed` tells how long it is from the first bytes.

A hostile number is refused where it enters: what `parse_header` returns can
be used as sizes and offsets without further thought.
"""

import struct
from dataclasses import dataclass, replace

from nbdserve.errors import ImageCorruptError, ImageFormatError
from nbdserve.formats.qcow2.extensions import (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_DATA_FILE,
    EXTENSION_FEATURE_NAMES,
    EXTENSION_LUKS,
    FEATURE_INCOMPATIBLE,
    encode_extensions,
    parse_extensions,
    parse_feature_names,
    parse_luks_extension,
)

MAGIC = b"QFI\xfb"

#: Bytes that tell how long the first cluster is (`header_bytes_needed`).
FIXED_LENGTH = 104
V2_LENGTH = 72
#: What `qemu-img create` writes: all known fields, padded to a multiple of 8.
CURRENT_LENGTH = 112

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MIN_EXTENDED_L2_CLUSTER_BITS = 14
MAX_REFCOUNT_ORDER = 6
MAX_BACKING_NAME = 1023
MAX_BACKING_FORMAT = 15
#: The limits that qemu enforces on tables, in bytes (block/qcow2.h).
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_OFFSET = (1 << 63) - 1

CRYPT_NONE = 0
CRYPT_AES = 1
CRYPT_LUKS = 2

INCOMPATIBLE_DIRTY = 1 << 0
INCOMPATIBLE_CORRUPT = 1 << 1
INCOMPATIBLE_DATA_FILE = 1 << 2
INCOMPATIBLE_COMPRESSION_TYPE = 1 << 3
INCOMPATIBLE_EXTENDED_L2 = 1 << 4
KNOWN_INCOMPATIBLE = (1 << 5) - 1

COMPATIBLE_LAZY_REFCOUNTS = 1 << 0

AUTOCLEAR_BITMAPS = 1 << 0
AUTOCLEAR_DATA_FILE_RAW = 1 << 1

COMPRESSION_DEFLATE = 0
COMPRESSION_ZSTD = 1

# Groups of fields that change together lie within sector 0 and are changed by
# one write each, so that a power cut leaves the old or the new group.
SIZE_OFFSET = 24
L1_GROUP_OFFSET = 36
REFCOUNT_TABLE_GROUP_OFFSET = 48
SNAPSHOTS_GROUP_OFFSET = 60
INCOMPATIBLE_OFFSET = 72
COMPATIBLE_OFFSET = 80
AUTOCLEAR_OFFSET = 88

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A qcow2 header, fields named as in the specification.

    Offsets and sizes are bytes, except where said otherwise.

    Attributes:
        version: 2 or 3.
        backing_file_offset: Where the backing name lies, 0 without one.
        backing_name: The name as it is stored, None without one.
        cluster_bits: log2 of the cluster size.
        size: Bytes of the disk; see `disk_size` for what a guest gets.
        crypt_method: `CRYPT_NONE`, `CRYPT_AES` or `CRYPT_LUKS`.
        l1_size: Entries of the active L1 table.
        l1_table_offset: 0 only if the table is empty.
        refcount_table_offset: Never 0.
        refcount_table_clusters: At least 1.
        nb_snapshots: Entries of the snapshot table.
        snapshots_offset: Where that table starts.
        incompatible_features: Bits; 0 for version 2, as the next two.
        compatible_features: Bits.
        autoclear_features: Bits.
        refcount_order: log2 of the refcount width in bits; 4 for version 2.
        header_length: Bytes of the header proper; 72 for version 2.
        compression_type: `COMPRESSION_DEFLATE` or `COMPRESSION_ZSTD`.
        unknown_fields: What follows the compression type up to
            `header_length`, kept as it is.
        extensions: (magic, data) in the order of the file, unknown ones
            included, without the end marker.
    """

    version: int = 3
    backing_file_offset: int = 0
    backing_name: bytes | None = None
    cluster_bits: int
    size: int
    crypt_method: int = CRYPT_NONE
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    header_length: int = CURRENT_LENGTH
    compression_type: int = COMPRESSION_DEFLATE
    unknown_fields: bytes = bytes(CURRENT_LENGTH - FIXED_LENGTH - 1)
    extensions: tuple[tuple[int, bytes], ...] = ()

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def disk_size(self) -> int:
        """Bytes that a guest sees: whole sectors, as in qemu."""
        return self.size & ~511

    @property
    def refcount_bits(self) -> int:
        """Width of a refcount."""
        return 1 << self.refcount_order

    @property
    def refcount_block_entries(self) -> int:
        """Clusters whose refcounts one refcount block holds."""
        return self.cluster_size * 8 // self.refcount_bits

    @property
    def refcount_table_entries(self) -> int:
        """Slots of the refcount table."""
        return self.refcount_table_clusters * self.cluster_size // 8

    @property
    def extended_l2(self) -> bool:
        """Whether L2 entries are 16 bytes, with subclusters."""
        return bool(self.incompatible_features & INCOMPATIBLE_EXTENDED_L2)

    @property
    def l2_entry_size(self) -> int:
        """Bytes of an L2 entry."""
        return 16 if self.extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        """Entries of an L2 table."""
        return self.cluster_size // self.l2_entry_size

    @property
    def l1_needed(self) -> int:
        """L1 entries that cover `size`; further ones hold VM state."""
        return l1_entries_for(self.size, self.cluster_bits, extended=self.extended_l2)

    @property
    def dirty(self) -> bool:
        """Whether refcounts may be wrong: rebuild them before writing."""
        return bool(self.incompatible_features & INCOMPATIBLE_DIRTY)

    @property
    def corrupt(self) -> bool:
        """Whether some writer found the image broken: only reading is safe."""
        return bool(self.incompatible_features & INCOMPATIBLE_CORRUPT)

    @property
    def external_data(self) -> bool:
        """Whether guest data lies in a file of its own."""
        return bool(self.incompatible_features & INCOMPATIBLE_DATA_FILE)

    @property
    def raw_data(self) -> bool:
        """Whether the external data file is a raw image of the disk by itself."""
        return bool(self.autoclear_features & AUTOCLEAR_DATA_FILE_RAW)

    @property
    def lazy_refcounts(self) -> bool:
        """Whether a writer may postpone refcounts while the dirty bit is set."""
        return bool(self.compatible_features & COMPATIBLE_LAZY_REFCOUNTS)

    @property
    def compat(self) -> str:
        """The version in qemu's words."""
        return "0.10" if self.version == 2 else "1.1"

    @property
    def luks(self) -> tuple[int, int] | None:
        """Where the LUKS header is, and its bytes with all key material."""
        extension = self.extension(EXTENSION_LUKS)
        if extension is None:
            return None
        return parse_luks_extension(extension, self.cluster_bits)

    @property
    def backing_format(self) -> str | None:
        """The format recorded for the backing file; bytes that are no text are escaped."""
        return self._text(EXTENSION_BACKING_FORMAT)

    @property
    def data_file_name(self) -> str | None:
        """The recorded name of the external data file."""
        return self._text(EXTENSION_DATA_FILE)

    @property
    def feature_names(self) -> dict[tuple[int, int], str]:
        """(type, bit number) -> name, from the image's own table."""
        table = self.extension(EXTENSION_FEATURE_NAMES) or b""
        return parse_feature_names(table)

    def extension(self, magic: int) -> bytes | None:
        """Return an extension's data, None if the image does not have it."""
        for known, data in self.extensions:
            if known == magic:
                return data
        return None

    def _text(self, magic: int) -> str | None:
        data = self.extension(magic)
        if data is None:
            return None
        return data.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def l1_entries_for(size: int, cluster_bits: int, *, extended: bool = False) -> int:
    """Return how many L1 entries map `size` bytes of disk."""
    covered_bits = 2 * cluster_bits - (4 if extended else 3)
    return (size + (1 << covered_bits) - 1) >> covered_bits


def header_bytes_needed(data: bytes) -> int:
    """Return how many bytes of the file `parse_header` has to see.

    Args:
        data: The first 24 bytes or more.

    Returns:
        The cluster size: 512 bytes to 2 MiB. A file may be shorter; then all
        of it is enough.

    Raises:
        ImageFormatError: Not a qcow2 image, or of an unknown version.
        ImageCorruptError: The cluster size is not allowed.
    """
    if data[:4] != MAGIC:
        raise ImageFormatError("not a qcow2 image: the magic at byte 0 is missing")
    if len(data) < 24:
        raise ImageCorruptError(
            f"the file has {len(data)} bytes: shorter than a qcow2 header"
        )
    version, cluster_bits = struct.unpack_from(">I12xI", data, 4)
    if version not in (2, 3):
        raise ImageFormatError(
            f"version at byte 4 is {version}: only qcow2 versions 2 and 3 are known"
        )
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise ImageCorruptError(
            f"cluster_bits at byte 20 is {cluster_bits}: must be"
            f" {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}"
        )
    return 1 << int(cluster_bits)


def parse_header(data: bytes, file_size: int) -> Header:
    """Read and judge a header.

    Args:
        data: The file's beginning: at least min(`file_size`,
            `header_bytes_needed(data)`) bytes. More does no harm.
        file_size: Bytes of the image file; the tables must lie inside.

    Raises:
        ImageFormatError: Not qcow2, an unknown version, method or
            incompatible feature.
        ImageCorruptError: A field contradicts the specification, another
            field, or the length of the file.
    """
    cluster_size = header_bytes_needed(data)
    data = bytes(data[:cluster_size])
    header = _parse_fields(data)
    _check_backing(header, _u32(data, 16))
    extensions_end = header.backing_file_offset or cluster_size
    header = replace(
        header, extensions=parse_extensions(data, header.header_length, extensions_end)
    )
    _check_features(header)
    _check_extensions(header)
    _check_tables(header, file_size)
    return replace(header, backing_name=_backing_name(data, header))


def _u32(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "big")


def _parse_fields(data: bytes) -> Header:
    if len(data) < V2_LENGTH:
        raise ImageCorruptError(
            f"the file has {len(data)} bytes: shorter than a qcow2 header"
        )
    (
        _magic,
        version,
        backing_file_offset,
        _backing_file_size,
        cluster_bits,
        size,
        crypt_method,
        l1_size,
        l1_table_offset,
        refcount_table_offset,
        refcount_table_clusters,
        nb_snapshots,
        snapshots_offset,
    ) = _V2.unpack_from(data)
    header = Header(
        version=version,
        backing_file_offset=backing_file_offset,
        cluster_bits=cluster_bits,
        size=size,
        crypt_method=crypt_method,
        l1_size=l1_size,
        l1_table_offset=l1_table_offset,
        refcount_table_offset=refcount_table_offset,
        refcount_table_clusters=refcount_table_clusters,
        nb_snapshots=nb_snapshots,
        snapshots_offset=snapshots_offset,
        header_length=V2_LENGTH,
        unknown_fields=b"",
    )
    return header if version == 2 else _parse_v3_fields(data, header)


def _parse_v3_fields(data: bytes, header: Header) -> Header:
    if len(data) < FIXED_LENGTH:
        raise ImageCorruptError(
            f"the file has {len(data)} bytes: shorter than a version 3 header"
        )
    incompatible, compatible, autoclear, order, length = _V3.unpack_from(
        data, V2_LENGTH
    )
    if length < FIXED_LENGTH or length % 8:
        raise ImageCorruptError(
            f"header_length at byte 100 is {length}: must be a multiple of 8, at"
            f" least {FIXED_LENGTH}"
        )
    if length > min(header.cluster_size, len(data)):
        raise ImageCorruptError(
            f"header_length at byte 100 is {length}: runs past the first cluster or"
            " the end of the file"
        )
    if order > MAX_REFCOUNT_ORDER:
        raise ImageCorruptError(
            f"refcount_order at byte 96 is {order}: at most {MAX_REFCOUNT_ORDER}"
        )
    return replace(
        header,
        incompatible_features=incompatible,
        compatible_features=compatible,
        autoclear_features=autoclear,
        refcount_order=order,
        header_length=length,
        compression_type=data[104] if length > FIXED_LENGTH else COMPRESSION_DEFLATE,
        unknown_fields=data[105:length],
    )


def _check_backing(header: Header, length: int) -> None:
    offset = header.backing_file_offset
    if offset == 0:
        return
    if offset > header.cluster_size or offset < header.header_length:
        raise ImageCorruptError(
            f"backing_file_offset at byte 8 is {offset}: must lie behind the header"
            f" in the first cluster ({header.header_length} to {header.cluster_size})"
        )
    limit = min(MAX_BACKING_NAME, header.cluster_size - offset)
    if length > limit:
        raise ImageCorruptError(
            f"backing_file_size at byte 16 is {length}: at most {limit} here"
        )


def _backing_name(data: bytes, header: Header) -> bytes | None:
    offset = header.backing_file_offset
    length = _u32(data, 16) if offset else 0
    if length == 0:
        return None
    name = data[offset : offset + length]
    if len(name) < length:
        raise ImageCorruptError(
            f"the backing file name at byte {offset} runs past the end of the file"
        )
    return name


def _bits(mask: int) -> list[int]:
    return [bit for bit in range(64) if mask >> bit & 1]


def _check_features(header: Header) -> None:
    unknown = header.incompatible_features & ~KNOWN_INCOMPATIBLE
    if unknown:
        names = header.feature_names
        listed = ", ".join(
            repr(names[FEATURE_INCOMPATIBLE, bit])
            if (FEATURE_INCOMPATIBLE, bit) in names
            else f"bit {bit}"
            for bit in _bits(unknown)
        )
        raise ImageFormatError(
            f"incompatible_features at byte 72 asks for unknown features: {listed}"
        )
    announced = bool(header.incompatible_features & INCOMPATIBLE_COMPRESSION_TYPE)
    if header.compression_type not in (COMPRESSION_DEFLATE, COMPRESSION_ZSTD):
        raise ImageFormatError(
            f"compression_type at byte 104 is {header.compression_type}: only 0"
            " (deflate) and 1 (zstd) are known"
        )
    if announced != (header.compression_type != COMPRESSION_DEFLATE):
        raise ImageCorruptError(
            f"compression_type at byte 104 is {header.compression_type}, but bit 3 of"
            f" incompatible_features is {int(announced)}"
        )
    if header.extended_l2 and header.cluster_bits < MIN_EXTENDED_L2_CLUSTER_BITS:
        raise ImageCorruptError(
            f"extended L2 entries with clusters of {header.cluster_size} bytes: at"
            f" least {1 << MIN_EXTENDED_L2_CLUSTER_BITS} are needed"
        )
    raw_data = header.autoclear_features & AUTOCLEAR_DATA_FILE_RAW
    if raw_data and not header.external_data:
        raise ImageCorruptError(
            "autoclear_features at byte 88 say raw external data, but the image has"
            " no external data file"
        )


def _check_extensions(header: Header) -> None:
    if header.crypt_method not in (CRYPT_NONE, CRYPT_AES, CRYPT_LUKS):
        raise ImageFormatError(
            f"crypt_method at byte 32 is {header.crypt_method}: unknown"
        )
    backing_format = header.extension(EXTENSION_BACKING_FORMAT)
    if backing_format is not None and len(backing_format) > MAX_BACKING_FORMAT:
        raise ImageCorruptError(
            f"the backing format extension has {len(backing_format)} bytes: at most"
            f" {MAX_BACKING_FORMAT}"
        )
    luks = header.extension(EXTENSION_LUKS)
    if (luks is not None) != (header.crypt_method == CRYPT_LUKS):
        raise ImageCorruptError(
            f"crypt_method at byte 32 is {header.crypt_method}, but the encryption"
            f" header extension is {'missing' if luks is None else 'present'}"
        )
    if luks is not None:
        parse_luks_extension(luks, header.cluster_bits)


def _check_tables(header: Header, file_size: int) -> None:
    """Judge where tables lie.

    A fresh image ends right behind the used bytes of its L1 table, not at the
    end of that table's last cluster (seen with qemu-img create 7.2, all
    cluster sizes). So the bytes in use have to be in the file, and no more.
    """
    l1_bytes = header.l1_size * 8
    refcount_bytes = header.refcount_table_clusters * header.cluster_size
    if l1_bytes > MAX_L1_BYTES:
        raise ImageCorruptError(
            f"l1_size at byte 36 is {header.l1_size}: at most {MAX_L1_BYTES // 8}"
        )
    if header.l1_size < header.l1_needed:
        raise ImageCorruptError(
            f"l1_size at byte 36 is {header.l1_size}: {header.size} bytes of disk"
            f" need {header.l1_needed}"
        )
    if header.refcount_table_clusters == 0:
        raise ImageCorruptError(
            "refcount_table_clusters at byte 56 is 0: the image has no refcount table"
        )
    if refcount_bytes > MAX_REFCOUNT_TABLE_BYTES:
        raise ImageCorruptError(
            f"refcount_table_clusters at byte 56 is {header.refcount_table_clusters}:"
            f" at most {MAX_REFCOUNT_TABLE_BYTES // header.cluster_size}"
        )
    if header.nb_snapshots > MAX_SNAPSHOTS:
        raise ImageCorruptError(
            f"nb_snapshots at byte 60 is {header.nb_snapshots}: at most {MAX_SNAPSHOTS}"
        )
    # A snapshot table entry has at least 40 bytes.
    for name, at, host_offset, length in (
        ("l1_table_offset", 40, header.l1_table_offset, l1_bytes),
        ("refcount_table_offset", 48, header.refcount_table_offset, refcount_bytes),
        ("snapshots_offset", 64, header.snapshots_offset, header.nb_snapshots * 40),
    ):
        _check_table(
            f"{name} at byte {at}", host_offset, length, header.cluster_size, file_size
        )
    if (
        header.l1_table_offset < header.refcount_table_offset + refcount_bytes
        and header.refcount_table_offset < header.l1_table_offset + l1_bytes
    ):
        raise ImageCorruptError(
            f"the L1 table at {header.l1_table_offset:#x} and the refcount table at"
            f" {header.refcount_table_offset:#x} overlap"
        )


def _check_table(
    field: str, host_offset: int, length: int, cluster_size: int, file_size: int
) -> None:
    if host_offset % cluster_size:
        raise ImageCorruptError(
            f"{field} is {host_offset:#x}: not aligned to a cluster of"
            f" {cluster_size} bytes"
        )
    if length == 0:
        return
    if host_offset == 0:
        raise ImageCorruptError(f"{field} is 0: that is the header's cluster")
    if host_offset + length > file_size:
        raise ImageCorruptError(
            f"{field} is {host_offset:#x}: the table's {length} bytes run past the end"
            f" of the file ({file_size} bytes)"
        )


def require_writable(header: Header) -> None:
    """Refuse to write an image that says it is broken.

    Raises:
        ImageCorruptError: The corrupt bit is set.
    """
    if header.corrupt:
        raise ImageCorruptError(
            "marked as corrupt (bit 1 of incompatible_features): it can only be opened"
            " read-only"
        )


def encode_header(header: Header) -> bytes:
    """Return the beginning of the first cluster for `header`.

    The version and `header_length` are kept, and so are unknown fields and
    extensions. The backing name stays at `backing_file_offset` if the
    extensions leave that place free, else it follows them.

    Returns:
        Bytes from offset 0 to the end of the backing name, or of the
        extensions' end marker. Whatever follows in the cluster has no meaning.

    Raises:
        ImageFormatError: All of it does not fit into the first cluster.
    """
    extensions = encode_extensions(header.extensions)
    name = header.backing_name or b""
    name_offset = header.header_length + len(extensions)
    name_offset = max(header.backing_file_offset, name_offset)
    parts = [
        _V2.pack(
            MAGIC,
            header.version,
            name_offset if name else 0,
            len(name),
            header.cluster_bits,
            header.size,
            header.crypt_method,
            header.l1_size,
            header.l1_table_offset,
            header.refcount_table_offset,
            header.refcount_table_clusters,
            header.nb_snapshots,
            header.snapshots_offset,
        )
    ]
    if header.version > 2:
        parts.append(
            _V3.pack(
                header.incompatible_features,
                header.compatible_features,
                header.autoclear_features,
                header.refcount_order,
                header.header_length,
            )
        )
        if header.header_length > FIXED_LENGTH:
            parts += [bytes([header.compression_type]), header.unknown_fields]
    encoded = b"".join([*parts, extensions])
    if name:
        encoded = encoded.ljust(name_offset, b"\0") + name
    if len(encoded) > header.cluster_size:
        raise ImageFormatError(
            f"the header with its extensions and the backing file name needs"
            f" {len(encoded)} bytes, a cluster has {header.cluster_size}"
        )
    return encoded


def encode_l1_group(l1_size: int, l1_table_offset: int) -> bytes:
    """Return the bytes for `L1_GROUP_OFFSET`."""
    return struct.pack(">IQ", l1_size, l1_table_offset)


def encode_refcount_table_group(host_offset: int, clusters: int) -> bytes:
    """Return the bytes for `REFCOUNT_TABLE_GROUP_OFFSET`."""
    return struct.pack(">QI", host_offset, clusters)


def encode_snapshots_group(nb_snapshots: int, snapshots_offset: int) -> bytes:
    """Return the bytes for `SNAPSHOTS_GROUP_OFFSET`."""
    return struct.pack(">IQ", nb_snapshots, snapshots_offset)


def encode_u64(value: int) -> bytes:
    """Return the bytes for a field of its own: the size, or a word of features."""
    return value.to_bytes(8, "big")
