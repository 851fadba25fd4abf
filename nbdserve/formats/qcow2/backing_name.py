"""Giving a qcow2 image another backing file: which bytes to write, in which order.

The name lies anywhere in the first cluster, and header and extensions may be longer
than a sector, which is all that a power cut leaves whole. So the new name goes to
bytes that nothing uses, and one write of sector 0 makes it count. Where extensions
that continue behind sector 0 have to move, the feature name table, which is
for error messages only, is left out by a first such write and comes back by a
second one.
"""

from dataclasses import replace
from typing import Final

from nbdserve.errors import ImageFormatError
from nbdserve.formats.qcow2.extensions import (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_DATA_FILE,
    EXTENSION_FEATURE_NAMES,
    Extensions,
    encode_extensions,
)
from nbdserve.formats.qcow2.header import (
    MAX_BACKING_NAME,
    Header,
    encode_header,
    parse_header,
)

#: What is written as a whole or not at all.
SECTOR: Final = 512

#: (offset, bytes) of one write; after each a barrier.
Write = tuple[int, bytes]


def plan_backing_change(
    cluster: bytes, file_size: int, name: bytes | None, backing_format: str | None
) -> list[Write]:
    """Return what has to be written, in this order, with a barrier after each.

    Args:
        cluster: The first cluster of the image.
        file_size: Bytes of the image file.
        name: Of the new backing file, as it shall be stored; None is no backing file.
        backing_format: Its format; None leaves it open.

    Raises:
        ImageError: The header is broken, or has no room for the name.
    """
    old = parse_header(cluster, file_size)
    if len(name or b"") > MAX_BACKING_NAME:
        raise ImageFormatError(
            f"the backing file name has {len(name or b'')} bytes: at most"
            f" {MAX_BACKING_NAME}"
        )
    if name and old.raw_data:
        raise ImageFormatError(
            "its external data file is all of the disk (raw), so it can't have a backing"
            " file"
        )
    new = replace(
        old,
        backing_name=name,
        backing_file_offset=0,
        extensions=_with_format(old.extensions, backing_format if name else None),
    )
    return plan_header_change(cluster, old, new)


def plan_data_file_change(cluster: bytes, file_size: int, name: bytes) -> list[Write]:
    """Return what has to be written so that the external data file has another name.

    Args:
        cluster: The first cluster of the image.
        file_size: Bytes of the image file.
        name: As it shall be stored.

    Raises:
        ImageError: The header is broken, or has no room for the name.
    """
    old = parse_header(cluster, file_size)
    return plan_header_change(cluster, old, with_data_file(old, name))


def with_data_file(header: Header, name: bytes) -> Header:
    """Return a header that names another external data file."""
    extensions = [
        (magic, name if magic == EXTENSION_DATA_FILE else data)
        for magic, data in header.extensions
    ]
    if header.extension(EXTENSION_DATA_FILE) is None:
        extensions.insert(0, (EXTENSION_DATA_FILE, name))
    return replace(header, extensions=tuple(extensions))


def plan_header_change(cluster: bytes, old: Header, new: Header) -> list[Write]:
    """Return what has to be written to replace a header, in this order; a barrier after each.

    Args:
        cluster: The first cluster of the image, which begins with
        old: its header.
        new: What it shall be; where the backing name goes is decided here.

    Raises:
        ImageFormatError: It does not fit into the first cluster.
    """
    name = new.backing_name
    new = replace(new, backing_file_offset=0)
    if _end_of_extensions(new) + len(name or b"") <= SECTOR:
        return [(0, encode_header(new).ljust(SECTOR, b"\0"))]
    writes: list[Write] = []
    if name:
        new = replace(new, backing_file_offset=_free_place(old, new, len(name)))
        writes.append((new.backing_file_offset, name))
    encoded = encode_header(new).ljust(SECTOR, b"\0")
    rest = encoded[SECTOR : _end_of_extensions(new)]
    if rest != cluster[SECTOR : SECTOR + len(rest)]:
        writes += [(0, _without_names(new)), (SECTOR, rest)]
    return [*writes, (0, encoded[:SECTOR])]


def _with_format(extensions: Extensions, backing_format: str | None) -> Extensions:
    """Put the backing format where it was, else in front."""
    others = [each for each in extensions if each[0] != EXTENSION_BACKING_FORMAT]
    if backing_format is None:
        return tuple(others)
    magics = [magic for magic, _ in extensions]
    index = (
        magics.index(EXTENSION_BACKING_FORMAT)
        if EXTENSION_BACKING_FORMAT in magics
        else 0
    )
    others.insert(index, (EXTENSION_BACKING_FORMAT, backing_format.encode()))
    return tuple(others)


def _end_of_extensions(header: Header) -> int:
    return header.header_length + len(encode_extensions(header.extensions))


def _free_place(old: Header, new: Header, length: int) -> int:
    """Find room in the first cluster beside all that is in use before and after."""
    start = max(_end_of_extensions(old), _end_of_extensions(new))
    old_start = old.backing_file_offset
    old_end = old_start + len(old.backing_name or b"")
    if old.backing_name and start < old_end and old_start < start + length:
        start = old_end
    if start + length > new.cluster_size:
        raise ImageFormatError(
            f"the first cluster has no room for a backing file name of {length} bytes"
            " beside the present one"
        )
    return start


def _without_names(header: Header) -> bytes:
    """Return a sector 0 that is a whole header without the feature name table."""
    short = replace(
        header,
        extensions=tuple(
            each for each in header.extensions if each[0] != EXTENSION_FEATURE_NAMES
        ),
    )
    if _end_of_extensions(short) > SECTOR:
        raise ImageFormatError(
            f"the header extensions end at byte {_end_of_extensions(short)}: with more"
            f" than {SECTOR} bytes they can't be changed safely"
        )
    return encode_header(short).ljust(SECTOR, b"\0")[:SECTOR]
