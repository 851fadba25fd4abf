"""Keeps acknowledged links of copying writes across a killed server.

A write that had to copy (from a backing file, a compressed or a shared cluster)
can't be linked before a barrier, or a power cut would lose old, flushed bytes. Until
that barrier only this file knows that guest cluster g is now at host cluster h. It is
meant for tmpfs: it survives the death of the process and not that of the machine. Should
it lie on a disk, the kernel's boot id tells that the machine has been restarted, and
the file is ignored: without the page cache the data it points to may be gone.

It is replayed at the next open for writing if nobody else wrote the image meanwhile:
each record names the word that the file must still hold.
"""

import os
import struct
import zlib
from pathlib import Path
from typing import Final, NamedTuple

# guest cluster, word in the file, new word, sequence, CRC-32 of the rest, padding
_RECORD: Final = struct.Struct("<QQQQII")
_MAGIC: Final = b"nbdserve redo 1\n"
#: Where the sequence number stands up to which all records are dead. It is
#: overwritten in place, which needs no space and so can't fail on a full tmpfs.
_DEAD: Final = struct.Struct("<Q")
#: Records of which all are dead are dropped once the file has this many bytes.
_TIDY: Final = 1 << 20
#: How far the image's time stamp may be past the log's before someone else must have
#: written it. While a record is live the log is touched at each commit, that is
#: at least once in the commit interval and two barriers.
_SLACK_NS: Final = 60 * 10**9


class Link(NamedTuple):
    """An acknowledged change of an L2 entry that may be missing in the file."""

    guest_cluster: int
    word_in_file: int
    word: int


def _boot_id() -> bytes:
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()


def _head() -> bytes:
    return _MAGIC + _boot_id() + b"\n"


def _pack(guest_cluster: int, old: int, new: int, sequence: int) -> bytes:
    body = _RECORD.pack(guest_cluster, old, new, sequence, 0, 0)
    return _RECORD.pack(guest_cluster, old, new, sequence, zlib.crc32(body), 0)


class RedoLog:
    """One image's redo file, open for appending.

    Attributes:
        sequence: The number of the last record.
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        """Begin an empty log at `path`, replacing what is there.

        Raises:
            OSError: The file can't be made.
        """
        self.path = path
        self.sequence = 0
        self._live = False
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, _head() + _DEAD.pack(0), 0)
        self._first = self._end = len(_head()) + _DEAD.size

    def link(self, guest_cluster: int, word_in_file: int, word: int) -> bool:
        """Record a change before it is acknowledged; False if that failed."""
        record = _pack(guest_cluster, word_in_file, word, self.sequence + 1)
        try:
            if os.pwrite(self._fd, record, self._end) != len(record):
                return False
        except OSError:
            # a full tmpfs: the write then waits for its commit instead
            return False
        self._end += len(record)
        self.sequence += 1
        self._live = True
        return True

    def committed(self, sequence: int) -> None:
        """Declare all records up to `sequence` dead."""
        if not self._live:
            return
        os.pwrite(self._fd, _DEAD.pack(sequence), self._first - _DEAD.size)
        if sequence == self.sequence:
            self._live = False
            if self._end > _TIDY:
                os.ftruncate(self._fd, self._first)
                self._end = self._first

    def close(self, *, remove: bool) -> None:
        """Close, and remove the file if all it says is in the image."""
        os.close(self._fd)
        if remove:
            self.path.unlink(missing_ok=True)


class Leftover(NamedTuple):
    """What a killed server left in a log.

    Attributes:
        links: The last acknowledged link of each guest cluster.
        refused: Why they must not be replayed, None if they may.
        killed: Whether there is a log at all: a clean close removes it.
    """

    links: list[Link]
    refused: str | None
    killed: bool = True


def redo_path(state_dir: Path, device: int, inode: int) -> Path:
    """Return where the log of the image with these numbers lies."""
    return state_dir / f"{device:x}-{inode:x}.redo"


def read_leftover(path: Path, image_mtime_ns: int) -> Leftover:
    """Read the log that a killed server left.

    Args:
        path: The log, which need not exist.
        image_mtime_ns: When the image was last written.
    """
    try:
        data = path.read_bytes()
        logged_ns = path.stat().st_mtime_ns
    except FileNotFoundError:
        return Leftover([], None, killed=False)
    head = _head()
    first = len(head) + _DEAD.size
    if len(data) < first or not data.startswith(head):
        # another boot: what was not flushed went with the page cache
        return Leftover([], None, killed=False)
    (dead,) = _DEAD.unpack_from(data, len(head))
    links: dict[int, tuple[int, Link]] = {}
    end = len(data) - (len(data) - first) % _RECORD.size
    for position in range(first, end, _RECORD.size):
        record = data[position : position + _RECORD.size]
        guest_cluster, old, new, sequence, _, _ = _RECORD.unpack(record)
        if _pack(guest_cluster, old, new, sequence) != record:
            break
        links[guest_cluster] = (sequence, Link(guest_cluster, old, new))
    live = [link for sequence, link in links.values() if sequence > dead]
    if live and image_mtime_ns > logged_ns + _SLACK_NS:
        return Leftover(live, "the image was written by another program since")
    return Leftover(live, None)
