"""Which pages of a file sockets may refer to: what sendfile(2) has handed out.

The kernel tells nobody when a socket, or a pipe behind it, is done with a page. But the
page cache forgets a clean page only if nobody refers to it (`mapping_evict_folio` in
mm/truncate.c), and what is written afterwards goes to another page.
"""

import ctypes
import mmap
from typing import Final

#: Bytes of the largest folio of the page cache, where pages have 4 KiB: whoever refers
#: to one page of it keeps all of it.
REGION: Final = 2 << 20
_PAGE: Final = 4096
#: linux/magic.h: tmpfs, ramfs, hugetlbfs. Their pages are the file, and never forgotten.
_IN_MEMORY: Final = frozenset({0x01021994, 0x858458F6, 0x958458F6})
#: Longer than struct statfs of any architecture.
_STATFS_BYTES: Final = 256

_libc = ctypes.CDLL(None, use_errno=True)
#: By device and inode: a byte for each region, 1 if some of it was lent. Replies may be
#: unread for longer than an image is open.
_lent_of: dict[tuple[int, int], bytearray] = {}


def can_recall(fd: int) -> bool:
    """Return whether the page cache can be made to forget pages of a file."""
    status = ctypes.create_string_buffer(_STATFS_BYTES)
    if mmap.PAGESIZE != _PAGE or _libc.fstatfs(fd, status):
        return False
    return ctypes.c_uint.from_buffer(status).value not in _IN_MEMORY


class Lent:
    """The regions of one file of which something was lent."""

    def __init__(self, identity: tuple[int, int]) -> None:
        """Go on with what is known of the file with that device and inode number."""
        self._identity = identity

    def add(self, offset: int, length: int) -> None:
        """Note that a range is handed out."""
        regions = _lent_of.setdefault(self._identity, bytearray())
        first, end = offset // REGION, -(-(offset + length) // REGION)
        if end > len(regions):
            regions.extend(bytes(end - len(regions)))
        regions[first:end] = b"\1" * (end - first)

    def within(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Return the regions (offset, length) that overlap a range and may be lent."""
        regions = _lent_of.get(self._identity, b"")
        end = -(-(offset + length) // REGION)
        found: list[tuple[int, int]] = []
        number = regions.find(1, offset // REGION, end)
        while number >= 0:
            found.append((number * REGION, REGION))
            number = regions.find(1, number + 1, end)
        return found

    def settle(self, offset: int) -> None:
        """Note that nobody refers to any page of the region at `offset`."""
        _lent_of[self._identity][offset // REGION] = 0
