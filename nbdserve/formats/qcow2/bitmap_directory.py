"""The bitmap directory of a qcow2 image: bytes in, values out.

docs/interop/qcow2.rst of qemu, section "Bitmaps".
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from nbdserve.errors import ImageCorruptError

MAX_TABLE_ENTRIES = 0x800_0000 // 8
MAX_NAME = 1023
MIN_GRANULARITY_BITS = 9
MAX_GRANULARITY_BITS = 31
TYPE_DIRTY_TRACKING = 1
FLAG_IN_USE = 1 << 0
FLAG_AUTO = 1 << 1
FLAG_EXTRA_COMPATIBLE = 1 << 2
_RESERVED_FLAGS = ~(FLAG_IN_USE | FLAG_AUTO | FLAG_EXTRA_COMPATIBLE)
#: Bytes of one bitmap's data: the limit that qemu enforces (block/qcow2-bitmap.c).
MAX_DATA_BYTES = 512 << 20

BITMAP_TABLE_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
BITMAP_TABLE_RESERVED_MASK = 0xFF00_0000_0000_01FE
#: An entry without an offset: its bits are all ones.
BITMAP_TABLE_ALL_ONES = 1

_ENTRY = struct.Struct(">QIIBBHI")
_FLAGS_AT = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Bitmap:
    """An entry of the bitmap directory.

    Attributes:
        table_offset: Where the bitmap's table lies, in bytes.
        table_entries: Entries of that table.
        flags: `FLAG_IN_USE`, `FLAG_AUTO`, `FLAG_EXTRA_COMPATIBLE`.
        granularity_bits: log2 of the bytes that one bit stands for.
        name: Unique in the image.
    """

    table_offset: int
    table_entries: int
    flags: int
    granularity_bits: int
    name: bytes

    @property
    def length(self) -> int:
        """Bytes of the entry in the directory."""
        return entry_length(self.name)


def entry_length(name: bytes) -> int:
    """Return the bytes of the directory entry of a bitmap with that name."""
    return _ENTRY.size + len(name) + 7 & ~7


def table_entries_for(size: int, granularity_bits: int, cluster_bits: int) -> int:
    """Return how many table entries a bitmap of a disk of `size` bytes has."""
    granules = -(-size >> granularity_bits)
    return -(-granules >> cluster_bits + 3)


def encode_bitmap_directory(bitmaps: Sequence[Bitmap]) -> bytes:
    """Return the directory of these bitmaps."""
    return b"".join(
        (
            _ENTRY.pack(
                bitmap.table_offset,
                bitmap.table_entries,
                bitmap.flags,
                TYPE_DIRTY_TRACKING,
                bitmap.granularity_bits,
                len(bitmap.name),
                0,
            )
            + bitmap.name
        ).ljust(bitmap.length, b"\0")
        for bitmap in bitmaps
    )


def flags_offsets(bitmaps: Sequence[Bitmap]) -> list[int]:
    """Return where in the directory the flags of each bitmap are, 4 bytes within a sector."""
    offsets: list[int] = []
    start = 0
    for bitmap in bitmaps:
        offsets.append(start + _FLAGS_AT)
        start += bitmap.length
    return offsets


def parse_bitmap_directory(data: bytes, nb_bitmaps: int) -> list[Bitmap]:
    """Read a bitmap directory.

    Args:
        data: All of it.
        nb_bitmaps: Entries, from the header extension.

    Raises:
        ImageCorruptError: An entry is impossible, or there are more or fewer.
    """
    bitmaps: list[Bitmap] = []
    names: set[bytes] = set()
    offset = 0
    while offset < len(data):
        if len(bitmaps) == nb_bitmaps:
            raise ImageCorruptError(
                f"the bitmap directory has more than its {nb_bitmaps} entries"
            )
        bitmap, offset = _parse_entry(data, offset)
        if bitmap.name in names:
            raise ImageCorruptError(f"two bitmaps have the name {bitmap.name!r}")
        names.add(bitmap.name)
        bitmaps.append(bitmap)
    if len(bitmaps) != nb_bitmaps:
        raise ImageCorruptError(
            f"the bitmap directory has {len(bitmaps)} entries, not {nb_bitmaps}"
        )
    return bitmaps


def _parse_entry(data: bytes, start: int) -> tuple[Bitmap, int]:
    if start + _ENTRY.size > len(data):
        raise ImageCorruptError(f"the bitmap directory is cut at byte {start}")
    table_offset, table_entries, flags, kind, granularity_bits, name_size, extra = (
        _ENTRY.unpack_from(data, start)
    )
    name_start = start + _ENTRY.size + extra
    end = -(-(name_start + name_size) // 8) * 8
    problem = None
    if kind != TYPE_DIRTY_TRACKING:
        problem = f"type {kind} is unknown"
    elif table_offset == 0:
        problem = "it has no table"
    elif table_entries == 0 or table_entries > MAX_TABLE_ENTRIES:
        problem = f"its table has {table_entries} entries"
    elif not MIN_GRANULARITY_BITS <= granularity_bits <= MAX_GRANULARITY_BITS:
        problem = f"granularity_bits is {granularity_bits}"
    elif not 1 <= name_size <= MAX_NAME:
        problem = f"its name has {name_size} bytes"
    elif flags & _RESERVED_FLAGS:
        problem = f"flags are {flags:#x}: reserved bits are set"
    elif extra:
        problem = f"it has {extra} bytes of extra data"
    elif end > len(data):
        problem = "it runs past the end of the directory"
    if problem:
        raise ImageCorruptError(
            f"bitmap at byte {start} of the bitmap directory: {problem}"
        )
    bitmap = Bitmap(
        table_offset=table_offset,
        table_entries=table_entries,
        flags=flags,
        granularity_bits=granularity_bits,
        name=data[name_start : name_start + name_size],
    )
    return bitmap, end
