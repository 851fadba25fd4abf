"""Meta contexts: what NBD_CMD_BLOCK_STATUS tells about a range."""

from typing import Final

from nbdserve.block.device import BlockDevice
from nbdserve.wire.constants import State

#: Extents of one reply: describing so many takes about 10 ms, in which no other client is
#: served. doc/proto.md allows 2^20; a client asks again from where a reply ends.
MAX_EXTENTS: Final = 1 << 14

_HOLE: Final = int(State.HOLE)
_ZERO: Final = int(State.ZERO)


async def base_allocation(
    device: BlockDevice, offset: int, length: int, *, only_one: bool = False
) -> list[tuple[int, int]]:
    """Describe a range as "`base:allocation` metadata context" defines.

    Args:
        device: The disk.
        offset: Bytes.
        length: Bytes, at least 1.
        only_one: NBD_CMD_FLAG_REQ_ONE: exactly one extent.

    Returns:
        Lengths in bytes and state flags, in order, neighbours differ; together they
        are never longer than the request, and may be shorter.
    """
    # Asked for one extent, a device may cut it where its own table ends; a few
    # more can be merged to a longer one, which saves the client requests.
    most = 64 if only_one else MAX_EXTENTS
    result: list[tuple[int, int]] = []
    left = length
    for extent in await device.block_status(offset, length, max_extents=most):
        extent_length = min(extent.length, left)
        state = (0 if extent.data else _HOLE) | (_ZERO if extent.zero else 0)
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
