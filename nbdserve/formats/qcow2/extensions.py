"""The header extensions of a qcow2 image: what lies between header and backing name.

docs/interop/qcow2.rst of qemu, sections "Header extensions", "Feature name
table", "Bitmaps extension" and "Full disk encryption header pointer".
Extensions that nobody knows are kept as they are.
"""

import struct
from dataclasses import dataclass

from nbdserve.errors import ImageCorruptError

#: (magic, data) in the order of the file.
Extensions = tuple[tuple[int, bytes], ...]

EXTENSION_END = 0
EXTENSION_BACKING_FORMAT = 0xE2792ACA
EXTENSION_FEATURE_NAMES = 0x6803F857
EXTENSION_BITMAPS = 0x23852875
EXTENSION_LUKS = 0x0537BE77
EXTENSION_DATA_FILE = 0x44415441
KNOWN_EXTENSIONS = {
    EXTENSION_BACKING_FORMAT: "backing format",
    EXTENSION_FEATURE_NAMES: "feature name table",
    EXTENSION_BITMAPS: "bitmaps",
    EXTENSION_LUKS: "encryption header",
    EXTENSION_DATA_FILE: "external data file name",
}

FEATURE_INCOMPATIBLE = 0
FEATURE_COMPATIBLE = 1
FEATURE_AUTOCLEAR = 2
#: (type, bit number) -> name, as qemu writes them into new images.
FEATURE_NAMES = {
    (FEATURE_INCOMPATIBLE, 0): "dirty bit",
    (FEATURE_INCOMPATIBLE, 1): "corrupt bit",
    (FEATURE_INCOMPATIBLE, 2): "external data file",
    (FEATURE_INCOMPATIBLE, 3): "compression type",
    (FEATURE_INCOMPATIBLE, 4): "extended L2 entries",
    (FEATURE_COMPATIBLE, 0): "lazy refcounts",
    (FEATURE_AUTOCLEAR, 0): "bitmaps",
    (FEATURE_AUTOCLEAR, 1): "raw external data",
}

#: The limits that qemu enforces (block/qcow2.h).
MAX_BITMAPS = 65535
MAX_BITMAP_DIRECTORY_BYTES = 1024 * MAX_BITMAPS
#: Eight slots of key material, 2 MiB at most, and whatever a tool aligns that to.
MAX_LUKS_BYTES = 16 << 20
_MAX_OFFSET = (1 << 63) - 1

_EXTENSION = struct.Struct(">II")
_FEATURE_NAME = struct.Struct(">BB46s")
_BITMAPS = struct.Struct(">IIQQ")
_LUKS = struct.Struct(">QQ")


@dataclass(frozen=True, slots=True)
class BitmapsExtension:
    """Where the persistent bitmaps are listed.

    Attributes:
        nb_bitmaps: Entries of the directory.
        directory_size: Bytes.
        directory_offset: Bytes.
    """

    nb_bitmaps: int
    directory_size: int
    directory_offset: int


def parse_extensions(data: bytes, start: int, end: int) -> Extensions:
    """Read the header extensions that lie between two offsets.

    Args:
        data: The first cluster, or what the file has of it.
        start: Where the header proper ends.
        end: Where the backing name begins, or the cluster ends.

    Raises:
        ImageCorruptError: One runs past `end`, or a known one appears twice.
    """
    found: list[tuple[int, bytes]] = []
    seen: set[int] = set()
    end = min(end, len(data))
    offset = start
    while offset + _EXTENSION.size <= end:
        magic, length = _EXTENSION.unpack_from(data, offset)
        if magic == EXTENSION_END:
            break
        body = offset + _EXTENSION.size
        if length > end - body:
            raise ImageCorruptError(
                f"the header extension {magic:#010x} at byte {offset} has {length}"
                f" bytes: only {end - body} are left"
            )
        if magic in seen and magic in KNOWN_EXTENSIONS:
            raise ImageCorruptError(
                f"the header extension {magic:#010x} ({KNOWN_EXTENSIONS[magic]})"
                f" appears again at byte {offset}"
            )
        seen.add(magic)
        found.append((magic, data[body : body + length]))
        offset = body + (length + 7 & ~7)
    return tuple(found)


def encode_extensions(extensions: Extensions) -> bytes:
    """Return the extensions with their padding and the end marker."""
    return b"".join(
        _EXTENSION.pack(magic, len(data)) + data.ljust(len(data) + 7 & ~7, b"\0")
        for magic, data in (*extensions, (EXTENSION_END, b""))
    )


def parse_feature_names(table: bytes) -> dict[tuple[int, int], str]:
    """Read a feature name table; a cut last row is ignored.

    Returns:
        (type, bit number) -> name.
    """
    whole = len(table) // _FEATURE_NAME.size * _FEATURE_NAME.size
    return {
        (kind, bit): name.partition(b"\0")[0].decode("utf-8", "backslashreplace")
        for kind, bit, name in _FEATURE_NAME.iter_unpack(table[:whole])
    }


def encode_feature_names() -> bytes:
    """Return the feature name table that new images carry."""
    return b"".join(
        _FEATURE_NAME.pack(kind, bit, name.encode())
        for (kind, bit), name in FEATURE_NAMES.items()
    )


def encode_luks_extension(host_offset: int, length: int) -> bytes:
    """Return the data of the extension that names the LUKS header."""
    return _LUKS.pack(host_offset, length)


def parse_luks_extension(data: bytes, cluster_bits: int) -> tuple[int, int]:
    """Return (host offset, bytes) of the LUKS header.

    Raises:
        ImageCorruptError: Not 16 bytes, or not aligned to a cluster.
    """
    if len(data) != _LUKS.size:
        raise ImageCorruptError(
            f"the encryption header extension has {len(data)} bytes, not {_LUKS.size}"
        )
    host_offset, length = _LUKS.unpack(data)
    unaligned = host_offset & ((1 << cluster_bits) - 1)
    if unaligned or host_offset > _MAX_OFFSET or length > MAX_LUKS_BYTES:
        raise ImageCorruptError(
            f"the encryption header at {host_offset:#x} with {length} bytes is not"
            " aligned to a cluster or too long"
        )
    return host_offset, length


def parse_bitmaps_extension(data: bytes, cluster_bits: int) -> BitmapsExtension:
    """Read the bitmaps extension.

    `parse_header` leaves this to whoever wants the bitmaps: a disk is usable
    without them.

    Raises:
        ImageCorruptError: A number in it is not allowed.
    """
    if len(data) != _BITMAPS.size:
        raise ImageCorruptError(
            f"the bitmaps extension has {len(data)} bytes, not {_BITMAPS.size}"
        )
    nb_bitmaps, reserved, directory_size, directory_offset = _BITMAPS.unpack(data)
    if not 1 <= nb_bitmaps <= MAX_BITMAPS:
        raise ImageCorruptError(
            f"nb_bitmaps is {nb_bitmaps}: must be 1 to {MAX_BITMAPS}"
        )
    if reserved:
        raise ImageCorruptError(
            f"the bitmaps extension's reserved field is {reserved:#x}, not 0"
        )
    if directory_size > MAX_BITMAP_DIRECTORY_BYTES:
        raise ImageCorruptError(
            f"bitmap_directory_size is {directory_size}: at most"
            f" {MAX_BITMAP_DIRECTORY_BYTES}"
        )
    unaligned = directory_offset & ((1 << cluster_bits) - 1)
    if not 0 < directory_offset <= _MAX_OFFSET or unaligned:
        raise ImageCorruptError(
            f"bitmap_directory_offset {directory_offset:#x} is not aligned to a cluster"
            " or too large"
        )
    return BitmapsExtension(nb_bitmaps, directory_size, directory_offset)


def encode_bitmaps_extension(extension: BitmapsExtension) -> bytes:
    """Return the data of the bitmaps extension."""
    return _BITMAPS.pack(
        extension.nb_bitmaps, 0, extension.directory_size, extension.directory_offset
    )


def with_bitmaps(
    extensions: Extensions, bitmaps: BitmapsExtension | None
) -> Extensions:
    """Return extensions with another bitmaps extension, or without one."""
    others = [each for each in extensions if each[0] != EXTENSION_BITMAPS]
    magics = [magic for magic, _ in extensions]
    if bitmaps is not None:
        place = (
            magics.index(EXTENSION_BITMAPS)
            if EXTENSION_BITMAPS in magics
            else len(others)
        )
        others.insert(place, (EXTENSION_BITMAPS, encode_bitmaps_extension(bitmaps)))
    return tuple(others)


def extension_offset(extensions: Extensions, magic: int, start: int) -> int | None:
    """Return where the data of an extension lie in the file, if there is one.

    Args:
        extensions: All of them.
        magic: Of the one that is looked for.
        start: Where the header proper ends.
    """
    for known, data in extensions:
        start += _EXTENSION.size
        if known == magic:
            return start
        start += len(data) + 7 & ~7
    return None
