"""Reference counts of all clusters of a file, in little memory.

Nearly every cluster is used once or not at all, and counts lie in runs. So a
count is one byte, kept in segments that exist where something is counted;
counts of 255 and more are in a dict beside them. Runs are counted and compared
by whole slices, at memory speed.

The refcount widths of docs/interop/qcow2.rst (1 to 64 bits) are turned into this
form and back by `decode_block` and `encode_block`.
"""

import sys
from array import array
from collections.abc import Iterator

from nbdserve.errors import ImageError

SEGMENT_BITS = 12
SEGMENT = 1 << SEGMENT_BITS
#: 512 MiB of counts: 32 TiB of data in 64 KiB clusters.
MAX_SEGMENTS = 1 << 17
_MANY = 255
_ONES = bytes([1]) * SEGMENT
_ZEROS = bytes(SEGMENT)


class ClusterCounts:
    """A map from cluster number to count, 0 where nothing was counted."""

    def __init__(self) -> None:
        self._segments: dict[int, bytearray] = {}
        self._many: dict[int, int] = {}

    def __getitem__(self, cluster: int) -> int:
        segment = self._segments.get(cluster >> SEGMENT_BITS)
        if segment is None:
            return 0
        count = segment[cluster & SEGMENT - 1]
        return count if count < _MANY else self._many[cluster]

    def segments(self) -> list[int]:
        """Return the numbers of the segments that exist, in order."""
        return sorted(self._segments)

    def segment(self, number: int) -> bytes | bytearray:
        """Return `SEGMENT` counts as bytes; 255 means: ask for the cluster itself."""
        return self._segments.get(number, _ZEROS)

    def add(self, first: int, length: int, times: int = 1) -> None:
        """Count `length` clusters from `first` on, `times` each.

        Raises:
            ImageError: It would take too much memory.
        """
        for number, start, stop in _pieces(first, length):
            segment = self._writable(number)
            if times == 1 and segment[start:stop] == _ZEROS[: stop - start]:
                segment[start:stop] = _ONES[: stop - start]
                continue
            base = number << SEGMENT_BITS
            for index in range(start, stop):
                self._set(base + index, self[base + index] + times)

    def load(self, first: int, counts: bytes, many: dict[int, int]) -> None:
        """Set the counts from `first` on, as `decode_block` returns them."""
        offset = 0
        for number, start, stop in _pieces(first, len(counts)):
            piece = counts[offset : offset + stop - start]
            offset += stop - start
            if number in self._segments or piece != _ZEROS[: len(piece)]:
                self._writable(number)[start:stop] = piece
        for index, count in many.items():
            self._many[first + index] = count

    def is_ones(self, first: int, length: int) -> bool:
        """Return whether each of these clusters counts exactly 1."""
        return all(
            self.segment(number)[start:stop] == _ONES[: stop - start]
            for number, start, stop in _pieces(first, length)
        )

    def counts(self, first: int, length: int) -> list[int]:
        """Return the counts of a few clusters."""
        return [self[cluster] for cluster in range(first, first + length)]

    def slice(self, first: int, length: int) -> bytes:
        """Return counts as bytes, 255 for 255 and more."""
        return b"".join(
            self.segment(number)[start:stop]
            for number, start, stop in _pieces(first, length)
        )

    def beyond(self, other: "ClusterCounts") -> "ClusterCounts":
        """Return by how much each count is larger than that of `other`."""
        result = ClusterCounts()
        for number, segment in self._segments.items():
            base = number << SEGMENT_BITS
            theirs = other.segment(number)
            if segment == theirs and _MANY not in segment:
                continue
            for index, count in enumerate(segment):
                if count != theirs[index] or count == _MANY:
                    more = self[base + index] - other[base + index]
                    if more > 0:
                        result.add(base + index, 1, more)
        return result

    def last(self) -> int:
        """Return the highest cluster that counts more than 0, -1 if none does."""
        for number in sorted(self._segments, reverse=True):
            used = self._segments[number].rstrip(b"\0")
            if used:
                return (number << SEGMENT_BITS) + len(used) - 1
        return -1

    def used_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (first cluster, length) of ranges that hold all counts but 0.

        Ranges may hold zeros too, but neither begin nor end with one.
        """
        for number in self.segments():
            segment = self._segments[number]
            stripped = segment.strip(b"\0")
            if stripped:
                start = len(segment) - len(segment.lstrip(b"\0"))
                yield (number << SEGMENT_BITS) + start, len(stripped)

    def highest_count(self) -> int:
        """Return the largest count, 0 if there is none."""
        most = max((max(segment) for segment in self._segments.values()), default=0)
        return max(self._many.values()) if most == _MANY else most

    def _writable(self, number: int) -> bytearray:
        segment = self._segments.get(number)
        if segment is None:
            if len(self._segments) >= MAX_SEGMENTS:
                raise ImageError(
                    f"more than {MAX_SEGMENTS * SEGMENT} clusters are in use: too many"
                    " to count"
                )
            segment = self._segments[number] = bytearray(SEGMENT)
        return segment

    def _set(self, cluster: int, count: int) -> None:
        segment = self._writable(cluster >> SEGMENT_BITS)
        segment[cluster & SEGMENT - 1] = min(count, _MANY)
        if count >= _MANY:
            self._many[cluster] = count


def _pieces(first: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Cut a run of clusters at segment borders: (segment, start, stop)."""
    end = first + length
    while first < end:
        number, start = first >> SEGMENT_BITS, first & SEGMENT - 1
        stop = min(SEGMENT, start + end - first)
        yield number, start, stop
        first += stop - start


def decode_block(block: bytes, order: int) -> tuple[bytes, dict[int, int]]:
    """Turn a refcount block into counts.

    Args:
        block: The bytes as they are in the file.
        order: log2 of the width in bits; below 3, the lowest bits come first.

    Returns:
        One byte for each cluster, 255 for 255 and more, and for those the exact
        counts by index.
    """
    if order < 3:
        per_byte = 8 >> order
        counts = bytearray(len(block) * per_byte)
        for index in range(per_byte):
            counts[index::per_byte] = block.translate(_EXTRACT[order, index])
        return bytes(counts), {}
    width = 1 << order - 3
    low = bytearray(block[width - 1 :: width])
    exact = {
        index: int.from_bytes(block[index * width : (index + 1) * width], "big")
        for index in _candidates(block, low, width)
    }
    many = {index: count for index, count in exact.items() if count >= _MANY}
    for index in many:
        low[index] = _MANY
    return bytes(low), many


def _extraction(order: int, index: int) -> bytes:
    bits = 1 << order
    return bytes(byte >> index * bits & (1 << bits) - 1 for byte in range(256))


_EXTRACT = {
    (order, index): _extraction(order, index)
    for order in range(3)
    for index in range(8 >> order)
}


def _candidates(block: bytes, low: bytearray, width: int) -> list[int]:
    """Return the indexes whose count may be 255 or more."""
    if width == 1:
        return [index for index, byte in enumerate(low) if byte == _MANY]
    high_is_zero = all(block[at::width].count(0) == len(low) for at in range(width - 1))
    if high_is_zero and _MANY not in low:
        return []
    words = array({2: "H", 4: "I", 8: "Q"}[width], block)
    if sys.byteorder == "little":
        words.byteswap()
    return [index for index, word in enumerate(words) if word >= _MANY]


def encode_block(counts: list[int] | bytes, order: int) -> bytes:
    """Turn exact counts into a refcount block.

    Args:
        counts: One for each cluster, none larger than the width can hold.
        order: log2 of the width in bits.
    """
    if order < 3:
        per_byte, bits = 8 >> order, 1 << order
        return bytes(
            sum(count << at * bits for at, count in enumerate(counts[i : i + per_byte]))
            for i in range(0, len(counts), per_byte)
        )
    width = 1 << order - 3
    if isinstance(counts, bytes):
        block = bytearray(len(counts) * width)
        block[width - 1 :: width] = counts
        return bytes(block)
    return b"".join(count.to_bytes(width, "big") for count in counts)
