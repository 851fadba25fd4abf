"""The bitmap of an extended L2 entry (docs/interop/qcow2.rst, "Extended L2 Entries").

A cluster has 32 subclusters. Bit `n` of the bitmap says that subcluster `n` is in the host
cluster, bit `32 + n` that it reads as zeros; neither, that the backing file decides. Both
at once is invalid.

A set of subclusters is a mask of 32 bits. A subcluster has its place at the same offset in
the host cluster all its life, so whatever is written to that place late, or survives
there, is data of the same guest bytes.
"""

from collections.abc import Iterator
from typing import Final

SUBCLUSTER_BITS: Final = 5
COUNT: Final = 1 << SUBCLUSTER_BITS
#: The mask of all subclusters, and the bitmap of a cluster of which all are there.
ALL: Final = (1 << COUNT) - 1
#: The bitmap of a cluster of which all subclusters read as zeros.
ALL_ZERO: Final = ALL << COUNT


def allocated(bitmap: int) -> int:
    """Return the subclusters that are in the host cluster."""
    return bitmap & ALL


def zero(bitmap: int) -> int:
    """Return the subclusters that read as zeros."""
    return bitmap >> COUNT


def is_valid(bitmap: int) -> bool:
    """Return whether no subcluster is said to be two things."""
    return not bitmap & bitmap >> COUNT


def touched(within: int, length: int, cluster_bits: int) -> int:
    """Return the subclusters that a range of a cluster meets.

    Args:
        within: Bytes from the beginning of the cluster.
        length: Bytes, at least 1; what lies past the end of the cluster is ignored.
        cluster_bits: log2 of the bytes in a cluster.
    """
    bits = cluster_bits - SUBCLUSTER_BITS
    first = within >> bits
    last = min(within + length - 1 >> bits, COUNT - 1)
    return (1 << last + 1) - (1 << first)


def with_allocated(bitmap: int, mask: int) -> int:
    """Return a bitmap in which the subclusters of `mask` are in the host cluster."""
    return (bitmap | mask) & ~(mask << COUNT)


def runs(mask: int) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of each run of neighbouring subclusters."""
    first = 0
    while mask:
        gap = (mask & -mask).bit_length() - 1
        mask >>= gap
        count = (~mask & mask + 1).bit_length() - 1
        mask >>= count
        first += gap
        yield first, first + count
        first += count


def alike(bitmap: int, index: int) -> tuple[int, int, int]:
    """Describe the run of subclusters that begins with number `index`.

    Returns:
        1 or 0 for "in the host cluster", 1 or 0 for "reads as zeros", and how many
        subclusters from `index` on are so.
    """
    here, zeros = bitmap >> index & 1, bitmap >> COUNT + index & 1
    low = bitmap & ALL if here else ~bitmap & ALL
    high = bitmap >> COUNT if zeros else ~bitmap >> COUNT & ALL
    same = (low & high) >> index
    return here, zeros, (~same & same + 1).bit_length() - 1
