"""Broken and hostile qcow2 images in use: a typed error, and nothing else is harmed.

Each image is made by qemu-img and then patched. What an error must never leave
behind: a punched or overwritten table, a file that was cut, or another cluster's bytes.
"""

import random
import struct
from pathlib import Path

import pytest

from nbdserve.errors import ImageCorruptError, ImageError, ImageFormatError
from nbdserve.formats.open import open_image
from nbdserve.storage.base import Buffer, Storage
from nbdserve.storage.faults import WrappedStorage
from tests.helpers.engine import (
    COMPRESSED,
    COPIED,
    HEADER_AUTOCLEAR,
    HEADER_COMPATIBLE,
    HEADER_INCOMPATIBLE,
    HEADER_L1_OFFSET,
    HEADER_REFCOUNT_TABLE,
    HEADER_SNAPSHOTS,
    OFFSET,
    Disk,
    convert,
    l1_of,
    l2_entry_of,
    make,
    open_bytes,
    put64,
    u32,
    u64,
)
from tests.helpers.tools import run

KIB = 1 << 10
MIB = 1 << 20
CLUSTER = 4096
CORRUPT_BIT = 2


class MetadataGuard(WrappedStorage):
    """Raises AssertionError where a change harms what an error must never harm.

    The tables stand at the front of the file, as qemu-img lays them out: no part of
    them may be punched. Of the header only single fields change. Nothing is cut off.
    """

    def __init__(self, inner: Storage, end: int) -> None:
        super().__init__(inner)
        self.end = end
        self.size_before = inner.size

    def try_write(self, offset: int, data: Buffer) -> bool:
        assert offset >= CLUSTER or len(data) <= 12, (hex(offset), len(data))
        return super().try_write(offset, data)

    async def write(self, offset: int, data: Buffer, *, durable: bool = False) -> None:
        assert offset >= CLUSTER or len(data) <= 12, (hex(offset), len(data))
        await super().write(offset, data, durable=durable)

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        assert offset >= self.end, (hex(offset), length)
        await super().zero(offset, length, unmap=unmap)

    async def truncate(self, size: int) -> None:
        assert size >= self.size_before, "the file was cut"
        await super().truncate(size)


#: What qemu-img made, by options and whether it is compressed.
MADE: dict[tuple[str, bool], bytes] = {}


class Patient:
    """An image with data in every second half of its first megabyte, to be patched."""

    def __init__(self, folder: Path, options: str, *, compressed: bool = False) -> None:
        self.folder = folder
        generator = random.Random(3)
        self.model = bytearray(2 * MIB)
        if compressed:
            self.model[:MIB] = generator.randbytes(32) * (MIB // 32)
        else:
            self.model[: MIB // 2] = generator.randbytes(MIB // 2)
        key = (options, compressed)
        if key not in MADE:
            path = convert(
                folder, bytes(self.model), options=options, compressed=compressed
            )
            MADE[key] = path.read_bytes()
        self.whole = MADE[key]
        self.bytes = bytearray(self.whole)

    @property
    def refcount_table(self) -> int:
        return u64(self.whole, HEADER_REFCOUNT_TABLE)

    @property
    def refcount_block(self) -> int:
        return u64(self.whole, self.refcount_table)

    @property
    def l2_table(self) -> int:
        return u64(self.whole, l1_of(self.whole)) & OFFSET

    def entry(self, guest_offset: int) -> int:
        """Return the L2 entry of a guest offset, as qemu-img wrote it."""
        return u64(self.whole, l2_entry_of(self.whole, guest_offset))

    def set_entry(self, guest_offset: int, word: int) -> None:
        put64(self.bytes, l2_entry_of(self.whole, guest_offset), word)

    async def open(self, *, read_only: bool = False) -> Disk:
        end = self.l2_table + CLUSTER

        def guarded(storage: Storage) -> Storage:
            return MetadataGuard(storage, end)

        disk = await open_bytes(
            self.folder, bytes(self.bytes), read_only=read_only, wrap=guarded
        )
        disk.model[:] = self.model
        return disk

    async def assert_others_unharmed(self, disk: Disk, *broken: int) -> None:
        """Everything but the clusters at the guest offsets `broken` reads as before."""
        for offset in range(0, len(disk.model), CLUSTER):
            if offset not in broken:
                found = await disk.image.read(offset, CLUSTER)
                assert found == disk.model[offset : offset + CLUSTER], hex(offset)


@pytest.fixture
def patient(tmp_path: Path) -> Patient:
    return Patient(tmp_path, f"cluster_size={CLUSTER}")


async def refuses_every_use(disk: Disk, offset: int) -> None:
    """Reading, writing and discarding a cluster whose entry is not valid is an error."""
    await refuses_every_read(disk, offset)
    await refuses_every_change(disk, offset)


async def refuses_every_read(disk: Disk, offset: int) -> None:
    with pytest.raises(ImageCorruptError):
        await disk.image.read(offset, 512)
    with pytest.raises(ImageCorruptError):
        await disk.image.block_status(offset, 512)


async def refuses_every_change(disk: Disk, offset: int) -> None:
    with pytest.raises(ImageCorruptError):
        await disk.image.write(offset, b"x" * 512)
    with pytest.raises(ImageCorruptError):
        await disk.image.write(offset, b"x" * CLUSTER)
    with pytest.raises(ImageCorruptError):
        await disk.image.write_zeroes(offset, 512, may_unmap=False)


# -- L1 and L2 entries


@pytest.mark.parametrize(
    "word",
    [
        COPIED | 0x4200,
        0x4200,
        COPIED | 0x8000 | 1 << 56,
        COPIED | 0x8000 | 2,
        0x8000 | 1 << 61,
    ],
    ids=[
        "copied, unaligned",
        "unaligned",
        "reserved bit 56",
        "reserved bit 1",
        "reserved bit 61",
    ],
)
@pytest.mark.parametrize("first", ["read", "block_status", "write", "trim"])
async def test_an_invalid_l2_entry_marks_the_image_corrupt(
    patient: Patient, word: int, first: str
) -> None:
    """Whatever comes upon it first; the rest can be read, and nothing can be written."""
    patient.set_entry(2 * CLUSTER, word)
    disk = await patient.open()
    await disk.write(CLUSTER, b"n" * CLUSTER)
    await disk.write(3 * CLUSTER, b"n" * CLUSTER)
    argument = b"x" if first == "write" else CLUSTER
    with pytest.raises(ImageCorruptError, match="L2 entry"):
        await getattr(disk.image, first)(2 * CLUSTER, argument)
    await refuses_every_use(disk, 2 * CLUSTER)
    with pytest.raises(ImageCorruptError, match="until it is repaired"):
        await disk.image.write(MIB, b"n" * 100)
    await patient.assert_others_unharmed(disk, 2 * CLUSTER)
    await disk.image.flush()
    await disk.image.close()
    content = disk.memory.content()
    assert u64(content, HEADER_INCOMPATIBLE) == CORRUPT_BIT
    readable = await open_bytes(patient.folder, content, read_only=True)
    readable.model[:] = disk.model
    await patient.assert_others_unharmed(readable, 2 * CLUSTER)
    await refuses_every_read(readable, 2 * CLUSTER)
    await readable.image.close()


@pytest.mark.parametrize(
    "word",
    [COMPRESSED | COPIED | 0x8000, COMPRESSED],
    ids=["compressed and copied", "compressed without offset"],
)
async def test_an_invalid_compressed_entry_fails_its_range_only(
    patient: Patient, word: int
) -> None:
    patient.set_entry(2 * CLUSTER, word)
    disk = await patient.open()
    await refuses_every_use(disk, 2 * CLUSTER)
    with pytest.raises(ImageCorruptError):
        await disk.image.trim(2 * CLUSTER, CLUSTER)
    await disk.write(CLUSTER, b"n" * CLUSTER)
    await disk.write(3 * CLUSTER, b"n" * CLUSTER)
    await disk.write(MIB, b"n" * 100)
    await patient.assert_others_unharmed(disk, 2 * CLUSTER)
    await disk.image.close()
    assert not u64(disk.memory.content(), HEADER_INCOMPATIBLE)
    await patient.open(read_only=True)


async def test_an_entry_that_is_copied_and_has_no_offset_maps_nothing(
    patient: Patient,
) -> None:
    """As in qemu, whose check is silent about it."""
    patient.set_entry(2 * CLUSTER, COPIED)
    patient.model[2 * CLUSTER : 3 * CLUSTER] = bytes(CLUSTER)
    disk = await patient.open()
    await disk.assert_content()
    await disk.write(2 * CLUSTER + 5, b"written")
    await disk.close_and_check(leaks_allowed=True)


@pytest.mark.parametrize(
    "word",
    [COPIED, COPIED | 0x4200, 1 << 62 | 0x4000, COPIED | 0x4001, COPIED | 1 << 50],
    ids=["copied|0", "unaligned", "bit 62", "bit 0", "past the end"],
)
async def test_an_invalid_l1_entry_marks_the_image_corrupt(
    patient: Patient, word: int
) -> None:
    put64(patient.bytes, l1_of(patient.whole), word)
    disk = await patient.open()
    await refuses_every_use(disk, 0)
    with pytest.raises(ImageCorruptError):
        await disk.image.trim(0, CLUSTER)
    await disk.image.close()
    put64(patient.bytes, HEADER_INCOMPATIBLE, CORRUPT_BIT)
    assert disk.memory.content()[: len(patient.bytes)] == patient.bytes
    disk = await patient.open(read_only=True)
    await refuses_every_read(disk, 0)


def metadata_places(patient: Patient) -> dict[str, int]:
    return {
        "header": 0,
        "L1": l1_of(patient.whole),
        "refcount table": patient.refcount_table,
        "refcount block": patient.refcount_block,
        "L2": patient.l2_table,
    }


@pytest.mark.parametrize("place", ["L1", "refcount table", "refcount block", "L2"])
@pytest.mark.parametrize(
    "flag", [COPIED, 0, COPIED | 1], ids=["copied", "plain", "zero"]
)
async def test_no_change_reaches_metadata_that_an_l2_entry_names(
    patient: Patient, place: str, flag: int
) -> None:
    """Neither written in place nor given back, punched and used again."""
    patient.set_entry(2 * CLUSTER, metadata_places(patient)[place] | flag)
    disk = await patient.open()
    await refuses_every_change(disk, 2 * CLUSTER)
    with pytest.raises(ImageCorruptError):
        await disk.image.trim(2 * CLUSTER, CLUSTER)
    with pytest.raises(ImageCorruptError):
        await disk.image.write_zeroes(2 * CLUSTER, CLUSTER)
    await disk.image.flush()
    await patient.assert_others_unharmed(disk, 2 * CLUSTER)
    await disk.image.close()


@pytest.mark.parametrize("place", ["refcount table", "refcount block", "L1"])
async def test_no_table_is_changed_where_other_metadata_are(
    patient: Patient, place: str
) -> None:
    """An L1 entry that names the refcounts as an L2 table."""
    put64(patient.bytes, l1_of(patient.whole), metadata_places(patient)[place] | COPIED)
    disk = await patient.open()
    with pytest.raises(ImageCorruptError):
        await disk.image.write(MIB, b"x" * 512)
    with pytest.raises(ImageCorruptError):
        await disk.image.trim(0, MIB)
    await disk.image.close()


async def test_an_attempt_to_write_to_metadata_marks_the_image_corrupt(
    patient: Patient,
) -> None:
    patient.set_entry(0, patient.refcount_block | COPIED)
    disk = await patient.open()
    with pytest.raises(ImageCorruptError):
        await disk.image.write(0, b"x")
    await disk.image.close()
    content = disk.memory.content()
    assert u64(content, HEADER_INCOMPATIBLE) & CORRUPT_BIT
    with pytest.raises(ImageError, match="corrupt"):
        await open_bytes(patient.folder, content)
    readable = await open_bytes(patient.folder, content, read_only=True)
    assert await readable.image.read(CLUSTER, CLUSTER) == bytes(
        patient.model[CLUSTER : 2 * CLUSTER]
    )


async def test_an_entry_for_the_same_cluster_twice_does_no_harm_to_a_third(
    patient: Patient,
) -> None:
    patient.set_entry(CLUSTER, patient.entry(0))
    disk = await patient.open()
    for offset in (0, CLUSTER):
        await disk.image.write(offset + 5, b"twice")
    await disk.image.trim(0, 2 * CLUSTER)
    await disk.image.flush()
    await disk.write(MIB, b"n" * MIB)
    await patient.assert_others_unharmed(disk, 0, CLUSTER)
    await disk.image.close()


# -- the end of the file


async def test_a_data_cluster_past_the_end_reads_zeros_and_takes_no_write(
    patient: Patient,
) -> None:
    past = (len(patient.whole) // CLUSTER + 1000) * CLUSTER
    patient.set_entry(0, past | COPIED)
    for read_only in (True, False):
        disk = await patient.open(read_only=read_only)
        assert await disk.image.read(0, CLUSTER) == bytes(CLUSTER)
        if not read_only:
            with pytest.raises(ImageCorruptError, match="past the end"):
                await disk.image.write(0, b"x" * CLUSTER)
        await patient.assert_others_unharmed(disk, 0)
        await disk.image.close()
        assert len(disk.memory.content()) == len(patient.whole)


async def test_a_cluster_at_the_largest_offset_reads_zeros(patient: Patient) -> None:
    patient.set_entry(0, OFFSET & -CLUSTER)
    path = patient.folder / "real.qcow2"
    path.write_bytes(patient.bytes)
    async with open_image(path, read_only=True) as image:
        assert await image.read(0, CLUSTER) == bytes(CLUSTER)
        assert await image.read(CLUSTER, 100) == bytes(patient.model[CLUSTER:][:100])


async def test_a_cluster_that_ends_past_the_end_is_valid(patient: Patient) -> None:
    """Fresh images end so: the tail reads as zeros and can be written."""
    last = max(
        range(0, MIB // 2, CLUSTER), key=lambda guest: patient.entry(guest) & OFFSET
    )
    host_offset = patient.entry(last) & OFFSET
    patient.bytes = patient.bytes[: host_offset + 512]
    disk = await patient.open()
    disk.model[last + 512 : last + CLUSTER] = bytes(CLUSTER - 512)
    await disk.assert_content()
    await disk.write(last + 1024, b"tail" * 64)
    await disk.write(MIB, b"n" * 10 * CLUSTER)
    await disk.assert_content()
    await disk.close_and_check()


@pytest.mark.parametrize("what", ["L1 table", "refcount table"])
async def test_metadata_past_the_end_is_refused_at_open(
    patient: Patient, what: str
) -> None:
    field = HEADER_L1_OFFSET if what == "L1 table" else HEADER_REFCOUNT_TABLE
    put64(patient.bytes, field, (len(patient.whole) // CLUSTER + 9) * CLUSTER)
    for read_only in (True, False):
        with pytest.raises(ImageError, match="end of the file"):
            await patient.open(read_only=read_only)


# -- the zero flag


async def test_the_zero_flag_in_version_2_is_an_error(tmp_path: Path) -> None:
    patient = Patient(tmp_path, f"cluster_size={CLUSTER},compat=0.10")
    patient.set_entry(0, patient.entry(0) | 1)
    patient.set_entry(CLUSTER, 1)
    disk = await patient.open()
    await refuses_every_use(disk, 0)
    await refuses_every_use(disk, CLUSTER)
    await patient.assert_others_unharmed(disk, 0, CLUSTER)
    await disk.image.close()
    assert disk.memory.content()[:CLUSTER] == patient.whole[:CLUSTER]


# -- compressed clusters


def compressed_word(host_offset: int, sectors: int) -> int:
    shift = 62 - (CLUSTER.bit_length() - 1 - 8)
    return COMPRESSED | (sectors - 1) << shift | host_offset


#: Valid, and too short: a final deflate block, and a zstd frame, without content.
EMPTY_STREAM = {"zlib": b"\x03\x00", "zstd": bytes.fromhex("28b52ffd2000010000")}


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize("what", ["garbage", "past the end", "empty", "over header"])
async def test_compressed_data_that_make_no_cluster(
    tmp_path: Path, kind: str, what: str
) -> None:
    """EIO for the cluster and nothing else: no corrupt mark, and it can be overwritten."""
    patient = Patient(
        tmp_path, f"cluster_size={CLUSTER},compression_type={kind}", compressed=True
    )
    target = 5 * CLUSTER
    word = patient.entry(target)
    assert word & COMPRESSED
    shift = 62 - (CLUSTER.bit_length() - 1 - 8)
    host_offset = word & (1 << shift) - 1
    if what == "garbage":
        # only bytes that no other cluster has
        patient.bytes[host_offset : host_offset + 8] = b"\xff" * 8
    elif what == "empty":
        patient.bytes[host_offset : host_offset + 16] = EMPTY_STREAM[kind].ljust(16)
    elif what == "past the end":
        patient.set_entry(target, compressed_word(len(patient.whole) + MIB, 1))
    else:
        patient.set_entry(target, compressed_word(16, 2))
    disk = await patient.open()
    for _ in range(2):
        with pytest.raises(ImageCorruptError):
            await disk.image.read(target + 100, 10)
    with pytest.raises(ImageCorruptError):  # the rest of the cluster is lost
        await disk.image.write(target + 100, b"x")
    await patient.assert_others_unharmed(disk, target)
    assert not u64(disk.memory.content(), HEADER_INCOMPATIBLE) & CORRUPT_BIT
    if what == "over header":
        with pytest.raises(ImageCorruptError):
            await disk.image.write(target, b"x" * CLUSTER)
        with pytest.raises(ImageCorruptError):
            await disk.image.trim(target, CLUSTER)
    else:
        await disk.write(target, b"x" * CLUSTER)
        await disk.assert_content()
    await disk.image.close()
    await patient.assert_others_unharmed(await patient.open(read_only=True), target)


async def test_a_compressed_size_that_overruns_the_file_is_no_error(
    tmp_path: Path,
) -> None:
    """The size is an upper bound, and what lies behind the data is ignored."""
    patient = Patient(tmp_path, f"cluster_size={CLUSTER}", compressed=True)
    for offset in (0, MIB - CLUSTER):
        host_offset = patient.entry(offset) & (1 << 58) - 1
        patient.set_entry(offset, compressed_word(host_offset, 16))
    disk = await patient.open()
    await disk.assert_content()


# -- refcounts


def wipe_refcounts(patient: Patient) -> None:
    block = patient.refcount_block
    patient.bytes[block : block + CLUSTER] = bytes(CLUSTER)


async def test_a_refcount_block_of_zeros_costs_no_data(patient: Patient) -> None:
    """Every cluster looks free: none may be taken, and the file must not be cut."""
    wipe_refcounts(patient)
    disk = await patient.open()
    await refuses_every_change(disk, 0)
    await patient.assert_others_unharmed(disk)
    await disk.image.close()
    content = disk.memory.content()
    assert u64(content, HEADER_INCOMPATIBLE) & CORRUPT_BIT
    patient.bytes[:] = content
    await patient.assert_others_unharmed(await patient.open(read_only=True))
    path = patient.folder / "repair.qcow2"
    path.write_bytes(content)
    run("qemu-img", "check", "-r", "all", path)
    raw = patient.folder / "model.raw"
    raw.write_bytes(patient.model)
    run("qemu-img", "compare", path, raw)


async def test_opening_and_closing_changes_nothing(patient: Patient) -> None:
    wipe_refcounts(patient)
    disk = await patient.open()
    await disk.image.close()
    assert disk.memory.content() == bytes(patient.bytes)


@pytest.mark.parametrize("place", ["header", "L1", "refcount table", "refcount block"])
async def test_metadata_with_refcount_zero_are_not_taken_for_free_space(
    patient: Patient, place: str
) -> None:
    cluster = metadata_places(patient)[place] // CLUSTER
    struct.pack_into(">H", patient.bytes, patient.refcount_block + 2 * cluster, 0)
    disk = await patient.open()
    await disk.write(0, b"in place" * 10)
    with pytest.raises(ImageCorruptError):
        await disk.image.write(MIB, b"x" * 20 * CLUSTER)
    await disk.assert_content()
    await disk.image.close()
    assert u64(disk.memory.content(), HEADER_INCOMPATIBLE) & CORRUPT_BIT


@pytest.mark.parametrize("word", [0x4200, 1, (1 << 40), 0x7FFF_FFFF_FFFF_F000], ids=hex)
async def test_a_refcount_table_entry_that_is_no_place(
    patient: Patient, word: int
) -> None:
    put64(patient.bytes, patient.refcount_table, word)
    readable = await patient.open(read_only=True)
    await patient.assert_others_unharmed(readable)
    with pytest.raises(ImageCorruptError, match="refcount table"):
        await patient.open()


async def test_a_missing_refcount_block_is_no_reason_to_write_there(
    patient: Patient,
) -> None:
    put64(patient.bytes, patient.refcount_table, 0)
    disk = await patient.open()
    await refuses_every_change(disk, 0)
    await disk.image.close()
    assert len(disk.memory.content()) >= len(patient.whole)


@pytest.mark.parametrize("count", [2, 0xFFFF])
async def test_copied_with_a_larger_refcount_is_treated_as_shared(
    patient: Patient, count: int
) -> None:
    """qemu overwrites such a cluster in place, and whoever shares it sees that."""
    host_offset = patient.entry(0) & OFFSET
    cluster = host_offset // CLUSTER
    struct.pack_into(">H", patient.bytes, patient.refcount_block + 2 * cluster, count)
    disk = await patient.open()
    await disk.write(10, b"mine")
    await disk.assert_content()
    await disk.image.close()
    content = disk.memory.content()
    assert content[host_offset : host_offset + CLUSTER] == bytes(
        patient.model[:CLUSTER]
    )
    where = patient.refcount_block + 2 * cluster
    assert struct.unpack_from(">H", content, where) == (count - 1,)


# -- snapshots


@pytest.fixture
def with_snapshot(tmp_path: Path) -> Patient:
    patient = Patient(tmp_path, f"cluster_size={CLUSTER}")
    path = tmp_path / "snapshot.qcow2"
    path.write_bytes(patient.whole)
    run("qemu-img", "snapshot", "-c", "one", path)
    patient.whole = path.read_bytes()
    patient.bytes = bytearray(patient.whole)
    return patient


@pytest.mark.parametrize(
    ("field", "value"),
    [(0, 0x4200), (0, 1 << 60), (8, 0xFFFF_FFFF), (36, 2048)],
    ids=["L1 unaligned", "L1 past the end", "L1 huge", "extra data"],
)
async def test_a_broken_snapshot_leaves_the_active_disk_usable(
    with_snapshot: Patient, field: int, value: int
) -> None:
    """And what it shared is still copied before it is written."""
    patient = with_snapshot
    entry = u64(patient.whole, HEADER_SNAPSHOTS + 4)
    struct.pack_into(">Q" if field == 0 else ">I", patient.bytes, entry + field, value)
    shared = patient.entry(0) & OFFSET
    disk = await open_bytes(patient.folder, bytes(patient.bytes))
    disk.model[:] = patient.model
    await disk.assert_content()
    await disk.write(0, b"x" * CLUSTER)
    await disk.write(MIB + 7, b"y" * CLUSTER)
    await disk.image.write_zeroes(2 * CLUSTER, CLUSTER)
    disk.model[2 * CLUSTER : 3 * CLUSTER] = bytes(CLUSTER)
    await disk.assert_content()
    await disk.image.close()
    content = disk.memory.content()
    assert content[shared : shared + CLUSTER] == bytes(patient.model[:CLUSTER])
    assert content[entry : entry + 48] == bytes(patient.bytes[entry : entry + 48])


# -- features


async def test_an_unknown_incompatible_feature_is_refused_by_its_name(
    tmp_path: Path,
) -> None:
    content = bytearray(make(tmp_path, MIB).read_bytes())
    at = content.index(b"extended L2 entries")
    content[at - 1] = 17
    content[at : at + 46] = b"teleportation".ljust(46, b"\0")
    put64(content, HEADER_INCOMPATIBLE, 1 << 17)
    for read_only in (True, False):
        with pytest.raises(ImageFormatError, match="teleportation"):
            await open_bytes(tmp_path, bytes(content), read_only=read_only)


async def test_an_unknown_incompatible_feature_without_a_name(tmp_path: Path) -> None:
    content = bytearray(make(tmp_path, MIB).read_bytes())
    put64(content, HEADER_INCOMPATIBLE, 1 << 40)
    with pytest.raises(ImageFormatError, match="40"):
        await open_bytes(tmp_path, bytes(content))


async def test_the_corrupt_bit_allows_reading_only(patient: Patient) -> None:
    put64(patient.bytes, HEADER_INCOMPATIBLE, CORRUPT_BIT)
    with pytest.raises(ImageError, match="corrupt"):
        await patient.open()
    disk = await patient.open(read_only=True)
    await disk.assert_content()
    await disk.image.close()
    assert disk.memory.content() == bytes(patient.bytes)


async def test_unknown_autoclear_bits_are_cleared_before_the_first_change_and_only_then(
    patient: Patient,
) -> None:
    put64(patient.bytes, HEADER_AUTOCLEAR, 1 << 5 | 1 << 63)
    put64(patient.bytes, HEADER_COMPATIBLE, 1 << 7)
    disk = await patient.open()
    await disk.assert_content()
    await disk.image.flush()
    # nothing to do is no change
    await disk.image.write_zeroes(MIB, MIB)
    await disk.image.trim(MIB, MIB)
    await disk.image.close()
    assert disk.memory.content() == bytes(patient.bytes)

    disk = await patient.open()
    await disk.write(0, b"x")
    content = disk.memory.content()
    assert u64(content, HEADER_AUTOCLEAR) == 0
    assert disk.memory.flush_count >= 1
    await disk.write(MIB, b"x")
    content = await disk.close_and_check()
    assert u64(content, HEADER_COMPATIBLE) == 1 << 7, "unknown compatible bits are kept"


async def test_a_failed_clearing_of_autoclear_bits_lets_no_change_through(
    patient: Patient,
) -> None:
    put64(patient.bytes, HEADER_AUTOCLEAR, 1 << 5)
    disk = await patient.open()
    disk.storage.fault = type(disk.storage.fault)(at=0, kinds=frozenset({"write"}))
    with pytest.raises(OSError, match="Input/output"):
        await disk.image.write(0, b"x")
    assert disk.memory.content() == bytes(patient.bytes)
    await disk.write(0, b"x")
    assert u64(await disk.close_and_check(), HEADER_AUTOCLEAR) == 0


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
async def test_the_header_is_never_downgraded_and_unknown_extensions_are_kept(
    tmp_path: Path, compat: str
) -> None:
    """Allocations, refcount blocks, a larger refcount table: the rest of it stays."""
    content = bytearray(
        make(
            tmp_path, 8 * MIB, options=f"cluster_size=512,compat={compat}"
        ).read_bytes()
    )
    version = u32(content, 4)
    header_length = 72 if version == 2 else u32(content, 100)
    extension = struct.pack(">II", 0x1234_5678, 11) + b"hello world".ljust(16, b"\0")
    old = bytes(content[header_length:512]).rstrip(b"\0")
    assert header_length + len(old) + len(extension) < 500
    end = struct.pack(">II", 0, 0)
    content[header_length:512] = (extension + old + end).ljust(
        512 - header_length, b"\0"
    )
    disk = await open_bytes(tmp_path, bytes(content))
    generator = random.Random(1)
    for offset in range(0, 8 * MIB, MIB):
        await disk.write(offset, generator.randbytes(MIB))
    after = await disk.close_and_check()
    table = slice(HEADER_REFCOUNT_TABLE, HEADER_REFCOUNT_TABLE + 12)
    assert after[table] != content[table], "the refcount table was to move"
    assert after[: table.start] == content[: table.start]
    assert after[table.stop : 512] == content[table.stop : 512]


async def test_a_damaged_image_takes_no_more_writes_and_can_be_flushed_and_read(
    patient: Patient,
) -> None:
    """docs/interop/qcow2.rst: with the corrupt bit set it must not be written to."""
    disk = await patient.open()
    await disk.write(3 * CLUSTER, b"before")
    await disk.image.close()
    patient.bytes[:] = disk.memory.content()
    patient.set_entry(0, patient.refcount_block | COPIED)
    disk = await patient.open()
    await disk.image.write(3 * CLUSTER + 100, b"acknowledged")
    with pytest.raises(ImageCorruptError):
        await disk.image.write(0, b"x")
    with pytest.raises(ImageCorruptError, match="contradict"):
        await disk.image.write(3 * CLUSTER, b"too late")
    await disk.image.flush()
    assert await disk.image.read(3 * CLUSTER, 6) == b"before"
    assert await disk.image.read(3 * CLUSTER + 100, 12) == b"acknowledged"
    await disk.image.close()
