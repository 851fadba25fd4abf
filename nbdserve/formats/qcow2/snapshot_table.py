"""The snapshot table of a qcow2 image: bytes in, values out, and back.

docs/interop/qcow2.rst of qemu, section "Snapshots". Entries have no fixed
length, so the table's end is known only after reading it; `MAX_TABLE_BYTES`
bounds it. A snapshot whose own L1 table is impossible does not spoil the
others or the active disk: `judge_snapshot` refuses it when it is used.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from nbdserve.errors import ImageCorruptError
from nbdserve.formats.qcow2.header import MAX_L1_BYTES

#: The limits that qemu enforces (block/qcow2.h, block/qcow2-snapshot.c).
MAX_TABLE_BYTES = 64 << 20
MAX_EXTRA_DATA = 1024

_ENTRY = struct.Struct(">QIHHIIQII")
_U64 = struct.Struct(">Q")
#: The largest entry: extra data, two texts with 16-bit lengths, and padding.
_MOST_ENTRY = _ENTRY.size + MAX_EXTRA_DATA + 2 * 0xFFFF + 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """An entry of the snapshot table; offsets and sizes are bytes.

    Attributes:
        l1_table_offset: Where the snapshot's L1 table lies.
        l1_size: Its entries.
        id: A number as text, unique in the image.
        name: For people.
        date_sec: Unix time.
        date_nsec: The part below a second.
        vm_clock_nsec: How long the guest had run.
        vm_state_size: 0 without VM state.
        disk_size: Bytes of the disk at that time, None if not recorded
            (version 2: then it is that of the image).
        icount: Instructions executed, None if not recorded.
        extra_data: All extra data as it is stored, known fields included.
    """

    l1_table_offset: int
    l1_size: int
    id: bytes
    name: bytes
    date_sec: int = 0
    date_nsec: int = 0
    vm_clock_nsec: int = 0
    vm_state_size: int = 0
    disk_size: int | None = None
    icount: int | None = None
    extra_data: bytes = b""


def most_table_bytes(nb_snapshots: int) -> int:
    """Return how many bytes a table of that many snapshots can have."""
    return min(nb_snapshots * _MOST_ENTRY, MAX_TABLE_BYTES)


def parse_snapshot_table(data: bytes, nb_snapshots: int) -> tuple[list[Snapshot], int]:
    """Read a snapshot table.

    Args:
        data: The file from `snapshots_offset` on, up to `MAX_TABLE_BYTES`;
            what lies behind the table does no harm.
        nb_snapshots: Entries, from the header.

    Returns:
        The snapshots and how many bytes the table has.

    Raises:
        ImageCorruptError: An entry runs past `data`, or has too much extra data.
    """
    snapshots: list[Snapshot] = []
    offset = 0
    for index in range(nb_snapshots):
        offset = -(-offset // 8) * 8
        snapshot, offset = _parse_entry(data, offset, index)
        snapshots.append(snapshot)
    return snapshots, offset


def _parse_entry(data: bytes, start: int, index: int) -> tuple[Snapshot, int]:
    body = start + _ENTRY.size
    if body > len(data):
        raise ImageCorruptError(
            f"snapshot {index} at byte {start} of the snapshot table runs past the"
            " end of the table or the file"
        )
    (
        l1_table_offset,
        l1_size,
        id_size,
        name_size,
        date_sec,
        date_nsec,
        vm_clock_nsec,
        vm_state_size,
        extra_size,
    ) = _ENTRY.unpack_from(data, start)
    if extra_size > MAX_EXTRA_DATA:
        raise ImageCorruptError(
            f"snapshot {index} at byte {start} of the snapshot table has {extra_size}"
            f" bytes of extra data: at most {MAX_EXTRA_DATA}"
        )
    end = body + extra_size + id_size + name_size
    if end > min(len(data), MAX_TABLE_BYTES):
        raise ImageCorruptError(
            f"snapshot {index} at byte {start} of the snapshot table ends at {end}:"
            " past the end of the table or the file"
        )
    extra = bytes(data[body : body + extra_size])
    wide_vm_state_size = _extra_u64(extra, 0)
    names = body + extra_size
    snapshot = Snapshot(
        l1_table_offset=l1_table_offset,
        l1_size=l1_size,
        id=bytes(data[names : names + id_size]),
        name=bytes(data[names + id_size : end]),
        date_sec=date_sec,
        date_nsec=date_nsec,
        vm_clock_nsec=vm_clock_nsec,
        vm_state_size=(
            vm_state_size if wide_vm_state_size is None else wide_vm_state_size
        ),
        disk_size=_extra_u64(extra, 8),
        icount=_extra_u64(extra, 16),
        extra_data=extra,
    )
    return snapshot, end


def _extra_u64(extra: bytes, offset: int) -> int | None:
    if len(extra) < offset + 8:
        return None
    value: int = _U64.unpack_from(extra, offset)[0]
    return value


def judge_snapshot(
    snapshot: Snapshot, *, cluster_size: int, entries_needed: int, file_size: int
) -> None:
    """Refuse a snapshot whose L1 table is impossible.

    Args:
        snapshot: What the table says.
        cluster_size: Bytes.
        entries_needed: L1 entries that map the snapshot's disk.
        file_size: Bytes of the image file.

    Raises:
        ImageCorruptError: Its table is unaligned, too large or small, or past
            the end of the file.
    """
    host_offset, length = snapshot.l1_table_offset, snapshot.l1_size * 8
    problem = None
    if length > MAX_L1_BYTES:
        problem = f"has {snapshot.l1_size} entries: at most {MAX_L1_BYTES // 8}"
    elif snapshot.l1_size < entries_needed:
        problem = f"has {snapshot.l1_size} entries: its disk needs {entries_needed}"
    elif host_offset % cluster_size or (length and host_offset == 0):
        problem = "is not aligned to a cluster behind the header"
    elif host_offset + length > file_size:
        problem = f"runs past the end of the file ({file_size} bytes)"
    if problem:
        raise ImageCorruptError(
            f"the L1 table of snapshot {snapshot.id.decode('utf-8', 'backslashreplace')}"
            f" at {host_offset:#x} {problem}"
        )


def encode_snapshot_table(snapshots: Iterable[Snapshot]) -> bytes:
    """Return the table's bytes, each entry aligned to 8 bytes.

    Extra data is written as long as it was, at least the 16 bytes that version
    3 requires (VM state size and disk size) if a disk size is known.
    """
    table = bytearray()
    for snapshot in snapshots:
        table += bytes(-len(table) % 8)
        extra = _encode_extra(snapshot)
        table += _ENTRY.pack(
            snapshot.l1_table_offset,
            snapshot.l1_size,
            len(snapshot.id),
            len(snapshot.name),
            snapshot.date_sec,
            snapshot.date_nsec,
            snapshot.vm_clock_nsec,
            # As qemu: the wide field counts; the narrow one is 0 if it can't hold it.
            snapshot.vm_state_size if snapshot.vm_state_size < 1 << 32 else 0,
            len(extra),
        )
        table += extra + snapshot.id + snapshot.name
    return bytes(table)


def _encode_extra(snapshot: Snapshot) -> bytes:
    extra = bytearray(snapshot.extra_data)
    for offset, value in (
        (0, snapshot.vm_state_size),
        (8, snapshot.disk_size),
        (16, snapshot.icount),
    ):
        if value is None or (offset == 0 and snapshot.disk_size is None and not extra):
            continue
        extra[offset : offset + 8] = _U64.pack(value)
    return bytes(extra)
