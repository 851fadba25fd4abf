"""Reads of what is not cached, without a thread: io_uring(7).

A read that misses the page cache costs 50 us of CPU in a thread, most of it for the way
there and back. Here the misses of a turn of the loop are handed to the kernel in one call,
and the completions of several come back in one event: 11 us each, and five times as many
a second from a fast drive.

The kernel lets file systems finish such a read without a thread of its own (ext4, xfs and
btrfs since 5.9); its poll wakes the loop. Where there is no io_uring (old kernels,
`kernel.io_uring_disabled`, the system call filters of many containers) `ring` says
None, and threads do the reads.

Layout and numbers are from linux/io_uring.h. Both queues are memory that is shared
with the kernel, and Python has no memory barriers: so this is for processors that keep the
order of loads and of stores by themselves.
"""

import asyncio
import ctypes
import mmap
import os
import platform
import struct
from collections import deque
from collections.abc import Callable, Generator
from contextvars import Context
from time import perf_counter
from typing import Final

from nbdserve.storage.company import SHORT_TURN_S, company

#: Longer reads are for threads: the kernel copies them in the loop's time (64 KiB: 10 us).
LIMIT: Final = 64 << 10

#: So many are handed over as soon as they are there, the rest at the end of the turn: the drive
#: is at work while the next ones are parsed. A virtual drive may tell of a batch
#: when all of it is done; with one of 32, drive and server waited for each other in turn
#: (30,900 cold reads a second instead of 36,100).
_BATCH: Final = 8
#: The same while others wait: the kernel takes 6 us for each read that it begins.
_BATCH_IN_COMPANY: Final = 4

#: Reads in flight; who comes then takes a thread.
_ENTRIES: Final = 512

_SETUP: Final = 425
_ENTER: Final = 426
_OP_READ: Final = 22
_FEAT_SINGLE_MMAP: Final = 1 << 0
_FEAT_NODROP: Final = 1 << 1
_OFF_SQ_RING: Final = 0
_OFF_SQES: Final = 0x10000000

#: struct io_uring_params: sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle,
#: features, wq_fd; then struct io_sqring_offsets and struct io_cqring_offsets.
_PARAMS: Final = struct.Struct("=7I12x8I8x8I8x")
#: struct io_uring_sqe: opcode, flags, ioprio, fd, off, addr, len, rw_flags, user_data.
_SQE: Final = struct.Struct("=BBHiQQIIQ24x")
#: struct io_uring_cqe: user_data, res, flags.
_CQE: Final = struct.Struct("=QiI")
_COUNTER: Final = 0xFFFFFFFF

#: x86 ("Total Store Order").
_ORDERED: Final = frozenset({"x86_64"})

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long] * 7


class Read:
    """A read under way, to be awaited once.

    It is what asyncio takes for a future, but who waits goes on in the very moment of the
    completion: the way through the loop's queue of callbacks took 4 of 31 us
    of CPU a read. A task that waits goes on in its own context, as ever.
    Cancelling waits until the kernel is done with the buffer, as with `Call`.

    Attributes:
        cached: Whether it was complete as soon as it was handed over. A drive that is quick
            enough for that looks the same.
    """

    __slots__ = (
        "_asyncio_future_blocking",
        "_callback",
        "_context",
        "_loop",
        "_memory",
        "_result",
        "cached",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, memory: object) -> None:
        """`memory` must live until the kernel is done with it."""
        self._asyncio_future_blocking = False
        self._callback: Callable[[Read], object] | None = None
        self._context: Context | None = None
        self._loop = loop
        self._memory = memory
        self._result: int | None = None
        self.cached = False

    def __await__(self) -> Generator["Read", None, int]:
        """Return the number of bytes, maybe fewer than wanted, or a negative errno.

        That is as pread(2), but nothing is raised.
        """
        if self._result is None:
            self._asyncio_future_blocking = True
            yield self
        return self.result()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """See `asyncio.Future.get_loop`."""
        return self._loop

    def result(self) -> int:
        """See `asyncio.Future.result`."""
        if self._result is None:
            raise asyncio.InvalidStateError("the read is under way")
        return self._result

    def cancel(self, msg: object = None) -> bool:
        """Refuse: the kernel goes on with the caller's buffer."""
        return False

    def add_done_callback(
        self, callback: "Callable[[Read], object]", *, context: Context | None = None
    ) -> None:
        """See `asyncio.Future.add_done_callback`; there can be only one."""
        self._callback = callback
        self._context = context

    def settle(self, result: int) -> None:
        """Be done; to be called from the loop itself."""
        self._result = result
        callback = self._callback
        if callback is None:
            return
        if self._context is not None:  # a task
            self._loop.call_soon(callback, self, context=self._context)
            return
        try:
            callback(self)
        except Exception as error:  # noqa: BLE001 -- told as the loop tells of its callbacks
            self._loop.call_exception_handler(
                {"message": f"error in {callback!r}", "exception": error}
            )


class Ring:
    """The queues of one loop.

    Attributes:
        loop: The loop that submits and is woken.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Make the queues, and let the loop watch them.

        Raises:
            OSError: This kernel, or who confines us, has no io_uring.
        """
        self.loop = loop
        self._fd, params = _setup()
        (sq_entries, cq_entries, _, _, _, _, _, *offsets) = params
        sq, cq = offsets[:8], offsets[8:]
        try:
            size = max(sq[6] + 4 * sq_entries, cq[5] + _CQE.size * cq_entries)
            self._rings = mmap.mmap(self._fd, size, offset=_OFF_SQ_RING)
            self._entries = mmap.mmap(
                self._fd, _SQE.size * sq_entries, offset=_OFF_SQES
            )
        except BaseException:
            os.close(self._fd)
            raise
        self._words = memoryview(self._rings).cast("I")
        self._sq_tail, self._sq_mask = sq[1] // 4, sq_entries - 1
        self._cq_head, self._cq_tail = cq[0] // 4, cq[1] // 4
        self._cqes, self._cq_mask = cq[5], cq_entries - 1
        for index in range(sq_entries):  # entry n is always in place n
            self._words[sq[6] // 4 + index] = index
        self._put = 0  # entries filled in, ever
        self._submitted = 0  # those the kernel has
        self._taken = 0  # completions, ever
        # by number of the entry: the buffer must live until the kernel is done with it
        self._waiting: dict[int, Read] = {}
        self._complete: deque[tuple[Read, int]] = deque()  # to be settled
        self._scheduled = False  # `_end_turn` will be called
        self._postponed = False  # `_settle_more` will be called
        loop.add_reader(self._fd, self._collect)

    @property
    def busy(self) -> bool:
        """Whether there is no room for another read."""
        return len(self._waiting) >= _ENTRIES

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight."""
        return not self._waiting and not self._complete

    def read(self, fd: int, offset: int, view: memoryview) -> Read:
        """Read at `offset` of `fd`, which stays open until the call is done."""
        memory = ctypes.c_char.from_buffer(view)
        number = self._put
        _SQE.pack_into(
            self._entries,
            (number & self._sq_mask) * _SQE.size,
            _OP_READ,
            0,
            0,
            fd,
            offset,
            ctypes.addressof(memory),
            len(view),
            0,
            number,
        )
        self._waiting[number] = call = Read(self.loop, memory)
        self._put = number + 1
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._end_turn)
        pending = self._put - self._submitted
        if pending >= _BATCH or (pending == _BATCH_IN_COMPANY and company.present()):
            self._submit()
        return call

    def _end_turn(self) -> None:
        """Hand over the last ones, and settle what was complete at once."""
        self._scheduled = False
        if self._put != self._submitted:
            self._submit()
        self._collect()

    def _submit(self) -> None:
        """Hand over what was put since the last time."""
        first = self._submitted
        wanted = self._put - first
        self._words[self._sq_tail] = self._put & _COUNTER
        accepted = max(0, _syscall(_ENTER, self._fd, wanted, 0, 0, 0, 0))
        self._submitted += accepted
        if accepted < wanted:
            # memory is short, say: the rest was not begun, and a thread can do it
            self._words[self._sq_tail] = self._submitted & _COUNTER
            for number in range(self._submitted, self._put):
                self._complete.append((self._waiting.pop(number), 0))
            self._put = self._submitted
        self._take(first)

    def _take(self, first: int) -> None:
        """Take what is complete from the queue; what is `cached` has number `first` or more."""
        words = self._words
        taken, end = self._taken, words[self._cq_tail]
        while taken != end:
            place = self._cqes + (taken & self._cq_mask) * _CQE.size
            number, result, _ = _CQE.unpack_from(self._rings, place)
            call = self._waiting.pop(number)
            if number >= first:
                call.cached = True
            self._complete.append((call, result))
            taken = taken + 1 & _COUNTER
        self._taken = taken
        words[self._cq_head] = taken

    def _collect(self) -> None:
        """Settle what is complete."""
        self._take(self._put)
        if not self._postponed:
            self._settle()

    def _settle(self) -> None:
        """Settle what was taken, or as much as others who are present can wait for.

        Each is a request to be answered: all that a client may have in flight would
        take a millisecond.
        """
        complete = self._complete
        until_s = perf_counter() + SHORT_TURN_S if company.present() else None
        while complete:
            call, result = complete.popleft()
            call.settle(result)
            if until_s is not None and complete and perf_counter() > until_s:
                self._postponed = True
                self.loop.call_soon(self._settle_more)
                return

    def _settle_more(self) -> None:
        self._postponed = False
        self._settle()

    def close(self) -> None:
        """Give the memory back; nothing may be in flight, and the loop be closed."""
        self._words.release()
        self._rings.close()
        self._entries.close()
        os.close(self._fd)


def _setup() -> tuple[int, tuple[int, ...]]:
    """Return the descriptor of new queues, and what the kernel says of them."""
    if platform.machine() not in _ORDERED:
        raise OSError("io_uring needs memory barriers on this processor")
    memory = ctypes.create_string_buffer(_PARAMS.size)
    fd = _syscall(_SETUP, _ENTRIES, ctypes.addressof(memory), 0, 0, 0, 0)
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    params = _PARAMS.unpack(memory)
    needed = _FEAT_SINGLE_MMAP | _FEAT_NODROP
    if params[5] & needed != needed:
        os.close(fd)
        raise OSError("this io_uring is too old")
    return fd, params


_rings: dict[asyncio.AbstractEventLoop, Ring] = {}
_refused = False


def available() -> bool:
    """Whether nothing is known against it."""
    return not _refused


def ring(loop: asyncio.AbstractEventLoop) -> Ring | None:
    """Return the queues of the running loop, made when first asked for, or None."""
    global _refused  # noqa: PLW0603 -- the kernel refuses a process, not a loop
    found = _rings.get(loop)
    if found is not None or _refused:
        return found
    for other in [loop for loop in _rings if loop.is_closed()]:
        if _rings[other].idle:  # else the kernel still writes into somebody's memory
            _rings.pop(other).close()
    try:
        _rings[loop] = Ring(loop)
    except OSError:
        _refused = True
        return None
    return _rings[loop]


def _forget_rings() -> None:
    """Start anew in a forked child: what is in flight is the parent's."""
    _rings.clear()


os.register_at_fork(after_in_child=_forget_rings)
