"""From a command of the wire to a coroutine of the disk, and from errors back.

NBD_CMD_READ and NBD_CMD_WRITE are not in the table: the session starts them itself, since
where their data lie is its business.
"""

import asyncio
import errno
from collections.abc import Callable, Coroutine
from typing import Any, Final

from nbdserve.block.device import BlockDevice
from nbdserve.errors import ImageError, RequestError
from nbdserve.exports.contexts import base_allocation
from nbdserve.wire.constants import Command, CommandFlag, NbdError
from nbdserve.wire.replies import nbd_error

#: What a command gives back: nothing, or extents (length, state).
Outcome = list[tuple[int, int]] | None
_Handler = Callable[[BlockDevice, int, int, int], Coroutine[Any, Any, Outcome]]

_FUA: Final = int(CommandFlag.FUA)
_NO_HOLE: Final = int(CommandFlag.NO_HOLE)
_FAST_ZERO: Final = int(CommandFlag.FAST_ZERO)
_REQ_ONE: Final = int(CommandFlag.REQ_ONE)


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


def _block_status(
    device: BlockDevice, flags: int, offset: int, length: int
) -> Coroutine[Any, Any, Outcome]:
    return base_allocation(device, offset, length, only_one=bool(flags & _REQ_ONE))


#: Command -> what carries it out, called with device, flags, offset and length.
HANDLERS: Final[dict[int, _Handler]] = {
    int(Command.FLUSH): _flush,
    int(Command.TRIM): _trim,
    int(Command.CACHE): _cache,
    int(Command.WRITE_ZEROES): _write_zeroes,
    int(Command.BLOCK_STATUS): _block_status,
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
