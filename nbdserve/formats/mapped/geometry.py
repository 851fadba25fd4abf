"""The numbers that follow from an image's header, computed once."""

from dataclasses import dataclass

from nbdserve.formats.mapped.subclusters import SUBCLUSTER_BITS


@dataclass(slots=True)
class Geometry:
    """How a guest offset splits into L1 index, L2 index and offset in the cluster.

    Resizing changes `size` and the place and length of the L1 table; nothing else changes.

    Attributes:
        size: Bytes of the virtual disk.
        cluster_bits: log2 of the bytes in a cluster.
        l2_bits: log2 of the entries in an L2 table.
        l1_offset: Where the L1 table is in the file.
        l1_entries: Entries of the L1 table.
        extended: Whether L2 entries have a bitmap of subclusters (16 bytes, not 8).
    """

    size: int
    cluster_bits: int
    l2_bits: int
    l1_offset: int
    l1_entries: int
    extended: bool = False

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def l2_entries(self) -> int:
        """Entries of an L2 table."""
        return 1 << self.l2_bits

    @property
    def l2_bytes(self) -> int:
        """Bytes of an L2 table."""
        return (16 if self.extended else 8) << self.l2_bits

    @property
    def grain(self) -> int:
        """Bytes of the smallest piece that an entry can speak of: a subcluster or a cluster."""
        return 1 << self.cluster_bits - (SUBCLUSTER_BITS if self.extended else 0)

    @property
    def table_bits(self) -> int:
        """log2 of the guest bytes that one L2 table maps."""
        return self.cluster_bits + self.l2_bits

    def align_up(self, offset: int) -> int:
        """Round up to a cluster."""
        return -(-offset >> self.cluster_bits) << self.cluster_bits
