"""How qcow2 spells L1 and L2 entries (docs/interop/qcow2.rst, "Cluster mapping")."""

from typing import Final

from nbdserve.formats.mapped import subclusters
from nbdserve.formats.mapped.entries import (
    BAD,
    BITMAP_SHIFT,
    COMPRESSED,
    NORMAL,
    SPLIT,
    SPLIT_UNPLACED,
    UNALLOCATED,
    ZERO,
    ZERO_ALLOCATED,
)

#: Bits 9 to 55: where the table or cluster is.
OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
#: Bit 63: its reference count is exactly one.
COPIED: Final = 1 << 63
#: Bit 62 of an L2 entry.
COMPRESSED_FLAG: Final = 1 << 62
#: Bit 0 of an L2 entry, version 3: reads as zeros whatever the offset says.
ZERO_FLAG: Final = 1
# bits 1 to 8 and 56 to 61
_L2_RESERVED: Final = 0x3F00_0000_0000_01FE
# bits 0 to 8 and 56 to 62
_L1_RESERVED: Final = 0x7F00_0000_0000_01FF


class Qcow2Entries:
    """The codec of one image, whose version and cluster size it knows."""

    l1_offset_mask = OFFSET_MASK
    l2_offset_mask = OFFSET_MASK
    compressed_flag = COMPRESSED_FLAG

    def __init__(
        self, version: int, cluster_bits: int, *, external: bool = False
    ) -> None:
        """`version` is 2 or 3; `external` says that data have a file of their own."""
        self._external = external
        self.zero_entry: int | None = ZERO_FLAG if version >= 3 else None
        self._in_cluster = (1 << cluster_bits) - 1
        # Where the offset of compressed data ends and its sector count begins.
        self._size_shift = 62 - (cluster_bits - 8)

    def classify(self, word: int, bitmap: int = 0) -> int:
        """Return the kind of an L2 entry."""
        if not word:
            return UNALLOCATED
        if word & COMPRESSED_FLAG:
            return self._classify_compressed(word)
        host_offset = word & OFFSET_MASK
        if word & _L2_RESERVED or host_offset & self._in_cluster:
            return BAD
        if word & ZERO_FLAG:
            if self.zero_entry is None:
                return BAD
            return ZERO_ALLOCATED if host_offset else ZERO
        return NORMAL if self._is_place(word) else UNALLOCATED

    def _is_place(self, word: int) -> bool:
        # The first cluster of an image is the header: COPIED with no offset is no cluster,
        # as in qemu. In a data file it is the first one.
        return bool(word & OFFSET_MASK or (self._external and word & COPIED))

    def _classify_compressed(self, word: int) -> int:
        # A compressed cluster is never COPIED and lies below 2^56.
        offset, _ = self.compressed_extent(word)
        impossible = word & COPIED or offset >> 56 or not offset or self._external
        return BAD if impossible else COMPRESSED

    def l1_is_valid(self, word: int) -> bool:
        """Return whether an L1 entry obeys the specification."""
        return not word & _L1_RESERVED and not word & OFFSET_MASK & self._in_cluster

    def link(self, host_offset: int) -> int:
        """Return the entry of a cluster or table whose reference count is one."""
        return host_offset | COPIED

    def compressed_extent(self, word: int) -> tuple[int, int]:
        """Return host offset and length in bytes of compressed data.

        The length counts whole 512-byte sectors, so it is an upper bound.
        """
        offset = word & ((1 << self._size_shift) - 1)
        sectors = ((word & (COMPRESSED_FLAG - 1)) >> self._size_shift) + 1
        return offset, sectors * 512 - (offset & 511)


class ExtendedEntries(Qcow2Entries):
    """The codec of an image with extended L2 entries.

    They have no zero flag: that bit is reserved, and the bitmap says what reads as zeros.
    """

    def __init__(
        self, version: int, cluster_bits: int, *, external: bool = False
    ) -> None:
        """`version` is 3; `external` says that data have a file of their own."""
        super().__init__(version, cluster_bits, external=external)
        self.zero_entry = subclusters.ALL_ZERO << BITMAP_SHIFT

    def classify(self, word: int, bitmap: int = 0) -> int:
        """Return the kind of an L2 entry."""
        if word & COMPRESSED_FLAG:
            # it has no subclusters
            return BAD if bitmap else self._classify_compressed(word)
        host_offset = word & OFFSET_MASK
        reserved = word & (_L2_RESERVED | ZERO_FLAG) or host_offset & self._in_cluster
        if reserved or not subclusters.is_valid(bitmap):
            return BAD
        if not self._is_place(word):
            # neither a flag nor a subcluster makes sense without a place
            misplaced = word or subclusters.allocated(bitmap)
            return BAD if misplaced else _UNPLACED.get(bitmap, SPLIT_UNPLACED)
        return _PLACED.get(bitmap, SPLIT)


_UNPLACED: Final = {0: UNALLOCATED, subclusters.ALL_ZERO: ZERO}
_PLACED: Final = {subclusters.ALL: NORMAL, subclusters.ALL_ZERO: ZERO_ALLOCATED}
