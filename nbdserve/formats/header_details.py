"""What `nbdserve image info` shows besides what `qemu-img info` shows.

The length of the file, the geometry that a BIOS would see, and every field of the header
as it is stored. The names are those of the format's specification.
"""

from dataclasses import fields
from typing import Any, Final, NamedTuple

from nbdserve.formats.qcow1.header import Header as Header1
from nbdserve.formats.qcow2.header import Header as Header2

#: What ATA can say of a disk larger than 8 GB (ATA/ATAPI-6, words 1, 3 and 6).
_HEADS: Final = 16
_SECTORS: Final = 63
_MOST_CYLINDERS: Final = 16383


class Geometry(NamedTuple):
    """Cylinders, heads and sectors of a disk."""

    cylinders: int
    heads: int
    sectors: int


def geometry(size: int) -> Geometry:
    """Return the geometry of a disk of `size` bytes, as IDE disks report it."""
    cylinders = size // 512 // (_HEADS * _SECTORS)
    return Geometry(min(max(cylinders, 1), _MOST_CYLINDERS), _HEADS, _SECTORS)


def header_fields(header: Header1 | Header2) -> dict[str, Any]:
    """Return all fields of a header, in the order of the file."""
    shown: dict[str, Any] = {"version": 1}
    for each in fields(header):
        value: Any = getattr(header, each.name)
        if each.name == "extensions":
            value = [
                {"type": f"{kind:#010x}", "length": len(data)} for kind, data in value
            ]
        elif each.name == "unknown_fields":
            value = value.hex()
        elif isinstance(value, bytes):
            value = value.decode("utf-8", "backslashreplace")
        shown[each.name.replace("_", "-")] = value
    return shown


def field_text(name: str, value: object) -> str:
    """Return a header field as a person reads it: places and bits in hexadecimal."""
    if isinstance(value, int) and name.endswith(("-offset", "-features")):
        return f"{value:#x}"
    if isinstance(value, list):
        return ", ".join(f"{each['type']} ({each['length']} bytes)" for each in value)
    return "" if value is None else str(value)
