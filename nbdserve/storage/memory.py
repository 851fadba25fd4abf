"""Bytes in memory: the storage of tests, and of disks that need not outlive us.

It keeps pages only where something was written, so that a disk of many terabytes
costs nothing until it is used.
"""

import errno
import os

from nbdserve.storage.base import Buffer, Storage

PAGE = 4096
_ZERO_PAGE = bytes(PAGE)


class MemoryStorage(Storage):
    """A sparse file in memory; each call finishes at once.

    Attributes:
        flush_count: How many times `flush` was called.
    """

    def __init__(
        self,
        content: Buffer = b"",
        *,
        size: int | None = None,
        name: str = "memory",
        read_only: bool = False,
    ) -> None:
        """Start with `content`, extended with zeros to `size`."""
        self.name = name
        self.read_only = False
        self.zeroes_on_extend = True
        self.fixed_size = False
        self.flush_count = 0
        self._pages: dict[int, bytearray] = {}
        self._size = 0
        self._closed = False
        self.try_write(0, content)
        self._size = max(self._size, size or 0)
        self.read_only = read_only

    @property
    def size(self) -> int:
        """The current length in bytes."""
        return self._size

    def content(self) -> bytes:
        """Return a copy of everything, also after closing."""
        buffer = bytearray(self._size)
        self._copy_out(0, memoryview(buffer))
        return bytes(buffer)

    def try_read(self, offset: int, view: memoryview) -> bool:
        """Fill `view`."""
        self._require_open()
        self._copy_out(offset, view)
        return True

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill `view`."""
        self.try_read(offset, view)

    def try_write(self, offset: int, data: Buffer) -> bool:
        """Write all of `data`."""
        self._require_writable()
        view = memoryview(data)
        done = 0
        while done < len(view):
            index, within = divmod(offset + done, PAGE)
            count = min(PAGE - within, len(view) - done)
            page = self._pages.get(index)
            if page is None:
                page = self._pages[index] = bytearray(PAGE)
            page[within : within + count] = view[done : done + count]
            done += count
        self._size = max(self._size, offset + done)
        return True

    async def write(self, offset: int, data: Buffer, *, durable: bool = False) -> None:
        """Write all of `data`."""
        self.try_write(offset, data)

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make a range read as zeros; with `unmap`, whole pages become holes."""
        self._require_writable()
        self._clear(offset, offset + length)
        if not unmap:
            for index in range(offset // PAGE, -(-(offset + length) // PAGE)):
                self._pages.setdefault(index, bytearray(PAGE))

    async def truncate(self, size: int) -> None:
        """Set the length; what is cut off reads as zeros when it comes back."""
        self._require_writable()
        if size < self._size:
            self._clear(size, -(-self._size // PAGE) * PAGE)
        self._size = size

    async def flush(self) -> None:
        """Count; there is nothing to make durable."""
        self._require_open()
        self.flush_count += 1

    async def extents(
        self, offset: int, length: int, *, max_extents: int = 1 << 20
    ) -> list[tuple[int, bool]]:
        """Describe a range by the pages that exist."""
        self._require_open()
        result: list[tuple[int, bool]] = []
        position = offset
        end = offset + length
        stored = sorted(
            index
            for index in self._pages
            if offset < (index + 1) * PAGE and index * PAGE < end
        )
        for index in stored:
            start = max(index * PAGE, offset)
            stop = min((index + 1) * PAGE, end)
            if start > position:
                result.append((start - position, False))
                result.append((stop - start, True))
            elif result:
                result[-1] = (result[-1][0] + stop - start, True)
            else:
                result.append((stop - start, True))
            position = stop
        if position < end:
            result.append((end - position, False))
        return result[:max_extents]

    def hole_at(self, offset: int, length: int) -> int:
        """Count the pages that do not exist."""
        position = offset
        while position < offset + length and position // PAGE not in self._pages:
            position = (position // PAGE + 1) * PAGE
        return min(position - offset, length)

    async def close(self) -> None:
        """Refuse further calls; `content` still tells what was there."""
        self._closed = True

    def _copy_out(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            index, within = divmod(offset + done, PAGE)
            count = min(PAGE - within, len(view) - done)
            page = self._pages.get(index, _ZERO_PAGE)
            view[done : done + count] = page[within : within + count]
            done += count

    def _clear(self, start: int, end: int) -> None:
        first, last = -(-start // PAGE), end // PAGE
        if last - first > len(self._pages):
            for index in [i for i in self._pages if first <= i < last]:
                del self._pages[index]
        else:
            for index in range(first, last):
                self._pages.pop(index, None)
        for position, stop in (
            (start, min(first * PAGE, end)),
            (max(last * PAGE, start), end),
        ):
            page = self._pages.get(position // PAGE)
            if page is not None and stop > position:
                within = position % PAGE
                page[within : within + stop - position] = bytes(stop - position)

    def _require_open(self) -> None:
        if self._closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), self.name)

    def _require_writable(self) -> None:
        if self._closed or self.read_only:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), self.name)
