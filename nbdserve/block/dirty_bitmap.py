"""Which granules of a disk were changed: a bit for each, in pages.

The bits of a page lie as in the persistent bitmaps of qcow2 (docs/interop/qcow2.rst of qemu,
"Bitmap Data"): granule 0 is the lowest bit of byte 0. Pages exist where something is
marked, so that the rest of a large disk costs nothing.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator
from typing import Final

#: qemu's default for new bitmaps: 64 KiB of the disk for each bit.
DEFAULT_GRANULARITY_BITS: Final = 16
#: Granules of a page: 4 KiB of bits, for 2 GiB of the disk by default.
_PAGE_BITS: Final = 15
_NOT_ZEROS: Final = re.compile(rb"[^\0]")
_NOT_ONES: Final = re.compile(rb"[^\xff]")
#: Bytes compared at once: 64 KiB that are all alike take 10 us, one by one 800 us.
_CHUNK: Final = 1024
_ZEROS: Final = bytes(_CHUNK)
_ONES: Final = b"\xff" * _CHUNK


class DirtyBitmap:
    """What was changed, in granules.

    Attributes:
        name: For people and clients.
        size: Bytes of the disk.
        granularity_bits: log2 of the bytes that a bit stands for.
        page_bytes: Bytes of a page.
    """

    def __init__(
        self,
        name: str,
        size: int,
        *,
        granularity_bits: int = DEFAULT_GRANULARITY_BITS,
        page_bits: int = _PAGE_BITS,
    ) -> None:
        """Begin with nothing marked; `page_bits` is log2 of the granules of a page."""
        self.name = name
        self.size = size
        self.granularity_bits = granularity_bits
        self.page_bytes = 1 << page_bits - 3
        self._page_bits = page_bits
        self._page_mask = (1 << page_bits) - 1
        self._pages: dict[int, bytearray] = {}
        # shared by all pages that were read as ones: marking changes nothing there
        self._ones: bytearray | None = None
        self._order: list[int] = []

    def mark(self, offset: int, length: int) -> None:
        """Note that a range (bytes) is being changed."""
        if length <= 0:
            return
        first = offset >> self.granularity_bits
        end = (offset + length - 1 >> self.granularity_bits) + 1
        if end - first == 1:
            page = self._pages.get(first >> self._page_bits)
            if page is None:
                page = self._new(first >> self._page_bits)
            page[(first & self._page_mask) >> 3] |= 1 << (first & 7)
            return
        while first < end:
            start = first & self._page_mask
            count = min(self._page_mask + 1 - start, end - first)
            number = first >> self._page_bits
            _set_bits(self._pages.get(number) or self._new(number), start, count)
            first += count

    def _new(self, number: int) -> bytearray:
        page = self._pages[number] = bytearray(self.page_bytes)
        self._order = []
        return page

    # -- pages, for who stores them

    def numbers(self) -> list[int]:
        """Return the numbers of the pages that exist, in order."""
        if len(self._order) != len(self._pages):
            self._order = sorted(self._pages)
        return self._order

    def page(self, number: int) -> bytes:
        """Return the bits of a page; those past the end of the disk are 0."""
        page = self._pages.get(number)
        return bytes(self.page_bytes) if page is None else bytes(page)

    def merge_page(self, number: int, bits: bytes) -> None:
        """Mark what is marked in `bits`, as much of it as the disk has."""
        if bits.count(0xFF) == self.page_bytes:
            self._ones = self._ones or bytearray(bits)
            self._pages[number] = self._ones
            self._order = []
            self._cut(number)
            return
        page = self._pages.get(number) or self._new(number)
        both = int.from_bytes(page, "little") | int.from_bytes(bits, "little")
        page[:] = both.to_bytes(self.page_bytes, "little")
        self._cut(number)

    def merge(self, other: "DirtyBitmap") -> None:
        """Mark what is marked in another bitmap of the same size.

        Granularities may differ: each granule that is dirty in part becomes dirty.
        """
        if (other.granularity_bits, other.page_bytes) == (
            self.granularity_bits,
            self.page_bytes,
        ):
            for number in other.numbers():
                self.merge_page(number, other.page(number))
            return
        for offset, length in other.dirty():
            self.mark(offset, length)

    def copy(self) -> "DirtyBitmap":
        """Return another bitmap with the same marks."""
        bits = self.granularity_bits
        other = DirtyBitmap(
            self.name, self.size, granularity_bits=bits, page_bits=self._page_bits
        )
        for number in self._pages:
            other.merge_page(number, self.page(number))
        return other

    def clear(self) -> None:
        """Forget all marks."""
        self._pages.clear()
        self._order = []

    def resize(self, size: int) -> None:
        """Let the disk have another size: marks past its end go, what is added is clean."""
        self.size = size
        for number in list(self._pages):
            self._cut(number)

    def _cut(self, number: int) -> None:
        """Drop marks past the end of the disk."""
        left = -(-self.size >> self.granularity_bits) - (number << self._page_bits)
        if left <= 0:
            del self._pages[number]
            self._order = []
        elif left <= self._page_mask:
            page = self._pages[number] = self._pages[number][:]
            rest = int.from_bytes(page[left >> 3 :], "little") & (1 << (left & 7)) - 1
            page[left >> 3 :] = rest.to_bytes(len(page) - (left >> 3), "little")

    # -- asking

    def dirty(self) -> Iterator[tuple[int, int]]:
        """Yield offset and length (bytes) of each run that is dirty."""
        offset = start = 0
        was_dirty = False
        for end, dirty in self._boundaries(0, self.size):
            if dirty != was_dirty:
                if was_dirty:
                    yield start, offset - start
                start, was_dirty = offset, dirty
            offset = end
        if was_dirty:
            yield start, offset - start

    def runs(
        self, offset: int, length: int, *, max_runs: int
    ) -> list[tuple[int, bool]]:
        """Describe a range.

        Args:
            offset: Bytes.
            length: Bytes, at least 1.
            max_runs: Stop early after so many.

        Returns:
            Lengths in bytes and whether they are dirty, neighbours differ. What lies
            past the end of the disk is clean.
        """
        result: list[tuple[int, bool]] = []
        for end, dirty in self._boundaries(offset, offset + length):
            if result and result[-1][1] == dirty:
                result[-1] = (result[-1][0] + end - offset, dirty)
            elif len(result) == max_runs:
                break
            else:
                result.append((end - offset, dirty))
            offset = end
        return result

    def _boundaries(self, offset: int, end: int) -> Iterator[tuple[int, bool]]:
        """Go through a range in pieces that are alike: where each ends, and its state."""
        shift = self._page_bits + self.granularity_bits
        numbers = self.numbers()
        while offset < end:
            number = offset >> shift
            page = self._pages.get(number)
            if page is None:
                # to the next page that exists, however far that is
                later = bisect_left(numbers, number)
                known = numbers[later : later + 1]
                offset = min(known[0] << shift, end) if known else end
                yield offset, False
                continue
            start = number << shift
            page_end = min(start + (1 << shift), end)
            granule = offset - start >> self.granularity_bits
            while offset < page_end:
                dirty = bool(page[granule >> 3] >> (granule & 7) & 1)
                granule = _next_change(page, granule, dirty=dirty)
                offset = min(start + (granule << self.granularity_bits), page_end)
                yield offset, dirty


def _set_bits(page: bytearray, start: int, count: int) -> None:
    """Set `count` bits from bit `start` on."""
    end = start + count
    first, last = start >> 3, end >> 3
    if first == last:
        page[first] |= (1 << (end & 7)) - (1 << (start & 7))
        return
    page[first] |= 0x100 - (1 << (start & 7))
    page[first + 1 : last] = b"\xff" * (last - first - 1)
    if end & 7:
        page[last] |= (1 << (end & 7)) - 1


def _next_change(page: bytearray, granule: int, *, dirty: bool) -> int:
    """Return the first granule from `granule` on whose state is not `dirty`."""
    flip = 0xFF if dirty else 0
    others = (page[granule >> 3] ^ flip) >> (granule & 7)
    if not others:
        pattern, same = (_NOT_ONES, _ONES) if dirty else (_NOT_ZEROS, _ZEROS)
        start = (granule >> 3) + 1
        while page[start : start + _CHUNK] == same:
            start += _CHUNK
        found = pattern.search(page, start)
        if found is None:
            return 8 * len(page)
        granule = 8 * found.start()
        others = page[found.start()] ^ flip
    return granule + (others & -others).bit_length() - 1
