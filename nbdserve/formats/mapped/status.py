"""Block status: what is known of a range without reading it."""

from nbdserve.block.device import BlockDevice
from nbdserve.block.extents import Extent, merged
from nbdserve.formats.mapped.entries import (
    BAD,
    COMPRESSED,
    NORMAL,
    UNALLOCATED,
)
from nbdserve.formats.mapped.mapping import Mapping, Run
from nbdserve.formats.mapped.parts import Parts
from nbdserve.storage.base import Storage

#: Extents collected before neighbours are joined.
_BATCH = 1024


async def block_status(
    mapping: Mapping,
    parts: Parts,
    offset: int,
    length: int,
    max_extents: int,
    holes: Storage | None = None,
) -> list[Extent]:
    """Describe a range; see `BlockDevice.block_status`.

    `holes` is the file with the data, if mapped clusters may be holes there: then they
    are known to be zeros, as those of an image whose metadata were preallocated.
    """
    position, end = offset, offset + length
    result: list[Extent] = []
    while position < end and len(result) <= max_extents:
        batch: list[Extent] = []
        while position < end and len(batch) < _BATCH:
            for extent in await _piece(
                mapping, parts, position, end, max_extents, holes
            ):
                batch.append(extent)
                position += extent.length
        result = merged(result + batch)
    # one more than asked for was collected, so that the last one is whole
    return result[:max_extents]


async def _piece(
    mapping: Mapping,
    parts: Parts,
    position: int,
    end: int,
    max_extents: int,
    holes: Storage | None,
) -> list[Extent]:
    """Describe the first run of a range."""
    run = await mapping.run(position, end)
    if run.kind >= NORMAL and holes is not None:
        return await _mapped(holes, run, max_extents)
    if run.kind >= NORMAL:
        # as encrypted, the bytes of the file are not those of the disk
        offset = run.host_offset if parts.cipher is None else None
        return [Extent(run.length, data=True, zero=False, offset=offset)]
    if run.kind == UNALLOCATED:
        return await _below(parts.backing, position, run.length, max_extents)
    if run.kind == COMPRESSED:
        return [Extent(run.length, data=True, zero=False, compressed=True)]
    if run.kind == BAD:
        raise mapping.corrupt(position, run.word, "is not valid")
    # a cluster that is kept behind zeros has its place in the file
    offset = run.host_offset if parts.cipher is None else None
    return [Extent(run.length, data=False, zero=True, offset=offset or None)]


async def _mapped(holes: Storage, run: Run, max_extents: int) -> list[Extent]:
    """Tell the holes from the data of a mapped run."""
    extents: list[Extent] = []
    host_offset, end = run.host_offset, run.host_offset + run.length
    inside = min(end, max(holes.size, host_offset)) - host_offset
    for length, data in await holes.extents(
        host_offset, inside, max_extents=max_extents
    ):
        extents.append(Extent(length, data=True, zero=not data, offset=host_offset))
        host_offset += length
    if host_offset < end and len(extents) < max_extents:
        # past the end of the file
        left = end - host_offset
        extents.append(Extent(left, data=True, zero=True, offset=host_offset))
    return extents


async def _below(
    backing: BlockDevice | None, position: int, length: int, max_extents: int
) -> list[Extent]:
    """Describe a range that the image leaves to its backing file."""
    if backing is None:
        return [Extent(length, data=False, zero=True, present=False)]
    there = min(max(backing.size - position, 0), length)
    if not there:
        return [Extent(length, data=False, zero=True, present=False)]
    extents = await backing.block_status(position, there, max_extents=max_extents)
    return [extent._replace(depth=extent.depth + 1) for extent in extents]
