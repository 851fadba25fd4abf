"""Internal snapshots of an open image: their order of writes, and a crash in each gap.

docs/interop/qcow2.rst of qemu, section "Snapshots". A snapshot is a copy of
the L1 table, and one more reference for all that the copy leads to.

Create: COPIED cleared in the active tables -> barrier -> references, copy of L1 ->
barrier -> new snapshot table -> barrier -> its place in the header -> barrier.
*Crash: before the references, entries lack a COPIED that they might have (the one thing
beside leaks that a check may find, and repairs); after them, leaks.*

Delete: new snapshot table -> barrier -> header -> barrier -> references taken away -> barrier
-> COPIED set. *Crash: leaks, or a COPIED missing.*

Apply: COPIED cleared in the snapshot's tables -> barrier -> references, new L1 table ->
barrier -> size and L1 in one write of the header -> barrier -> the old tree's references
taken away. *Crash: leaks; the disk is the old or the new one.*
"""

import struct
import time
from array import array
from dataclasses import replace

from nbdserve.errors import ConfigError, ImageError
from nbdserve.formats.mapped.tables import encode_entries, encode_words
from nbdserve.formats.qcow2.cluster_counts import ClusterCounts
from nbdserve.formats.qcow2.entries import OFFSET_MASK
from nbdserve.formats.qcow2.header import (
    MAX_SNAPSHOTS,
    SIZE_OFFSET,
    SNAPSHOTS_GROUP_OFFSET,
    Header,
    encode_snapshots_group,
    l1_entries_for,
)
from nbdserve.formats.qcow2.snapshot_table import (
    MAX_TABLE_BYTES,
    Snapshot,
    encode_snapshot_table,
    judge_snapshot,
    most_table_bytes,
    parse_snapshot_table,
)
from nbdserve.formats.qcow2.structure import Structure
from nbdserve.formats.qcow2.tree import read_entries, read_words, without_copied
from nbdserve.storage.base import Storage

#: The lengths of a name and of an id are 16-bit fields; qemu keeps 255 bytes of a name.
MAX_NAME = 255


async def read_snapshots(
    storage: Storage, header: Header
) -> tuple[list[Snapshot], int]:
    """Read the snapshot table.

    Returns:
        The snapshots, and the bytes of the table.

    Raises:
        ImageCorruptError: The table is broken.
        OSError: It can't be read.
    """
    if not header.nb_snapshots:
        return [], 0
    most = most_table_bytes(header.nb_snapshots)
    length = min(storage.size - header.snapshots_offset, most)
    data = bytearray(max(length, 0))
    await storage.read(header.snapshots_offset, memoryview(data))
    return parse_snapshot_table(bytes(data), header.nb_snapshots)


def find_snapshot(image: str, snapshots: list[Snapshot], name: str) -> Snapshot:
    """Return the snapshot with that name, else that id.

    Args:
        image: What to call the image.
        snapshots: All that it has.
        name: Or id.

    Raises:
        ConfigError: There is none, or several have the name.
    """
    wanted = name.encode("utf-8", "surrogateescape")
    found = [each for each in snapshots if each.name == wanted]
    if len(found) > 1:
        ids = ", ".join(each.id.decode("utf-8", "backslashreplace") for each in found)
        raise ConfigError(
            f"{image}: {len(found)} snapshots have the name {name!r}: say which by its"
            f" id ({ids})"
        )
    found = found or [each for each in snapshots if each.id == wanted]
    if not found:
        raise ConfigError(f"{image}: there is no snapshot {name!r}")
    return found[0]


def judged(snapshot: Snapshot, header: Header, file_size: int) -> int:
    """Return the bytes of the disk that a snapshot holds.

    Raises:
        ImageCorruptError: Its L1 table is impossible.
    """
    size = header.size if snapshot.disk_size is None else snapshot.disk_size
    judge_snapshot(
        snapshot,
        cluster_size=header.cluster_size,
        entries_needed=l1_entries_for(
            size, header.cluster_bits, extended=header.extended_l2
        ),
        file_size=file_size,
    )
    return size & ~511


def _new_entry(
    image: str, snapshots: list[Snapshot], name: str, header: Header
) -> Snapshot:
    """Return the entry of a new snapshot, without its L1 table.

    Raises:
        ConfigError: The name can't be used, or there are too many snapshots.
    """
    encoded = name.encode("utf-8", "surrogateescape")
    if not 0 < len(encoded) <= MAX_NAME or b"\0" in encoded:
        raise ConfigError(
            f"a snapshot's name has 1 to {MAX_NAME} bytes, and no NUL among them"
        )
    if any(each.name == encoded for each in snapshots):
        raise ConfigError(f"{image}: there is a snapshot {name!r} already")
    if len(snapshots) >= MAX_SNAPSHOTS:
        raise ConfigError(f"{image}: has {len(snapshots)} snapshots, the most possible")
    numbers = [int(each.id) for each in snapshots if each.id.isdigit()]
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    return Snapshot(
        l1_table_offset=0,
        l1_size=header.l1_size,
        id=str(max(numbers, default=0) + 1).encode(),
        name=encoded,
        date_sec=seconds,
        date_nsec=nanoseconds,
        disk_size=header.size,
        icount=0,
    )


def with_size(snapshot: Snapshot, size: int) -> Snapshot:
    """Return a snapshot that records a size: `size`, if it had none."""
    if snapshot.disk_size is not None:
        return snapshot
    return replace(snapshot, disk_size=size)


class Snapshots:
    """Creates, applies and deletes snapshots; each wants the image alone."""

    def __init__(self, structure: Structure) -> None:
        """Change the snapshots of this image."""
        self._structure = structure
        self._parts = structure.parts
        self._storage = structure.parts.storage

    async def create(self, name: str) -> None:
        """Take a snapshot of the active disk.

        Raises:
            ConfigError: The name can't be used.
            ImageError: A refcount has no room, or the tables are broken.
            OSError: Something could not be written; nothing is taken then.
        """
        structure = self._structure
        snapshots, old_length = await read_snapshots(self._storage, structure.header)
        entry = _new_entry(self._storage.name, snapshots, name, structure.header)
        words = without_copied(self._parts.tables.l1.words)
        counts = await structure.tree.count(words)
        await structure.pool.require_room(counts)
        copy = await structure.take(8 * len(words)) if words else 0
        shared = False
        try:
            await structure.clear_copied()
            await structure.commit.barrier()
            await structure.pool.share(counts)
            shared = True
            await self._storage.put(copy, encode_words(words))
            await structure.commit.barrier()
            table = await self._write_table(
                [*snapshots, replace(entry, l1_table_offset=copy)]
            )
        except BaseException:
            structure.give_back(copy, 8 * len(words))
            await self._undo(counts if shared else ClusterCounts())
            raise
        await self._switch(len(snapshots) + 1, table, old_length)

    async def delete(self, name: str) -> None:
        """Delete a snapshot.

        Raises:
            ConfigError: There is no such snapshot.
            ImageCorruptError: Its tables can't be followed, so that nobody knows what
                to give back.
            OSError: Something could not be written.
        """
        structure, header = self._structure, self._structure.header
        snapshots, old_length = await read_snapshots(self._storage, header)
        gone = find_snapshot(self._storage.name, snapshots, name)
        judged(replace(gone, disk_size=0), header, self._storage.size)
        words = await read_words(self._storage, gone.l1_table_offset, gone.l1_size)
        counts = await structure.tree.count(words)
        left = [each for each in snapshots if each is not gone]
        table = await self._write_table(left)
        await self._switch(len(left), table, old_length)
        structure.give_back(gone.l1_table_offset, 8 * gone.l1_size)
        await structure.pool.unshare(counts)
        await structure.commit.barrier()
        await structure.set_copied()

    async def apply(self, name: str) -> None:
        """Make the active disk what it was when a snapshot was taken.

        The size is that of then, too. What the active disk had since then is gone.

        Raises:
            ConfigError: There is no such snapshot.
            ImageError: A refcount has no room, or tables are broken.
            OSError: Something could not be written.
        """
        structure, header = self._structure, self._structure.header
        snapshots, _ = await read_snapshots(self._storage, header)
        wanted = find_snapshot(self._storage.name, snapshots, name)
        size = judged(wanted, header, self._storage.size)
        found = await read_words(self._storage, wanted.l1_table_offset, wanted.l1_size)
        words = without_copied(found)
        old_words = self._parts.tables.l1.words[:]
        old_offset, old_length = header.l1_table_offset, 8 * header.l1_size
        old_counts = await structure.tree.count(old_words)
        new_counts = await structure.tree.count(words)
        # what both trees use keeps its references, which are enough for either
        counts = new_counts.beyond(old_counts)
        await structure.pool.require_room(counts)
        if not words:
            words = array("Q", [0])
        place = await structure.take(8 * len(words))
        shared = False
        try:
            await self._clear_copied_below(words)
            await structure.pool.share(counts)
            shared = True
            await self._storage.put(place, encode_words(words))
            await structure.commit.barrier()
        except BaseException:
            structure.give_back(place, 8 * len(words))
            await self._undo(counts if shared else ClusterCounts())
            raise
        # size, crypt method and the L1 table lie side by side in sector 0
        group = struct.pack(">QIIQ", size, header.crypt_method, len(words), place)
        await structure.write_header(SIZE_OFFSET, group)
        structure.adopt_tree(place, words)
        structure.set_size(size)
        structure.give_back(old_offset, old_length)
        # whoever reads the disk of before must not find its clusters punched
        await self._parts.pins.drained()
        await structure.pool.unshare(old_counts.beyond(new_counts))

    async def complete(self) -> None:
        """Let each snapshot record its size, as version 3 wants it."""
        header = self._structure.header
        snapshots, old_length = await read_snapshots(self._storage, header)
        if all(each.disk_size is not None for each in snapshots):
            return
        sized = [with_size(each, header.size) for each in snapshots]
        table = await self._write_table(sized)
        await self._switch(len(sized), table, old_length)

    async def _clear_copied_below(self, l1: "array[int]") -> None:
        """Clear COPIED in tables of a snapshot, where it should be clear already."""
        changed = False
        for offset in sorted({word & OFFSET_MASK for word in l1} - {0}):
            words, bitmaps = await read_entries(self._parts, offset)
            cleared = without_copied(words)
            if cleared != words:
                await self._storage.put(offset, encode_entries(cleared, bitmaps))
                changed = True
        if changed:
            self._parts.tables.cached.clear()
            await self._structure.commit.barrier()

    async def _write_table(self, snapshots: list[Snapshot]) -> int:
        """Write a snapshot table, durably.

        Returns:
            Its host offset, 0 for an empty one.
        """
        size = self._structure.header.size
        if self._structure.header.version >= 3:
            # version 3 wants a size in each, and an old entry may lack it
            snapshots = [with_size(each, size) for each in snapshots]
        data = encode_snapshot_table(snapshots)
        if len(data) > MAX_TABLE_BYTES:
            raise ImageError(
                f"the snapshot table would have {len(data)} bytes: at most"
                f" {MAX_TABLE_BYTES}"
            )
        if not data:
            return 0
        structure = self._structure
        host_offset = await structure.take(len(data))
        try:
            await self._storage.put(host_offset, data)
            await structure.commit.barrier()
        except BaseException:
            structure.give_back(host_offset, len(data))
            raise
        return host_offset

    async def _switch(self, count: int, host_offset: int, old_length: int) -> None:
        """Point the header at another snapshot table, and free the old one."""
        structure = self._structure
        old = structure.header
        group = encode_snapshots_group(count, host_offset)
        await structure.write_header(SNAPSHOTS_GROUP_OFFSET, group)
        structure.header = replace(
            old, nb_snapshots=count, snapshots_offset=host_offset
        )
        structure.give_back(old.snapshots_offset, old_length)

    async def _undo(self, counts: ClusterCounts) -> None:
        """Take back what a snapshot that failed has changed, if anything can be written."""
        if self._structure.commit.failed is not None:
            return
        await self._structure.pool.unshare(counts)
        await self._structure.commit.barrier()
        await self._structure.set_copied()
