"""Keeps acknowledged links of copying writes across a killed server.

A write that had to copy (from a backing file, a compressed or a shared cluster)
can't be linked before a barrier, or a power cut would lose old, flushed bytes. Until
that barrier only this file knows that guest cluster g is now at host cluster h. It is
meant for tmpfs: it survives the death of the process and not that of the machine. Should
it lie on a disk, the kernel's boot id tells that the machine has been restarted, and
the file is ignored: without the page cache the data it points to may be gone.

It is replayed at the next open for writing if nobody else wrote the image meanwhile.
What tells: the image's time stamp, for which the log is touched all the time while it has
something to say; the word that the file must still hold, which each record names; and a walk
over all tables that finds the cluster named by nothing else (`opening.py`).

A log that somebody has removed (what cleans up temporary files) is of no use to the next
open: with each touch it is made anew. As long as that fails nothing is recorded.
"""

import asyncio
import contextlib
import errno
import os
import struct
import zlib
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from nbdserve.formats.mapped.entries import BITMAP_SHIFT, WORD_MASK

# guest cluster, word and bitmap in the file, new word and bitmap, sequence, CRC-32 of
# the rest, padding; entries that are not extended have no bitmap
_RECORD: Final = struct.Struct("<QQQQQQII")
_MAGIC: Final = b"nbdserve redo 2\n"
#: Where the sequence number stands up to which all records are dead. It is
#: overwritten in place, which needs no space and so can't fail on a full tmpfs.
_DEAD: Final = struct.Struct("<Q")
#: Dead records are dropped once they take this many bytes, and more than the live ones.
_TIDY: Final = 1 << 20
#: How often the log is touched while a record in it is live.
_BEAT_S: Final = 0.25
#: How far the image's time stamp may be past the log's before someone else must have
#: written it. Between two beats the server itself writes; a beat comes late by as long
#: as the loop is kept from turning, or the file system's clock is ahead. Another
#: writer must be started, open the image and be done within this time, and leave the same
#: word behind and the cluster unused, to be overlooked.
_SLACK_NS: Final = 10 * 10**9


class Link(NamedTuple):
    """An acknowledged change of an L2 entry that may be missing in the file.

    Entries are single numbers (see `entries.py`).
    """

    guest_cluster: int
    entry_in_file: int
    entry: int


def _boot_id() -> bytes:
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()


def _head() -> bytes:
    return _MAGIC + _boot_id() + b"\n"


def _pack(guest_cluster: int, old: int, new: int, sequence: int) -> bytes:
    entries = (
        old & WORD_MASK,
        old >> BITMAP_SHIFT,
        new & WORD_MASK,
        new >> BITMAP_SHIFT,
    )
    body = _RECORD.pack(guest_cluster, *entries, sequence, 0, 0)
    return _RECORD.pack(guest_cluster, *entries, sequence, zlib.crc32(body), 0)


class Redo(Protocol):
    """What a commit needs of a redo log: `RedoLog`, or one that watches it."""

    @property
    def sequence(self) -> int:
        """See `RedoLog`."""

    def link(self, guest_cluster: int, entry_in_file: int, entry: int) -> bool:
        """See `RedoLog.link`."""

    def committed(self, sequence: int) -> None:
        """See `RedoLog.committed`."""

    def close(self, *, remove: bool) -> None:
        """See `RedoLog.close`."""


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
        self._dead = 0
        self._beat: asyncio.TimerHandle | None = None
        self._head = _head()
        self._first = len(self._head) + _DEAD.size
        self._fd = -1
        self._end = self._first
        self._make()
        self._is_kept = True

    def link(self, guest_cluster: int, entry_in_file: int, entry: int) -> bool:
        """Record a change before it is acknowledged; False if that failed."""
        if (self._beat is None or not self._is_kept) and not self._keep():
            return False
        record = _pack(guest_cluster, entry_in_file, entry, self.sequence + 1)
        try:
            if os.pwrite(self._fd, record, self._end) != len(record):
                return False
        except OSError:
            # a full tmpfs: the write then waits for its commit instead
            return False
        self._end += len(record)
        self.sequence += 1
        if self._beat is None:
            self._schedule()
        return True

    def committed(self, sequence: int) -> None:
        """Declare all records up to `sequence` dead, and drop them if they are many.

        If they can't be dropped they are with the next commit: the log is just longer.
        """
        if self._dead == self.sequence:
            return
        self._dead = sequence
        live = self._live
        if not self._touch() or self._end - self._first - live > max(live, _TIDY):
            self._tidy()

    def close(self, *, remove: bool) -> None:
        """Close, and remove the file if all it says is in the image."""
        if self._beat is not None:
            self._beat.cancel()
        os.close(self._fd)
        if remove:
            self.path.unlink(missing_ok=True)

    @property
    def _live(self) -> int:
        """Bytes of the records that are not dead, which are the last ones."""
        return (self.sequence - self._dead) * _RECORD.size

    def _touch(self) -> bool:
        """Say what is dead; return whether that went well."""
        try:
            os.pwrite(self._fd, _DEAD.pack(self._dead), self._first - _DEAD.size)
        except OSError:
            return False
        return True

    def _schedule(self) -> None:
        loop = asyncio.get_running_loop()
        self._beat = loop.call_later(_BEAT_S, self._tick)

    def _tick(self) -> None:
        """Say that what the image's time stamp tells by now is our own doing."""
        self._beat = None
        if self._dead != self.sequence:
            self._keep()
            self._touch()
            self._schedule()

    def _keep(self) -> bool:
        """See to it that the next open finds the log; return whether it will."""
        try:
            named = os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        except OSError:
            named = False
        self._is_kept = named or self._renew()
        return self._is_kept

    def _tidy(self) -> None:
        """Drop the dead records; under steady load there is never a moment without live ones."""
        if self._live:
            self._renew()
            return
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, self._first)
            self._end = self._first

    def _renew(self) -> bool:
        """Make the file anew, with what is live; if that fails the old one goes on."""
        try:
            self._make()
        except OSError:
            return False
        return True

    def _make(self) -> None:
        """Make the file, which has its name only once it is complete.

        Raises:
            OSError: It can't be made, and all is as before.
        """
        data = self._head + _DEAD.pack(self._dead)
        live = self._live
        if live:
            data += os.pread(self._fd, live, self._end - live)
        fresh = self.path.with_suffix(".new")
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        fd = os.open(fresh, flags, 0o600)
        try:
            _put(fd, data, self._first + live)
            fresh.rename(self.path)
        except OSError:
            os.close(fd)
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise
        old, self._fd, self._end = self._fd, fd, len(data)
        if old >= 0:
            os.close(old)


def _put(fd: int, data: bytes, length: int) -> None:
    """Write a file of this length, or fail."""
    if len(data) != length or os.pwrite(fd, data, 0) != length:
        raise OSError(errno.EIO, "not all of it could be read and written")


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
        guest_cluster, *entries, sequence, _, _ = _RECORD.unpack(record)
        old = entries[1] << BITMAP_SHIFT | entries[0]
        new = entries[3] << BITMAP_SHIFT | entries[2]
        if _pack(guest_cluster, old, new, sequence) != record:
            break
        links[guest_cluster] = (sequence, Link(guest_cluster, old, new))
    live = [link for sequence, link in links.values() if sequence > dead]
    if live and image_mtime_ns > logged_ns + _SLACK_NS:
        return Leftover(live, "the image was written by another program since")
    return Leftover(live, None)
