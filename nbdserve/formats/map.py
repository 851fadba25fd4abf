"""Which parts of a disk lie where, for `nbdserve image map`.

Entries and field names are those of `qemu-img map --output=json` (with
"compressed", which qemu-img prints since 8.2).
"""

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import NamedTuple

from nbdserve.block.device import BlockDevice
from nbdserve.block.extents import Extent, merged

#: Bytes asked for at a time, so that a large disk needs no large list.
_WINDOW = 1 << 40
_MAX_EXTENTS = 1 << 14


class MapEntry(NamedTuple):
    """A range of the disk in which everything is alike.

    Attributes:
        start: Bytes from the beginning of the disk.
        extent: Its length and what is known of it.
    """

    start: int
    extent: Extent

    def as_json(self) -> dict[str, int | bool]:
        """Return the fields of `qemu-img map --output=json`."""
        extent = self.extent
        shown: dict[str, int | bool] = {
            "start": self.start,
            "length": extent.length,
            "depth": extent.depth,
            "present": extent.present,
            "zero": extent.zero,
            "data": extent.data,
            "compressed": extent.compressed,
        }
        if extent.offset is not None:
            shown["offset"] = extent.offset
        return shown


async def map_entries(device: BlockDevice) -> AsyncIterator[MapEntry]:
    """Describe a whole disk, in order and without gaps; an empty disk has no entry.

    Raises:
        ImageError: The metadata of a range are broken.
        OSError: They can't be read.
    """
    start = position = 0
    held: Extent | None = None
    while position < device.size:
        found = await device.block_status(
            position, min(_WINDOW, device.size - position), max_extents=_MAX_EXTENTS
        )
        for extent in found:
            position += extent.length
            joined = merged([extent] if held is None else [held, extent])
            if held is not None and len(joined) > 1:
                yield MapEntry(start, held)
                start += held.length
            held = joined[-1]
    if held is not None:
        yield MapEntry(start, held)


def as_text(entries: Iterable[MapEntry], file_names: Sequence[str]) -> str:
    """Return a table for people: where the data lie, holes and zeros left out.

    Args:
        entries: What `map_entries` found.
        file_names: The image, its backing file, and so on down the chain.
    """
    lines = [f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File"]
    for start, extent in entries:
        if not extent.data or extent.zero:
            continue
        if extent.offset is not None:
            place = f"{extent.offset:#x}"
        else:
            place = "compressed" if extent.compressed else "-"
        name = file_names[extent.depth]
        lines.append(f"{start:<#16x}{extent.length:<#16x}{place:<16}{name}")
    return "\n".join(lines) + "\n"
