"""Large folios of the page cache, which make small writes slow.

A file that was read or written in long pieces is cached in folios of up to 2 MiB. ext4
looks at each block of a folio for each write to it (`ext4_block_write_begin`): 4 KiB into one
of 2 MiB takes 30 us, and 2 us into a small one (Linux 6.18). madvise(MADV_COLD) for
one page of a folio makes the kernel split it (mm/madvise.c), for 0.1 ms once, unless it is
dirty, or another process maps it. Large reads become slower by that, small ones by 0.4 us.
"""

from contextlib import suppress
from typing import Final

from nbdserve.storage.mapped import NotMappableError, cool
from nbdserve.storage.residency import Residency

#: Writes up to this size are worth it, if they take longer than that.
SMALL: Final = 16 << 10
SLOW_S: Final = 6e-6
#: Bytes of the largest folio.
_REGION_BITS: Final = 21
#: So many slow ones in a second, and each region is split before it is written to.
_MANY: Final = 8
_SECOND_S: Final = 1.0
#: So many slow ones in a region, and it is tried again: it may have been dirty.
_AGAIN: Final = 32


class Folios:
    """Splits the folios of one file in which there are many small writes.

    Attributes:
        wanted: Whether there were many slow ones: then `split` comes before each small write.
    """

    def __init__(self, residency: Residency) -> None:
        self.wanted = False
        self._residency = residency
        self._slow = 0
        self._since_s = 0.0
        # by region: 0 is to be tried, or slow writes since it was, and 1
        self._tried = bytearray()

    def slow(self, offset: int, now_s: float) -> None:
        """Note that a small write took long."""
        if self.wanted:
            region = offset >> _REGION_BITS
            if region < len(self._tried):
                self._tried[region] = (self._tried[region] + 1) % (_AGAIN + 1)
            return
        if now_s - self._since_s > _SECOND_S:
            self._since_s = now_s
            self._slow = 0
        self._slow += 1
        self.wanted = self._slow == _MANY

    def split(self, fd: int, offset: int) -> None:
        """Split the folio at `offset`, unless its region was tried already."""
        region = offset >> _REGION_BITS
        if region >= len(self._tried):
            self._tried.extend(bytes(region + 1 - len(self._tried)))
        if self._tried[region]:
            return
        self._tried[region] = 1
        if not self._residency.pages_cached(fd, offset, 1):
            return  # what is not there is not large, and must not be read
        with suppress(NotMappableError):
            cool(fd, offset)
