"""The interface of a disk: what every format and every layer offers.

The contract, which the conformance tests run against each implementation:

- Offsets and lengths are bytes, any alignment. A range that leaves the disk is
  `RequestError` with EINVAL (the server has its own judge before that).
- A write with `fua` is durable when it returns. When `flush` returns,
  everything that completed before it began is durable.
- Overlapping writes in flight end as one of them in each 512-byte sector.
- Each coroutine finishes without suspending if it need not wait, so that the
  server can drive it inline. No timeouts, task groups or current_task() in
  here: those belong to whoever drives.
- A call that fails raises `RequestError`, `OSError` or `ImageError`, has given
  back what it took, and leaves the disk consistent. Cancelling a call may
  leave any part of it done.
- `write` may keep using `data` until it returns, and no longer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from errno import EINVAL, ENOTSUP

from nbdserve.block.extents import Extent
from nbdserve.block.loan import Piece
from nbdserve.errors import RequestError

#: A range of a read buffer that is a hole: offset within the buffer, length.
Hole = tuple[int, int]


class BlockDevice(ABC):
    """A disk that can be read and perhaps written.

    Attributes:
        size: Bytes of the disk as the guest sees it.
        read_only: Whether every changing call is refused.
        minimum_block: Bytes; smaller requests are much more work. A power of two.
        preferred_block: Bytes; requests of this size and alignment are cheapest
            (a cluster or a page). A power of two.
        can_trim: Whether `trim` may give storage back.
        can_fast_zero: Whether `write_zeroes` is always quicker than a write.
        notes: What the operator should know of how it was opened, a line each.
    """

    size: int
    read_only: bool
    minimum_block: int = 1
    preferred_block: int
    can_trim: bool
    can_fast_zero: bool
    notes: Sequence[str] = ()

    @property
    def below(self) -> "BlockDevice | None":
        """The disk that this one is only a layer around, None if it is no layer."""
        return None

    @property
    def broken(self) -> str | None:
        """Why nothing is acknowledged until the disk is opened anew, None if it is well."""
        return None

    def require_range(self, offset: int, length: int) -> None:
        """Refuse a range that leaves the disk.

        Raises:
            RequestError: EINVAL.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise RequestError(
                EINVAL,
                f"{length} bytes at {offset} are not all on a disk of {self.size} bytes",
            )

    @abstractmethod
    async def read_into(self, offset: int, buffer: memoryview) -> Sequence[Hole]:
        """Fill `buffer` with the bytes at `offset`.

        Returns:
            The ranges of `buffer` known to be holes, in order; usually none.
            They are filled with zeros all the same.
        """

    def lend(self, offset: int, length: int) -> Sequence[Piece] | None:
        """Lend the bytes of a range instead of copying them; see `loan.py`.

        Args:
            offset: Bytes; the range is on the disk.
            length: Bytes.

        Returns:
            Where they lie, in order; None unless all of it is plain data in the page
            cache: then read it.
        """
        return None

    def place(self, offset: int, length: int) -> Piece | None:
        """Tell where the first bytes of a write can be put; see `loan.py`.

        The caller puts them there, some of them or none, before anything else happens, and
        asks again for the next ones. They count as written.

        Args:
            offset: Bytes; the range is on the disk.
            length: Bytes, at least 1.

        Returns:
            None unless that is all there is to writing them, and quick: then `write`.
        """
        return None

    async def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`."""
        buffer = bytearray(length)
        await self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    @abstractmethod
    async def write(
        self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False
    ) -> None:
        """Write `data` at `offset`."""

    @abstractmethod
    async def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        may_unmap: bool = True,
        fast_only: bool = False,
        fua: bool = False,
    ) -> None:
        """Make a range read as zeros.

        Args:
            offset: Bytes.
            length: Bytes.
            may_unmap: Whether the range may become a hole (no NBD_CMD_FLAG_NO_HOLE).
            fast_only: Fail with ENOTSUP rather than be as slow as a write.
            fua: Be durable on return.
        """

    @abstractmethod
    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Give storage back where possible; the range may read as anything older or as zeros."""

    @abstractmethod
    async def flush(self) -> None:
        """Make everything that completed before this call durable."""

    async def cache(self, offset: int, length: int) -> None:  # noqa: B027 -- a hint may be ignored
        """Hint that a range will be read soon."""

    @abstractmethod
    async def block_status(
        self, offset: int, length: int, *, max_extents: int = 1 << 20
    ) -> list[Extent]:
        """Describe a range.

        Returns:
            At least one extent. They start at `offset`, never run past
            `offset + length`, and stop early once there are `max_extents`.
        """

    async def resize(self, size: int, *, shrink: bool = False) -> None:
        """Give the disk another size; what is added reads as zeros.

        Connected clients keep the size that they saw.

        Args:
            size: Bytes; qcow2 rounds up to whole sectors.
            shrink: Allow a smaller size than now: what lies behind it is lost.

        Raises:
            ConfigError: It would be smaller without `shrink`, or can't be so large.
            ImageError: Something in the image rules it out.
            OSError: It can't be written.
            RequestError: ENOTSUP, disks of this kind keep their size.
        """
        raise RequestError(ENOTSUP, "disks of this kind can't be resized")

    async def preallocate(
        self, offset: int, end: int, mode: str, progress: Callable[[int], None]
    ) -> None:
        """Take space for a range that reads as zeros and is not in use; it may be empty.

        Args:
            offset: Bytes.
            end: Bytes.
            mode: off; metadata gives each cluster its place, falloc takes the
                space from the file system, full writes zeros there.
            progress: Told how many bytes of the range are done.

        Raises:
            ConfigError: The format does not have that, or a backing file is in the way.
            OSError: There is no space, or it can't be written.
            RequestError: ENOTSUP, disks of this kind have no space to take.
        """
        raise RequestError(ENOTSUP, "disks of this kind can't be preallocated")

    @abstractmethod
    async def close(self) -> None:
        """Flush, give back what is held, and close the files below.

        Raises:
            OSError: Something could not be made durable; the files are closed
                all the same.
        """


def bottom_of(device: BlockDevice) -> BlockDevice:
    """Return the disk below all layers around it."""
    while device.below is not None:
        device = device.below
    return device
