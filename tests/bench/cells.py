"""What is measured: one line of the table for each kind of load on a kind of disk."""

from dataclasses import dataclass
from enum import Enum


class Disk(Enum):
    """A kind of disk; `disks.py` makes it."""

    ALLOCATED = "allocated"
    """1 GiB, every cluster written, nothing behind it."""

    EMPTY = "empty"
    """Fresh for each run: no cluster is allocated."""

    OVERLAY = "overlay"
    """Fresh for each run: nothing of its own, all content in a backing file."""

    COMPRESSED = "compressed"
    """256 MiB, every cluster compressed with zlib."""


@dataclass(frozen=True)
class Cell:
    """One load on one kind of disk.

    Attributes:
        name: What --cells selects.
        title: What the table says.
        disk: What is served.
        pattern: fio's --rw.
        block_size: Bytes of one request.
        depth: Requests in flight.
        work: Bytes to move in a run, the same for every server, where the disk
            changes under the load; None runs for the time that --runtime says.
        options: More options for fio.
        cold: Empty the page cache of the image before the run.
        raw_peer: Whether a raw file under nbdkit can be compared with it.
    """

    name: str
    title: str
    disk: Disk
    pattern: str
    block_size: int
    depth: int
    work: int | None = None
    options: tuple[str, ...] = ()
    cold: bool = False
    raw_peer: bool = False

    @property
    def in_bytes(self) -> bool:
        """Whether people think of this load in bytes, not requests, per second."""
        return self.block_size >= MIB


KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

CELLS = (
    Cell(
        "read-4k-32",
        "4 KiB random read, depth 32",
        Disk.ALLOCATED,
        "randread",
        4 * KIB,
        32,
        raw_peer=True,
    ),
    Cell(
        "read-4k-1",
        "4 KiB random read, depth 1",
        Disk.ALLOCATED,
        "randread",
        4 * KIB,
        1,
        raw_peer=True,
    ),
    Cell(
        "write-4k-32",
        "4 KiB random write, depth 32",
        Disk.ALLOCATED,
        "randwrite",
        4 * KIB,
        32,
        raw_peer=True,
    ),
    Cell(
        "write-4k-1",
        "4 KiB random write, depth 1",
        Disk.ALLOCATED,
        "randwrite",
        4 * KIB,
        1,
        raw_peer=True,
    ),
    Cell(
        "mixed-4k-32",
        "4 KiB mixed 70/30, depth 32",
        Disk.ALLOCATED,
        "randrw",
        4 * KIB,
        32,
        options=("--rwmixread=70",),
        raw_peer=True,
    ),
    Cell(
        "read-1m-8",
        "1 MiB sequential read, depth 8",
        Disk.ALLOCATED,
        "read",
        MIB,
        8,
        raw_peer=True,
    ),
    Cell(
        "write-1m-8",
        "1 MiB sequential write, depth 8",
        Disk.ALLOCATED,
        "write",
        MIB,
        8,
        raw_peer=True,
    ),
    Cell(
        "cold-read-4k-32",
        "cold page cache, 4 KiB random read, depth 32",
        Disk.ALLOCATED,
        "randread",
        4 * KIB,
        32,
        cold=True,
        raw_peer=True,
    ),
    Cell(
        "empty-4k-32",
        "empty image, 4 KiB random write, depth 32",
        Disk.EMPTY,
        "randwrite",
        4 * KIB,
        32,
        work=256 * MIB,
    ),
    Cell(
        "empty-64k-16",
        "empty image, 64 KiB sequential write, depth 16",
        Disk.EMPTY,
        "write",
        64 * KIB,
        16,
        work=GIB,
    ),
    Cell(
        "empty-1m-8",
        "empty image, 1 MiB sequential write, depth 8",
        Disk.EMPTY,
        "write",
        MIB,
        8,
        work=GIB,
    ),
    Cell(
        "empty-4k-fsync",
        "empty image, 4 KiB random write, depth 32, flush each 32",
        Disk.EMPTY,
        "randwrite",
        4 * KIB,
        32,
        work=64 * MIB,
        options=("--fsync=32",),
    ),
    Cell(
        "overlay-read-4k-32",
        "overlay, 4 KiB random read from backing, depth 32",
        Disk.OVERLAY,
        "randread",
        4 * KIB,
        32,
    ),
    Cell(
        "overlay-write-4k-32",
        "overlay, 4 KiB random write, depth 32",
        Disk.OVERLAY,
        "randwrite",
        4 * KIB,
        32,
        work=256 * MIB,
    ),
    Cell(
        "overlay-once-4k-32",
        "overlay, 4 KiB write, each 64 KiB cluster once, depth 32",
        Disk.OVERLAY,
        "write:60k",  # 4 KiB, then a step over the rest of the cluster
        4 * KIB,
        32,
        work=64 * MIB,
    ),
    Cell(
        "zlib-read-64k-8",
        "compressed, 64 KiB random read, depth 8",
        Disk.COMPRESSED,
        "randread",
        64 * KIB,
        8,
    ),
    Cell(
        "zlib-read-4k-8",
        "compressed, 4 KiB sequential read, depth 8",
        Disk.COMPRESSED,
        "read",
        4 * KIB,
        8,
    ),
)
