"""Another size for an open qcow2 image.

Grow: a larger L1 table, if it takes one (its place is one write of sector 0) -> what is mapped
beyond the old end (VM states, or what a shrink left) is dropped, the tail of the
last cluster zeroed, and hidden where the backing file would show -> barrier -> new
size -> barrier. *Crash: the old size or the new one; leaks.*

Shrink: new size -> barrier -> pointers behind it -> barrier -> their references; the
file is cut when the image is closed. *Crash: the old size or the new one; leaks.*
"""

from nbdserve.errors import ConfigError, ImageError
from nbdserve.formats.qcow2.header import MAX_L1_BYTES, Header, l1_entries_for

#: The largest size that offsets of 64 bits with a sign can reach, in whole sectors.
MAX_SIZE = (1 << 63) - 512


def judge_size(name: str, header: Header, size: int, *, shrink: bool) -> int:
    """Return the size in whole sectors, if the image can have it.

    Raises:
        ConfigError: It is too large, or smaller without `shrink`.
        ImageError: Snapshots rule it out.
    """
    if not 0 <= size <= MAX_SIZE:
        raise ConfigError(f"{name}: size {size} must be 0 to {MAX_SIZE} bytes")
    size = -(-size // 512) * 512
    entries = l1_entries_for(size, header.cluster_bits, extended=header.extended_l2)
    if entries * 8 > MAX_L1_BYTES:
        raise ConfigError(
            f"{name}: {size} bytes need {entries} L1 entries, at most"
            f" {MAX_L1_BYTES // 8} are possible; larger clusters map more"
        )
    if size < header.disk_size and not shrink:
        raise ConfigError(
            f"{name}: has {header.disk_size} bytes, so {size} would lose what lies"
            " behind: say --shrink if you mean it"
        )
    if header.version < 3 and header.nb_snapshots:
        raise ImageError(
            f"{name}: version 2 does not record the size of a snapshot, so an image with"
            " snapshots can't be resized; amend it to version 3"
        )
    return size
