"""What the control API says and understands, as types: JSON with keys in kebab-case."""

from typing import Any

import msgspec


class _Answer(msgspec.Struct, rename="kebab", kw_only=True):
    """Something that is told."""


class _Question(
    msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True
):
    """Something that is asked for; a key that nobody knows is refused."""


class ExportState(_Answer):
    """One export.

    Attributes:
        name: As clients know it.
        description: For people.
        file: The image as the operator wrote it.
        format: raw, qcow or qcow2; None if it was not opened yet (--open use).
        size: Bytes of the disk, as new clients see it; None likewise.
        file_size: Bytes of the file; None for a block device.
        read_only: Whether nobody can write.
        clients: Connections that have chosen it.
        broken: Why nothing is acknowledged until it is reopened, None if it is well.
    """

    name: str
    description: str
    file: str
    format: str | None
    size: int | None
    file_size: int | None
    read_only: bool
    clients: int
    broken: str | None


class Exports(_Answer):
    """All exports."""

    exports: list[ExportState]


class Resized(_Answer):
    """A disk has another size.

    Attributes:
        name: Of the export.
        size: Bytes.
        previous_size: Bytes; connected clients go on with the size they were told.
        longest_pause_s: How long clients' changes had to wait at most.
    """

    name: str
    size: int
    previous_size: int
    longest_pause_s: float


class SnapshotChanged(_Answer):
    """A snapshot was made or deleted.

    Attributes:
        export: Its name.
        snapshot: Name of the snapshot, or its id.
        longest_pause_s: How long clients' writes had to wait at most.
    """

    export: str
    snapshot: str
    longest_pause_s: float


class Snapshots(_Answer):
    """The snapshots of an image, with the field names of qemu-img."""

    snapshots: list[dict[str, Any]]


class CompactionState(_Answer):
    """How far a compaction is.

    Attributes:
        state: none, running, done, stopped or failed.
        moved_bytes: So far.
        total_bytes: To be moved in all, as far as is known.
        size_before: Bytes of the file.
        size_after: The same; None while it is running.
        unmovable_clusters: Clusters that keep the file from getting shorter.
        longest_pause_s: How long clients' changes of the mapping had to wait at most.
        error: Why it failed.
    """

    state: str
    moved_bytes: int = 0
    total_bytes: int = 0
    size_before: int = 0
    size_after: int | None = None
    unmovable_clusters: int = 0
    longest_pause_s: float = 0.0
    error: str | None = None


class Failure(_Answer):
    """Why something was not done, in one line."""

    error: str


class NewSize(_Question):
    """Give a disk another size.

    Attributes:
        size: Bytes, or a text such as 20G, +5G or -512M.
        shrink: Allow a smaller one: what lies behind it is lost.
    """

    size: int | str
    shrink: bool = False


class NewSnapshot(_Question):
    """Keep the disk as it is now under a name."""

    name: str
