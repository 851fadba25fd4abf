"""From a command of the wire to a coroutine of the disk, and from errors back.

NBD_CMD_READ and NBD_CMD_WRITE are not in the table: the session starts them itself, since
where their data lie is its business. Nor is NBD_CMD_BLOCK_STATUS: it asks the contexts
that were negotiated, and only they ask the disk.
"""

import asyncio
import errno
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from nbdserve.block.device import BlockDevice
from nbdserve.errors import ImageError, RequestError
from nbdserve.exports.contexts import Describe
from nbdserve.wire.constants import Command, CommandFlag, NbdError
from nbdserve.wire.replies import nbd_error

#: What a command gives back: nothing, or of each context its id and extents
#: (length, state).
Statuses = list[tuple[int, list[tuple[int, int]]]]
Outcome = Statuses | None
_Handler = Callable[[BlockDevice, int, int, int], Coroutine[Any, Any, Outcome]]

_FUA: Final = int(CommandFlag.FUA)
_NO_HOLE: Final = int(CommandFlag.NO_HOLE)
_FAST_ZERO: Final = int(CommandFlag.FAST_ZERO)


def _flush(
    device: BlockDevice, _flags: int, _offset: int, _length: int
) -> Coroutine[Any, Any, None]:
    return device.flush()


def _trim(
    device: BlockDevice, flags: int, offset: int, length: int
) -> Coroutine[Any, Any, None]:
    return device.trim(offset, length, fua=bool(flags & _FUA))


def _cache(
    device: BlockDevice, _flags: int, offset: int, length: int
) -> Coroutine[Any, Any, None]:
    return device.cache(offset, length)


def _write_zeroes(
    device: BlockDevice, flags: int, offset: int, length: int
) -> Coroutine[Any, Any, None]:
    return device.write_zeroes(
        offset,
        length,
        may_unmap=not flags & _NO_HOLE,
        fast_only=bool(flags & _FAST_ZERO),
        fua=bool(flags & _FUA),
    )


async def block_status(
    contexts: Sequence[tuple[int, Describe]], offset: int, length: int, only_one: bool
) -> Statuses:
    """Describe a range in each of some meta contexts: id and function."""
    return [
        (context_id, await describe(offset, length, only_one))
        for context_id, describe in contexts
    ]


#: Command -> what carries it out, called with device, flags, offset and length.
HANDLERS: Final[dict[int, _Handler]] = {
    int(Command.FLUSH): _flush,
    int(Command.TRIM): _trim,
    int(Command.CACHE): _cache,
    int(Command.WRITE_ZEROES): _write_zeroes,
}


def error_of(failure: BaseException) -> tuple[NbdError, str]:
    """Return what a client is told about a failure: a number and a text.

    Paths and internals of the server stay out of the text.
    """
    if isinstance(failure, RequestError):
        return nbd_error(failure.errno), str(failure)
    if isinstance(failure, OSError):
        number = failure.errno or errno.EIO
        return nbd_error(number), failure.strerror or "input/output error"
    if isinstance(failure, ImageError):
        return NbdError.EIO, "the image can't be used"
    if isinstance(failure, asyncio.CancelledError):
        return NbdError.ESHUTDOWN, "the server is shutting down"
    return NbdError.EIO, "internal error"


def is_expected(failure: BaseException) -> bool:
    """Tell whether a failure is one that the interface of a disk announces."""
    return isinstance(
        failure, RequestError | OSError | ImageError | asyncio.CancelledError
    )
