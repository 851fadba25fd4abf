"""Giving a qcow version 1 image another backing file: one write of its first sector.

The format records no more than the name, and in practice the L1 table follows it, so
a longer name may find no room.
"""

from dataclasses import replace
from typing import Final

from nbdserve.errors import ImageFormatError
from nbdserve.formats.qcow1.header import LENGTH, encode_header, parse_header

#: What is written as a whole or not at all.
SECTOR: Final = 512


def plan_backing_change(
    data: bytes, file_size: int, name: bytes | None
) -> list[tuple[int, bytes]]:
    """Return (offset, bytes) of what has to be written, with a barrier after each.

    Args:
        data: The file's beginning, as for `parse_header`.
        file_size: Bytes of the image file.
        name: Of the new backing file, as it shall be stored; None is no backing file.

    Raises:
        ImageError: The header is broken, or has no room for the name.
    """
    header = parse_header(data, file_size)
    room = min(SECTOR, header.l1_table_offset) - LENGTH
    if len(name or b"") > room:
        raise ImageFormatError(
            f"a header of qcow version 1 has room for a backing file name of {room}"
            f" bytes here, not {len(name or b'')}: convert the image to qcow2"
        )
    changed = replace(header, backing_name=name, backing_file_offset=0)
    return [(0, encode_header(changed))]
