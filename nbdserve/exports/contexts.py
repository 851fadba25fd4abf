"""Meta contexts: what NBD_CMD_BLOCK_STATUS tells about a range.

Each is a name and a function of a range. `base:allocation` is defined by doc/proto.md,
those of the namespace `qemu` by docs/interop/nbd.rst of qemu.
"""

from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Final

from nbdserve.block.device import BlockDevice
from nbdserve.block.dirty_bitmap import DirtyBitmap
from nbdserve.block.extents import Extent
from nbdserve.wire.constants import BASE_ALLOCATION, State

#: Extents of one reply: describing so many takes about 10 ms, in which no other client is
#: served. doc/proto.md allows 2^20; a client asks again from where a reply ends.
MAX_EXTENTS: Final = 1 << 14

#: qemu: how deep in the chain of backing files a range is decided.
ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
#: qemu: what was changed since a bitmap was begun; the bitmap's name follows.
DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"
#: docs/interop/nbd.rst of qemu, "qemu:dirty-bitmap:<dirty-bitmap-export-name>"
_DIRTY: Final = 1

#: Lengths in bytes and state, in order, neighbours differ; together they are never longer
#: than the range, and may be shorter.
Described = list[tuple[int, int]]
#: Called with offset, length (bytes, at least 1) and `only_one`: NBD_CMD_FLAG_REQ_ONE,
#: exactly one extent.
Describe = Callable[[int, int, bool], Awaitable[Described]]

_HOLE: Final = int(State.HOLE)
_ZERO: Final = int(State.ZERO)


async def base_allocation(
    device: BlockDevice, offset: int, length: int, only_one: bool = False
) -> Described:
    """Describe a range as "`base:allocation` metadata context" defines."""
    return await _from_extents(device, _allocation, offset, length, only_one)


async def allocation_depth(
    device: BlockDevice, offset: int, length: int, only_one: bool = False
) -> Described:
    """Describe a range as qemu:allocation-depth.

    0 is no image of the chain, 1 the image itself, 2 its backing file, and so on.
    """
    return await _from_extents(device, _depth, offset, length, only_one)


async def dirty_bitmap(
    bitmap: DirtyBitmap, offset: int, length: int, only_one: bool = False
) -> Described:
    """Describe a range as qemu:dirty-bitmap: 1 is what was changed."""
    most = 1 if only_one else MAX_EXTENTS
    return [
        (run, _DIRTY if dirty else 0)
        for run, dirty in bitmap.runs(offset, length, max_runs=most)
    ]


def contexts_of(
    device: BlockDevice, *, depth: bool = False, bitmaps: Iterable[DirtyBitmap] = ()
) -> dict[str, Describe]:
    """Return all meta contexts of an export by name.

    Args:
        device: The disk.
        depth: Whether to offer qemu:allocation-depth.
        bitmaps: Those to offer as qemu:dirty-bitmap.
    """
    contexts: dict[str, Describe] = {BASE_ALLOCATION: partial(base_allocation, device)}
    if depth:
        contexts[ALLOCATION_DEPTH] = partial(allocation_depth, device)
    for bitmap in bitmaps:
        contexts[DIRTY_BITMAP + bitmap.name] = partial(dirty_bitmap, bitmap)
    return contexts


def _allocation(extent: Extent) -> int:
    return (0 if extent.data else _HOLE) | (_ZERO if extent.zero else 0)


def _depth(extent: Extent) -> int:
    return extent.depth + 1 if extent.present else 0


async def _from_extents(
    device: BlockDevice,
    state_of: Callable[[Extent], int],
    offset: int,
    length: int,
    only_one: bool,
) -> Described:
    # Asked for one extent, a device may cut it where its own table ends; a few
    # more can be merged to a longer one, which saves the client requests.
    most = 64 if only_one else MAX_EXTENTS
    result: Described = []
    left = length
    for extent in await device.block_status(offset, length, max_extents=most):
        extent_length = min(extent.length, left)
        state = state_of(extent)
        if result and result[-1][1] == state:
            result[-1] = (result[-1][0] + extent_length, state)
        elif result and only_one:
            break
        else:
            result.append((extent_length, state))
        left -= extent_length
        if not left:
            break
    return result
