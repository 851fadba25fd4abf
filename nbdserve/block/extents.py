"""How a disk tells which of its ranges hold data."""

from typing import NamedTuple


class Extent(NamedTuple):
    """A range of a disk in which everything is alike.

    Extents are listed in order and without gaps, so that a length is enough.

    Attributes:
        length: Bytes, at least 1.
        data: Whether the range occupies storage in some layer of the chain.
        zero: Whether it is known to read as zeros.
        depth: 0 if the image itself decides the content of the range, 1 if its
            backing file does, and so on down the chain.
        present: Whether any layer of the chain has the range at all, be it as
            data or as zeros (`qemu-img map` reports it by that name).
        offset: Where the range starts in the file of its layer, if it lies
            there in one plain piece.
        compressed: Whether it is stored compressed.
    """

    length: int
    data: bool
    zero: bool
    depth: int = 0
    present: bool = True
    offset: int | None = None
    compressed: bool = False


def merged(extents: list[Extent]) -> list[Extent]:
    """Join neighbours that say the same (host offsets have to be contiguous)."""
    result: list[Extent] = []
    for extent in extents:
        if result:
            last = result[-1]
            follows = (
                last.offset is None
                if extent.offset is None
                else last.offset is not None
                and last.offset + last.length == extent.offset
            )
            if follows and last._replace(length=0, offset=None) == extent._replace(
                length=0, offset=None
            ):
                result[-1] = last._replace(length=last.length + extent.length)
                continue
        result.append(extent)
    return result
