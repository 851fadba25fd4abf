"""How large a file will be if a disk is converted, with the numbers of qemu-img."""

from typing import Any, NamedTuple

from nbdserve.block.device import BlockDevice
from nbdserve.formats.persistent_bitmaps import bitmaps_size
from nbdserve.formats.qcow2.create import Options
from nbdserve.formats.regions import nonzero_ranges


class Measurement(NamedTuple):
    """Sizes of a file, in bytes.

    Attributes:
        required: Enough for what the disk holds now.
        fully_allocated: Enough whatever is written to it later.
        bitmaps: What its persistent bitmaps need besides, if they are copied; None if
            the source or the new image can't have any.
    """

    required: int
    fully_allocated: int
    bitmaps: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Return what `qemu-img measure --output=json` prints."""
        sizes = {} if self.bitmaps is None else {"bitmaps": self.bitmaps}
        return sizes | {
            "required": self.required,
            "fully-allocated": self.fully_allocated,
        }

    def as_text(self) -> str:
        """Return what `qemu-img measure` prints, ending in a newline."""
        text = (
            f"required size: {self.required}\n"
            f"fully allocated size: {self.fully_allocated}\n"
        )
        return text if self.bitmaps is None else f"{text}bitmaps size: {self.bitmaps}\n"


def measure_raw(size: int) -> Measurement:
    """Measure a raw image: holes count towards the length of its file."""
    size = -(-size // 512) * 512
    return Measurement(size, size)


async def measure_qcow2(
    size: int,
    options: Options,
    *,
    source: BlockDevice | None = None,
    preallocated: bool = False,
    luks_bytes: int = 0,
) -> Measurement:
    """Measure a qcow2 image, uncompressed.

    Args:
        size: Bytes of the disk.
        options: Layout of the image.
        source: The disk that is to be converted; None is an empty one.
        preallocated: Whether all clusters will be allocated from the beginning.
        luks_bytes: Of header and key material, if it will be encrypted.

    Raises:
        ConfigError: The disk is too large for its clusters.
        ImageError: The source is broken.
        OSError: The source can't be read.
    """
    cluster_size = options.cluster_size
    options.l1_entries(size)
    data_clusters = -(-size // cluster_size)
    metadata = _metadata_clusters(data_clusters, options)
    # qemu adds these to its sums, as if they needed no refcounts
    metadata += -(-luks_bytes // cluster_size)
    used = 0
    if preallocated or (options.backing_name is not None and source is not None):
        # nobody knows how much the new backing file has in common with the source
        used = data_clusters
    elif source is not None:
        used = await _clusters_with_data(source, cluster_size)
    return Measurement(
        (metadata + used) * cluster_size,
        (metadata + data_clusters) * cluster_size,
        await bitmaps_size(source, cluster_size) if options.version > 2 else None,
    )


def _metadata_clusters(data_clusters: int, options: Options) -> int:
    """Return the clusters of header, L1 and L2 tables and refcounts if all is used."""
    words = options.cluster_size // 8
    l2_tables = -(-data_clusters // options.l2_entries)
    clusters = 1 + l2_tables + -(-l2_tables // words)
    per_block = options.cluster_size * 8 // options.refcount_bits
    table = blocks = 0
    while True:
        before = table, blocks
        total = clusters + data_clusters + table + blocks
        blocks = -(-total // per_block)
        table = -(-blocks // words)
        if (table, blocks) == before:
            return clusters + table + blocks


async def _clusters_with_data(source: BlockDevice, cluster_size: int) -> int:
    """Return how many clusters may hold something else than zeros."""
    count, counted = 0, 0
    async for offset, length in nonzero_ranges([source], source.size):
        first = max(offset // cluster_size, counted)
        end = -(-(offset + length) // cluster_size)
        if end > first:
            count += end - first
            counted = end
    return count
