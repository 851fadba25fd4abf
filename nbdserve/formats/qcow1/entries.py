"""How qcow version 1 spells L1 and L2 entries.

No specification was ever published: this is what qemu's block/qcow.c reads and writes.
"""

from nbdserve.formats.mapped.entries import BAD, COMPRESSED, NORMAL, UNALLOCATED

_COMPRESSED_FLAG = 1 << 63


class Qcow1Entries:
    """The codec of one image, whose cluster size it knows."""

    l1_offset_mask = (1 << 64) - 1
    l2_offset_mask = (1 << 64) - 1
    compressed_flag = _COMPRESSED_FLAG
    zero_entry = None

    def __init__(self, cluster_bits: int) -> None:
        """`cluster_bits` is log2 of the cluster size."""
        self._size_shift = 63 - cluster_bits
        self._size_mask = (1 << cluster_bits) - 1

    def classify(self, word: int, bitmap: int = 0) -> int:
        """Return the kind of an L2 entry."""
        if not word:
            return UNALLOCATED
        if word & _COMPRESSED_FLAG:
            return COMPRESSED
        # Clusters need not be aligned to their size, only to sectors.
        return BAD if word & 511 else NORMAL

    def l1_is_valid(self, word: int) -> bool:
        """Return whether an L1 entry can be the offset of a table."""
        return not word & _COMPRESSED_FLAG

    def link(self, host_offset: int) -> int:
        """Return the entry of a cluster or table."""
        return host_offset

    def compressed_extent(self, word: int) -> tuple[int, int]:
        """Return host offset and length in bytes of compressed data."""
        offset = word & ((1 << self._size_shift) - 1)
        return offset, (word >> self._size_shift) & self._size_mask
