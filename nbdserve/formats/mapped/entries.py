"""What an L2 entry can mean, whichever format spells it.

An L2 table in memory keeps two things for each entry: the word as the format
spells it, and its kind, one byte. The kinds are ordered so that the hot path
asks one comparison: from `NORMAL` on, the word names a readable host cluster.

With extended L2 entries (`subclusters.py`) there is a third thing, the bitmap. It
has to be asked only where the subclusters of a cluster differ: that is what the kinds from
`SPLIT_UNPLACED` to `SPLIT_OWNED` say. Where an entry is a single number, the bitmap stands
in its upper 64 bits, so that an entry without one is its word.
"""

from typing import Final, Protocol

#: Not looked at yet since the table was loaded.
UNKNOWN: Final = 0
#: The backing file decides, or zeros where there is none.
UNALLOCATED: Final = 1
#: Reads as zeros and occupies nothing.
ZERO: Final = 2
#: Reads as zeros, and keeps a host cluster whose bytes mean nothing.
ZERO_ALLOCATED: Final = 3
#: A deflated or zstd-compressed cluster.
COMPRESSED: Final = 4
#: Contradicts the specification: reading or writing it is EIO.
BAD: Final = 5
#: Some subclusters read as zeros, others are left to the backing file; no host cluster.
SPLIT_UNPLACED: Final = 6
#: A host cluster of which not all subclusters are there; the next four are to it what
#: those from `NORMAL` on are to a whole one (see `WHOLE`).
SPLIT: Final = 7
SPLIT_SHARED: Final = 8
SPLIT_UNPUBLISHED: Final = 9
SPLIT_OWNED: Final = 10
#: A plain host cluster; who else uses it has not been looked up yet.
NORMAL: Final = 11
#: A plain host cluster that others use too: copied before it is written.
SHARED: Final = 12
#: A plain host cluster of this entry alone whose link is not in the file yet: written
#: in place, and acknowledged after the next commit.
UNPUBLISHED: Final = 13
#: A plain host cluster of this entry alone: written in place.
OWNED: Final = 14

#: From a kind of split cluster to that of a whole one with the same users.
WHOLE: Final = NORMAL - SPLIT
#: Where the bitmap of an entry begins that is a single number.
BITMAP_SHIFT: Final = 64
WORD_MASK: Final = (1 << BITMAP_SHIFT) - 1


class EntryCodec(Protocol):
    """How a format spells L1 and L2 entries.

    Attributes:
        l1_offset_mask: The bits of an L1 entry that are the table's offset.
        l2_offset_mask: The bits of an L2 entry of kind `SPLIT` or later, or
            `ZERO_ALLOCATED`, that are the cluster's offset.
        zero_entry: The entry of a cluster that reads as zeros without having a
            host cluster; None if the format can't say that.
        compressed_flag: The bit of an L2 entry that names compressed data.
    """

    @property
    def l1_offset_mask(self) -> int:
        """See the class."""

    @property
    def l2_offset_mask(self) -> int:
        """See the class."""

    @property
    def zero_entry(self) -> int | None:
        """See the class."""

    @property
    def compressed_flag(self) -> int:
        """See the class."""

    def classify(self, word: int, bitmap: int = 0) -> int:
        """Return the kind of an L2 entry, as far as the entry itself tells."""

    def l1_is_valid(self, word: int) -> bool:
        """Return whether an L1 entry obeys the specification."""

    def link(self, host_offset: int) -> int:
        """Return the entry, L1 or L2, of a table or cluster that it alone uses."""

    def compressed_extent(self, word: int) -> tuple[int, int]:
        """Return host offset and length (an upper bound) of compressed data, in bytes."""
