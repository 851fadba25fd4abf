"""Remember which ranges of a disk were changed, as long as it is served.

`DirtyTracking` goes around a disk of which somebody wants to know that; every other disk
does without it. A range is marked before the change starts, so that a bitmap never
misses one: it may name a range whose change has failed.
"""

from bisect import bisect_right
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from typing import Any, Final

from nbdserve.block.device import BlockDevice, Hole
from nbdserve.block.extents import Extent

#: Bytes of the disk that one mark stands for: qemu's default for new bitmaps.
GRANULE: Final = 64 << 10
#: Marks of one page, which exists from the first change on: 256 MiB of the disk.
_PAGE: Final = 4096


class DirtyBitmap:
    """What was changed, in units of `GRANULE`.

    Attributes:
        name: For people and clients.
        size: Bytes of the disk.
    """

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self._pages: dict[int, bytearray] = {}  # a byte for each granule

    def mark(self, offset: int, length: int) -> None:
        """Note that a range (bytes) is being changed."""
        if not length:
            return
        first = offset // GRANULE
        end = -(-(offset + length) // GRANULE)
        while first < end:
            number, start = divmod(first, _PAGE)
            count = min(_PAGE - start, end - first)
            page = self._pages.get(number)
            if page is None:
                page = self._pages[number] = bytearray(_PAGE)
            page[start : start + count] = b"\1" * count
            first += count

    def runs(
        self, offset: int, length: int, *, max_runs: int
    ) -> list[tuple[int, bool]]:
        """Describe a range.

        Args:
            offset: Bytes.
            length: Bytes, at least 1.
            max_runs: Stop early after so many.

        Returns:
            Lengths in bytes and whether they are dirty, neighbours differ.
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
        page_bytes = _PAGE * GRANULE
        numbers = sorted(self._pages)
        while offset < end:
            number, within = divmod(offset, page_bytes)
            page_end = min((number + 1) * page_bytes, end)
            page = self._pages.get(number)
            if page is None:
                # to the next page that exists, however far that is
                later = bisect_right(numbers, number)
                known = numbers[later : later + 1]
                offset = min(known[0] * page_bytes, end) if known else end
                yield offset, False
                continue
            granule = within // GRANULE
            while offset < page_end:
                dirty = bool(page[granule])
                found = page.find(0 if dirty else 1, granule)
                granule = _PAGE if found < 0 else found
                offset = min(number * page_bytes + granule * GRANULE, page_end)
                yield offset, dirty


class DirtyTracking(BlockDevice):
    """A disk whose changes are noted in bitmaps.

    Attributes:
        bitmaps: They all begin empty.
    """

    def __init__(self, device: BlockDevice, names: Iterable[str]) -> None:
        self._device = device
        self.size = device.size
        self.read_only = device.read_only
        self.preferred_block = device.preferred_block
        self.can_trim = device.can_trim
        self.can_fast_zero = device.can_fast_zero
        self.notes = device.notes
        self.bitmaps = tuple(DirtyBitmap(name, device.size) for name in names)

    def _mark(self, offset: int, length: int) -> None:
        for bitmap in self.bitmaps:
            bitmap.mark(offset, length)

    # Not coroutines of their own: those of the disk below are handed on as they are.

    def read_into(
        self, offset: int, buffer: memoryview
    ) -> Coroutine[Any, Any, Sequence[Hole]]:
        """Read from the disk below."""
        return self._device.read_into(offset, buffer)

    def write(
        self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False
    ) -> Coroutine[Any, Any, None]:
        """Mark, then write."""
        self._mark(offset, len(data))
        return self._device.write(offset, data, fua=fua)

    def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        may_unmap: bool = True,
        fast_only: bool = False,
        fua: bool = False,
    ) -> Coroutine[Any, Any, None]:
        """Mark, then make zeros."""
        self._mark(offset, length)
        return self._device.write_zeroes(
            offset, length, may_unmap=may_unmap, fast_only=fast_only, fua=fua
        )

    def trim(
        self, offset: int, length: int, *, fua: bool = False
    ) -> Coroutine[Any, Any, None]:
        """Mark, then trim: the range may read as something else from now on."""
        self._mark(offset, length)
        return self._device.trim(offset, length, fua=fua)

    def flush(self) -> Coroutine[Any, Any, None]:
        """Flush the disk below; bitmaps live as long as the process."""
        return self._device.flush()

    def cache(self, offset: int, length: int) -> Coroutine[Any, Any, None]:
        """Hand the hint on."""
        return self._device.cache(offset, length)

    def block_status(
        self, offset: int, length: int, *, max_extents: int = 1 << 20
    ) -> Coroutine[Any, Any, list[Extent]]:
        """Describe the disk below."""
        return self._device.block_status(offset, length, max_extents=max_extents)

    def close(self) -> Coroutine[Any, Any, None]:
        """Close the disk below."""
        return self._device.close()
