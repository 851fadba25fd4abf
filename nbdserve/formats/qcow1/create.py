"""Writing a new qcow version 1 image into an empty file.

Geometry as `qemu-img create -f qcow` chooses it: 4 KiB clusters and L2 tables,
or over a backing file 512-byte clusters and L2 tables of 32 KiB. Blocking calls:
made by the command line or in a thread.
"""

import os

from nbdserve.errors import ConfigError
from nbdserve.formats.qcow1.header import (
    LENGTH,
    MAX_BACKING_NAME,
    MAX_L1_ENTRIES,
    Header,
    encode_header,
)

#: log2 of (cluster bytes, L2 entries).
_PLAIN_BITS = (12, 9)
_BACKED_BITS = (9, 12)


def write_image(fd: int, size: int, *, backing_name: bytes | None = None) -> None:
    """Write a new image into an empty file; the caller syncs it.

    Args:
        fd: Open for writing.
        size: Bytes of the disk, at least 1, rounded up to 512 as qemu does.
        backing_name: As it shall be stored; the format can't record its format.

    Raises:
        ConfigError: The size or the length of the name is not possible.
        OSError: The file can't be written.
    """
    if size < 1:
        raise ConfigError("a qcow image can't be empty: the size must be at least 1")
    if len(backing_name or b"") > MAX_BACKING_NAME:
        raise ConfigError(
            f"the backing file name has {len(backing_name or b'')} bytes: at most"
            f" {MAX_BACKING_NAME}"
        )
    cluster_bits, l2_bits = _BACKED_BITS if backing_name else _PLAIN_BITS
    header = Header(
        backing_name=backing_name,
        size=-(-size // 512) * 512,
        cluster_bits=cluster_bits,
        l2_bits=l2_bits,
        l1_table_offset=LENGTH + len(backing_name or b"") + 7 & ~7,
    )
    if header.l1_size > MAX_L1_ENTRIES:
        limit = MAX_L1_ENTRIES << cluster_bits + l2_bits
        raise ConfigError(f"{size} bytes are too many for qcow: at most {limit}")
    end = header.l1_table_offset + header.l1_size * 8
    cluster_size = header.cluster_size
    os.ftruncate(fd, -(-end // cluster_size) * cluster_size)
    os.pwrite(fd, encode_header(header), 0)
