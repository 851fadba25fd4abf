"""The interface of a place that keeps bytes at offsets, and knows nothing else.

Most calls come in pairs. `try_read` and `try_write` never suspend, and do not wait for a
device but for what `pace.py` allows: they either did the whole thing or say False and did
nothing that counts, and then the coroutine of the same name does it elsewhere. So a caller on the hot
path pays one system call, and knows exactly where it may be suspended:

    if not storage.try_read(offset, view):
        with pins:
            await storage.read(offset, view)
"""

import os
from abc import ABC, abstractmethod
from errno import EOPNOTSUPP

Buffer = bytes | bytearray | memoryview


class Storage(ABC):
    """Bytes at offsets.

    Every failing call raises `OSError`. After a failed `flush` nothing is
    known about what is durable: the caller must stop acknowledging.

    Attributes:
        name: What to call it in messages: a path as the user gave it.
        read_only: Whether changing calls are refused (EBADF).
        zeroes_on_extend: Whether bytes beyond the old end read as zeros, durably,
            after `truncate` to a larger size or `punch`, once flushed (regular
            files: yes; block devices: no).
        fixed_size: Whether `truncate` is impossible (block devices).
    """

    name: str
    read_only: bool
    zeroes_on_extend: bool
    fixed_size: bool

    @property
    @abstractmethod
    def size(self) -> int:
        """The current length in bytes; cheap."""

    @abstractmethod
    def try_read(self, offset: int, view: memoryview) -> bool:
        """Fill `view` from memory (page cache), or say False.

        Bytes past the end are zeros.
        """

    @abstractmethod
    async def read(self, offset: int, view: memoryview) -> None:
        """Fill `view`; bytes past the end are zeros."""

    @abstractmethod
    def try_write(self, offset: int, data: Buffer) -> bool:
        """Write all of `data` without waiting for a device, or say False."""

    @abstractmethod
    async def write(self, offset: int, data: Buffer, *, durable: bool = False) -> None:
        """Write all of `data`; extends the storage where needed.

        Args:
            offset: Bytes.
            data: What to write.
            durable: Be durable on return (RWF_DSYNC). A failure counts as a
                failed `flush`.
        """

    def takes_pipes(self) -> bool:
        """Return whether `write_piped` is possible, and would most likely not wait."""
        return False

    def write_piped(self, offset: int, pipe_fd: int, length: int) -> None:
        """Write `length` bytes that are in a pipe, at once.

        Raises:
            OSError: Some of them may be written, some may be left in the pipe.
        """
        raise OSError(EOPNOTSUPP, os.strerror(EOPNOTSUPP), self.name)

    async def put(self, offset: int, data: Buffer) -> None:
        """Write all of `data`: at once if that is possible, else in a thread."""
        if not self.try_write(offset, data):
            await self.write(offset, data)

    @abstractmethod
    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make a range read as zeros, within the current size.

        Args:
            offset: Bytes.
            length: Bytes.
            unmap: Whether to give the storage back as well.

        Raises:
            OSError: EOPNOTSUPP if this storage has no quick way.
        """

    async def punch(self, offset: int, length: int) -> None:
        """Give a range back; it reads as zeros. The part past the end is ignored."""
        end = min(offset + length, self.size)
        if end > offset:
            await self.zero(offset, end - offset, unmap=True)

    @abstractmethod
    async def truncate(self, size: int) -> None:
        """Set the length to `size` bytes."""

    @abstractmethod
    async def flush(self) -> None:
        """Make every completed change durable (fdatasync)."""

    async def flush_range(self, offset: int, length: int) -> None:
        """Make a range within the size durable, and the size as far as the range's end.

        Other changes may become durable too, or not. A failure counts as a failed
        `flush`.
        """
        await self.flush()

    @abstractmethod
    async def extents(
        self, offset: int, length: int, *, max_extents: int = 1 << 20
    ) -> list[tuple[int, bool]]:
        """Describe a range within the size as (length, holds data) in order.

        Returns:
            They cover the range, or less once there are `max_extents`.
        """

    async def allocate(self, offset: int, length: int) -> None:
        """Take the space of a range from the file system; extends the storage.

        Raises:
            OSError: There is none, or EOPNOTSUPP if this storage can't do that.
        """
        raise OSError(EOPNOTSUPP, os.strerror(EOPNOTSUPP), self.name)

    def is_sparse(self, cluster_size: int) -> bool:
        """Return whether so many clusters are holes that looking for them pays."""
        return False

    def hole_at(self, offset: int, length: int) -> int:
        """Return how many bytes from `offset` on are known to be a hole, at most `length`.

        Cheap enough to be asked before a large read: 0 also means "not known".
        """
        return 0

    def is_cached(self, offset: int, length: int) -> bool:
        """Return whether a range is in the page cache, so that `send` would not wait.

        False also means that `send` is not possible.
        """
        return False

    def send(self, socket_fd: int, offset: int, length: int) -> int:
        """Hand cached bytes to a non-blocking socket without copying them.

        Returns:
            How many bytes, 0 at the end of the file.

        Raises:
            BlockingIOError: The socket takes nothing now.
        """
        raise OSError(EOPNOTSUPP, os.strerror(EOPNOTSUPP), self.name)

    def lent(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Return the regions (offset, length) of which `send` may have handed out pages.

        They overlap the range, and may begin before it and end behind it.
        """
        return []

    async def recall(self, offset: int, length: int) -> None:  # noqa: B027 -- none are lent
        """Let the page cache forget a region that `lent` has named.

        Pages to which somebody refers stay, and so do those that were not written back.
        """

    def any_cached(self, offset: int, length: int) -> bool:
        """Return whether any page of a range is in the page cache, or might be."""
        return False

    @property
    def can_recall(self) -> bool:
        """Whether `recall` can succeed."""
        return False

    def read_now(self, offset: int, view: memoryview) -> None:
        """Fill `view`, waiting for the device if need be: for what is most likely cached."""
        raise OSError(EOPNOTSUPP, os.strerror(EOPNOTSUPP), self.name)

    async def prefetch(self, offset: int, length: int) -> None:  # noqa: B027 -- a hint
        """Hint that a range will be read soon."""

    @abstractmethod
    async def close(self) -> None:
        """Close, without flushing; never raises for what was not flushed."""
