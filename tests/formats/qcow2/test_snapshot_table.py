"""The snapshot table, as qemu-img writes it and as nobody should."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.errors import ImageCorruptError
from nbdserve.formats.qcow2.header import parse_header
from nbdserve.formats.qcow2.snapshot_table import (
    Snapshot,
    encode_snapshot_table,
    judge_snapshot,
    parse_snapshot_table,
)
from tests.helpers.tools import run


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_table_of_qemu(tmp_path: Path, compat: str) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"compat={compat}", path, "8M")
    for name in ("one", "second one", "zw\u00f6lf"):
        run("qemu-img", "snapshot", "-c", name, path)
    data = path.read_bytes()
    header = parse_header(data, len(data))
    table = data[header.snapshots_offset :]
    snapshots, length = parse_snapshot_table(table, header.nb_snapshots)
    assert [s.name.decode() for s in snapshots] == ["one", "second one", "zw\u00f6lf"]
    assert [s.id for s in snapshots] == [b"1", b"2", b"3"]
    assert [s.disk_size for s in snapshots] == [8 << 20] * 3
    assert encode_snapshot_table(snapshots) == table[:length]
    for snapshot in snapshots:
        judge_snapshot(
            snapshot, cluster_size=65536, entries_needed=1, file_size=len(data)
        )


def entry(**changes: object) -> Snapshot:
    fields: dict[str, object] = {
        "l1_table_offset": 65536,
        "l1_size": 4,
        "id": b"1",
        "name": b"n",
        **changes,
    }
    return Snapshot(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"l1_table_offset": 65537}, "aligned"),
        ({"l1_table_offset": 0}, "aligned"),
        ({"l1_table_offset": 1 << 40}, "past the end"),
        ({"l1_size": 1 << 31}, "at most"),
        ({"l1_size": 1}, "needs 2"),
    ],
)
def test_impossible_l1_tables_spoil_their_snapshot_only(
    changes: dict[str, object], text: str
) -> None:
    table = encode_snapshot_table([entry(), entry(**changes)])
    good, bad = parse_snapshot_table(table, 2)[0]
    limits = {"cluster_size": 65536, "entries_needed": 2, "file_size": 1 << 20}
    judge_snapshot(good, **limits)
    with pytest.raises(ImageCorruptError, match=text):
        judge_snapshot(bad, **limits)


def test_too_much_extra_data_is_refused() -> None:
    table = encode_snapshot_table([entry(extra_data=bytes(2048))])
    with pytest.raises(ImageCorruptError, match="2048 bytes of extra data"):
        parse_snapshot_table(table, 1)


def test_cut_table_is_refused_at_every_length() -> None:
    table = encode_snapshot_table([entry(disk_size=5), entry(name=b"second")])
    for cut in range(len(table)):
        with pytest.raises(ImageCorruptError, match=r"runs past|past the end"):
            parse_snapshot_table(table[:cut], 2)


_u32 = st.integers(0, (1 << 32) - 1)
_u64 = st.integers(0, (1 << 64) - 1)


@given(
    st.lists(
        st.builds(
            Snapshot,
            l1_table_offset=_u64,
            l1_size=_u32,
            id=st.binary(max_size=8),
            name=st.binary(max_size=30),
            date_sec=_u32,
            date_nsec=_u32,
            vm_clock_nsec=_u64,
            vm_state_size=_u64,
            disk_size=_u64,
            icount=st.none() | _u64,
        ),
        max_size=5,
    )
)
def test_round_trip(snapshots: list[Snapshot]) -> None:
    table = encode_snapshot_table(snapshots)
    parsed, length = parse_snapshot_table(table + b"rest", len(snapshots))
    assert length == len(table)
    assert encode_snapshot_table(parsed) == table
    assert [s.disk_size for s in parsed] == [s.disk_size for s in snapshots]
    assert [s.icount for s in parsed] == [s.icount for s in snapshots]
    assert [s.vm_state_size for s in parsed] == [s.vm_state_size for s in snapshots]
