"""What opening a qcow and a qcow2 image have in common."""

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from nbdserve.formats.crypto.secret import Secret
from nbdserve.formats.mapped.geometry import Geometry
from nbdserve.formats.mapped.image import MappedImage
from nbdserve.formats.mapped.redo import RedoLog, read_leftover, redo_path
from nbdserve.formats.mapped.tables import Table, decode_words
from nbdserve.storage.base import Storage
from nbdserve.storage.executor import run
from nbdserve.storage.file import FileStorage


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the operator may set for the engine.

    Attributes:
        state_dir: Where redo logs are kept, on tmpfs; without one, a write that had to
            copy is acknowledged only after two barriers.
        table_cache: Bytes of L2 tables kept in memory for each image.
        commit_interval_s: How long a write that had to copy may wait for a flush. Each
            commit writes out all that is dirty, so that a stream of such writes
            goes at the speed of the disk: 5 s is what ext4 itself waits.
        secrets: Passphrases of encrypted images; each is tried on every one.
    """

    state_dir: Path | None = None
    table_cache: int = 32 << 20
    commit_interval_s: float = 5.0
    secrets: tuple[Secret, ...] = ()


DEFAULT_OPTIONS = EngineOptions()

#: Returns which of these clusters, by host offset, nothing in an open image file names.
#: It walks over all tables (2 s for 512 GiB, mapped). Raises ImageError and OSError.
Unnamed = Callable[[int, Collection[int]], set[int]]


@dataclass(slots=True)
class Located:
    """Clusters of the file by what they hold, as numbers."""

    metadata: set[int] = field(default_factory=set)
    tables: set[int] = field(default_factory=set)

    def add(self, host_offset: int, length: int, cluster_bits: int) -> None:
        """Add a range to `metadata`."""
        last = (host_offset + max(length, 1) - 1) >> cluster_bits
        self.metadata.update(range(host_offset >> cluster_bits, last + 1))


async def load_l1(storage: Storage, geometry: Geometry) -> Table:
    """Read the L1 table, all of which stays in memory."""
    data = bytearray(8 * geometry.l1_entries)
    await storage.read(geometry.l1_offset, memoryview(data))
    l1 = Table(-1, geometry.l1_offset, decode_words(data))
    l1.owned = True
    return l1


def table_clusters(l1: Table, mask: int, geometry: Geometry) -> set[int]:
    """Return the numbers of the clusters that hold L2 tables."""
    count = max(1, geometry.l2_bytes >> geometry.cluster_bits)
    numbers = {(word & mask) >> geometry.cluster_bits for word in l1.words if word}
    if count == 1:
        return numbers
    return {number + each for number in numbers for each in range(count)}


async def replay_leftover(
    image: MappedImage, storage: Storage, state_dir: Path | None, unnamed: Unnamed
) -> bool:
    """Replay what a killed server left in its redo log.

    Args:
        image: Open for writing; nothing has been changed yet.
        storage: Its file.
        state_dir: Where the log is, if there is one.
        unnamed: Tells which clusters nothing in the image names.

    Returns:
        Whether there was such a server: then what it had reserved is leaked.
    """
    if state_dir is None or not isinstance(storage, FileStorage):
        return False
    path = redo_path(state_dir, *storage.identity)
    modified_ns = (await run(os.stat, storage.path)).st_mtime_ns
    leftover = await run(read_leftover, path, modified_ns)
    count = len(leftover.links)
    if leftover.refused is not None:
        image.notes.append(
            f"{storage.name}: {count} acknowledged writes of a killed "
            f"server are lost: {leftover.refused}"
        )
    elif leftover.links:
        hosts = image.hosts(leftover.links)
        free = await storage.call(lambda fd: unnamed(fd, hosts))
        linked = await image.replay(leftover.links, free)
        image.notes.append(
            f"{storage.name}: linked {linked} acknowledged writes of a killed server"
        )
    return leftover.killed


async def start_redo(
    image: MappedImage, storage: Storage, state_dir: Path | None
) -> None:
    """Begin a new redo log, in place of what a killed server left."""
    if state_dir is None or not isinstance(storage, FileStorage):
        return
    path = redo_path(state_dir, *storage.identity)
    try:
        redo = await run(RedoLog, path)
    except OSError as error:
        image.notes.append(
            f"{storage.name}: no redo log in {state_dir} ({error.strerror}), so writes "
            "that copy wait for the disk"
        )
        return
    image.use_redo(redo)
