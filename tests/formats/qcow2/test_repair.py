"""Repair: qemu-img finds nothing more to do, and nothing reads worse than before."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdserve.errors import ConfigError, ImageError, NbdserveError
from nbdserve.formats.open import open_image
from nbdserve.formats.qcow2.repair import Repair
from nbdserve.formats.repair import repair_image
from tests.helpers.engine import (
    COMPRESSED,
    COPIED,
    HEADER_INCOMPATIBLE,
    HEADER_REFCOUNT_TABLE,
    OFFSET,
    convert,
    l2_entry_of,
    make,
    put64,
    u64,
)
from tests.helpers.tools import run

KIB = 1 << 10
MIB = 1 << 20
CLUSTER = 4 * KIB
SIZE = 256 * KIB
OPTIONS = "cluster_size=4k"
#: Bits of the header: dirty and corrupt.
BAD_BITS = 3

CONTENT = random.Random(1).randbytes(SIZE)


def repaired(path: Path, *, everything: bool = True, force: bool = False) -> Repair:
    """Repair, and agree to losses only if `force`."""
    return repair_image(path, everything=everything, agree=lambda _: force)


def patched(tmp_path: Path, change: Callable[[bytearray], None], **kw: object) -> Path:
    """Make an image with content, and change its bytes."""
    path = convert(tmp_path, CONTENT, options=OPTIONS, **kw)  # type: ignore[arg-type]
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


def reads(path: Path) -> bytes:
    """Return what qemu-img reads."""
    out = path.with_suffix(".raw")
    run("qemu-img", "convert", "-O", "raw", path, out)
    return out.read_bytes()


def refcount_of(data: bytearray, host_offset: int) -> int:
    """Return where the 16-bit refcount of a cluster is."""
    table = u64(data, HEADER_REFCOUNT_TABLE)
    return u64(data, table) + host_offset // CLUSTER * 2


def data_cluster(data: bytearray, guest_offset: int) -> int:
    """Return where a guest cluster is in the file."""
    return u64(data, l2_entry_of(data, guest_offset)) & OFFSET


def leak(data: bytearray) -> None:
    """Count a cluster at the end that nothing uses."""
    at = refcount_of(data, len(data))
    data[at : at + 2] = b"\0\1"
    data += bytes(CLUSTER)


def too_low(data: bytearray) -> None:
    """Say that a data cluster is free."""
    at = refcount_of(data, data_cluster(data, 40 * KIB))
    data[at : at + 2] = b"\0\0"


def too_high(data: bytearray) -> None:
    """Say that a data cluster has two users, so that COPIED is wrong too."""
    at = refcount_of(data, data_cluster(data, 40 * KIB))
    data[at : at + 2] = b"\0\2"


def no_copied(data: bytearray) -> None:
    """Clear COPIED in an entry."""
    at = l2_entry_of(data, 80 * KIB)
    put64(data, at, u64(data, at) & ~COPIED)


def no_copied_anywhere(data: bytearray) -> None:
    """Clear COPIED in both levels, as a snapshot does before it counts."""
    l1 = u64(data, 40)
    put64(data, l1, u64(data, l1) & ~COPIED)
    for offset in range(0, SIZE, CLUSTER):
        at = l2_entry_of(data, offset)
        put64(data, at, u64(data, at) & ~COPIED)


def no_block(data: bytearray) -> None:
    """Empty the refcount table."""
    put64(data, u64(data, HEADER_REFCOUNT_TABLE), 0)


def crooked_block(data: bytearray) -> None:
    """Let the refcount table name no cluster."""
    put64(data, u64(data, HEADER_REFCOUNT_TABLE), 0x10200)


def block_is_table(data: bytearray) -> None:
    """Let the refcount table name itself as a block."""
    table = u64(data, HEADER_REFCOUNT_TABLE)
    put64(data, table + 8, table)


def reserved_bits(data: bytearray) -> None:
    """Set bits in entries that must be clear."""
    at = l2_entry_of(data, 80 * KIB)
    put64(data, at, u64(data, at) | 1 << 57 | 1 << 3)
    l1 = u64(data, 40)
    put64(data, l1, u64(data, l1) | 4)


def bad_bits(data: bytearray) -> None:
    """Set dirty and corrupt, with a wrong refcount."""
    put64(data, HEADER_INCOMPATIBLE, BAD_BITS)
    too_low(data)


HARMLESS = [
    leak,
    too_low,
    too_high,
    no_copied,
    no_copied_anywhere,
    no_block,
    crooked_block,
    block_is_table,
    reserved_bits,
    bad_bits,
]


@pytest.mark.parametrize("damage", HARMLESS)
def test_repaired_without_loss(
    damage: Callable[[bytearray], None], tmp_path: Path
) -> None:
    """Nobody is asked, everything is right afterwards, and all bytes are there."""
    path = patched(tmp_path, damage)
    run("qemu-img", "check", path, expect=[1, 2, 3])
    repair = repaired(path)
    assert not repair.declined
    assert repair.after.corruptions == repair.after.leaks == 0
    assert repair.leaks_fixed + repair.corruptions_fixed > 0
    run("qemu-img", "check", path)
    assert reads(path) == CONTENT
    assert u64(path.read_bytes(), HEADER_INCOMPATIBLE) & BAD_BITS == 0
    again = path.read_bytes()
    repaired(path)
    assert path.read_bytes() == again


def shared_cluster(data: bytearray) -> None:
    """Let two guest clusters name one place."""
    put64(data, l2_entry_of(data, 0), u64(data, l2_entry_of(data, 4 * KIB)))


def test_two_users_of_a_cluster(tmp_path: Path) -> None:
    """Both keep reading it, and writing one leaves the other alone."""
    path = patched(tmp_path, shared_cluster)
    run("qemu-img", "check", path, expect=[2])
    repaired(path)
    run("qemu-img", "check", path)
    expected = CONTENT[4 * KIB : 8 * KIB] + CONTENT[4 * KIB :]
    assert reads(path) == expected
    run("qemu-io", "-c", "write -P 1 0 4k", path)
    assert reads(path) == b"\1" * 4 * KIB + expected[4 * KIB :]


def test_leaks_only(tmp_path: Path) -> None:
    """The mode for leaks touches nothing else."""
    path = patched(tmp_path, leak)
    repair = repaired(path, everything=False)
    assert (repair.leaks_fixed, repair.corruptions_fixed) == (1, 0)
    run("qemu-img", "check", path)

    def both(data: bytearray) -> None:
        leak(data)
        no_copied(data)
        too_low(data)

    path = patched(tmp_path, both)
    repair = repaired(path, everything=False)
    assert repair.leaks_fixed == 1
    assert repair.after.corruptions == repair.before.corruptions > 0
    run("qemu-img", "check", path, expect=[2])
    assert repaired(path).after.corruptions == 0
    run("qemu-img", "check", path)


def l1_past_end(data: bytearray) -> None:
    """Lose an L2 table."""
    put64(data, u64(data, 40), COPIED | 1 << 30)


def l2_past_end(data: bytearray) -> None:
    """Lose one cluster."""
    put64(data, l2_entry_of(data, 80 * KIB), COPIED | 1 << 30)


def l2_crooked(data: bytearray) -> None:
    """Let an entry name no cluster."""
    at = l2_entry_of(data, 80 * KIB)
    put64(data, at, u64(data, at) + 512)


def compressed_past_end(data: bytearray) -> None:
    """Let an entry name compressed data that are not there."""
    put64(data, l2_entry_of(data, 80 * KIB), COMPRESSED | 1 << 30)


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (l1_past_end, (0, SIZE)),
        (l2_past_end, (80 * KIB, 4 * KIB)),
        (l2_crooked, (80 * KIB, 4 * KIB)),
        (compressed_past_end, (80 * KIB, 4 * KIB)),
    ],
)
def test_what_is_lost_is_said_first(
    damage: Callable[[bytearray], None], lost: tuple[int, int], tmp_path: Path
) -> None:
    """Without a yes nothing changes; with one, only what was named is gone."""
    path = patched(tmp_path, damage)
    before = path.read_bytes()
    said: list[str] = []

    def refuse(losses: list[str]) -> bool:
        said.extend(losses)
        return False

    repair = repair_image(path, everything=True, agree=refuse)
    assert repair.declined
    assert len(said) == 1
    assert f"bytes {lost[0]} to" in said[0]
    assert path.read_bytes() == before
    # leaks are what the lost entry may have led to
    leaks = repaired(path, everything=False)
    assert leaks.declined or not leaks.before.leaks
    assert path.read_bytes() == before
    repair = repaired(path, force=True)
    assert repair.after.corruptions == repair.after.leaks == 0
    run("qemu-img", "check", path)
    start, length = lost
    expected = CONTENT[:start] + bytes(length) + CONTENT[start + length :]
    assert reads(path) == expected


def test_a_table_that_is_too_small(tmp_path: Path) -> None:
    """A cluster behind everything that the refcount table can count."""
    path = convert(tmp_path, CONTENT, options="cluster_size=512")
    data = bytearray(path.read_bytes())
    place = 9 * MIB
    entry = l2_entry_of(data, 0)
    data += bytes(place - len(data)) + CONTENT[:512]
    put64(data, entry, COPIED | place)
    path.write_bytes(data)
    repair = repaired(path)
    assert repair.after.corruptions == repair.after.leaks == 0
    run("qemu-img", "check", path)
    assert reads(path) == CONTENT


@pytest.mark.parametrize("bits", [1, 2, 8, 32, 64])
def test_every_width(bits: int, tmp_path: Path) -> None:
    """Counts of all widths are rebuilt."""
    path = convert(tmp_path, CONTENT, options=f"{OPTIONS},refcount_bits={bits}")
    data = bytearray(path.read_bytes())
    put64(data, u64(data, HEADER_REFCOUNT_TABLE), 0)
    path.write_bytes(data)
    repaired(path)
    run("qemu-img", "check", path)
    assert reads(path) == CONTENT


def test_with_snapshots(tmp_path: Path) -> None:
    """Snapshots count, and are still there."""
    path = convert(tmp_path, CONTENT, options=OPTIONS)
    run("qemu-img", "snapshot", "-c", "one", path)
    run("qemu-io", "-c", "write -P 1 0 100k", path)
    data = bytearray(path.read_bytes())
    put64(data, u64(data, HEADER_REFCOUNT_TABLE), 0)
    path.write_bytes(data)
    repaired(path)
    run("qemu-img", "check", path)
    run("qemu-img", "snapshot", "-a", "one", path)
    assert reads(path) == CONTENT
    run("qemu-img", "check", path)


async def readable(path: Path) -> dict[int, bytes]:
    """Return the clusters that can be read."""
    found: dict[int, bytes] = {}
    try:
        async with open_image(path, read_only=True) as image:
            for offset in range(0, min(image.size, SIZE), CLUSTER):
                try:
                    found[offset] = await image.read(offset, CLUSTER)
                except (ImageError, OSError):
                    continue
    except NbdserveError:
        pass
    return found


@pytest.mark.parametrize("seed", range(40))
async def test_random_damage(seed: int, tmp_path: Path) -> None:
    """Whatever is broken: what could be read reads the same, repaired without a yes or not."""
    chance = random.Random(seed)
    path = convert(tmp_path, CONTENT, options=OPTIONS, compressed=seed % 4 == 0)
    if seed % 2:
        run("qemu-img", "snapshot", "-c", "one", path)
        run("qemu-io", "-c", "write -P 1 8k 60k", path)
    data = bytearray(path.read_bytes())
    l1, table = u64(data, 40), u64(data, HEADER_REFCOUNT_TABLE)
    spots = [l1, table, u64(data, table), l2_entry_of(data, 0), 64]
    for _ in range(chance.choice((1, 2, 5))):
        at = chance.choice(spots) + 8 * chance.choice((0, 0, 1, 2, 7, 30))
        value = chance.choice(
            (0, 1 << chance.randrange(64), chance.randrange(1 << 24), u64(data, at) ^ 8)
        )
        put64(data, at, value)
    path.write_bytes(data)
    before = await readable(path)
    try:
        repair = repaired(path)
    except NbdserveError:
        assert path.read_bytes() == data
        return
    after = await readable(path)
    assert {offset: after.get(offset) for offset in before} == before
    if not repair.declined and not repair.after.corruptions:
        run("qemu-img", "check", path, expect=[0, 3])
    repaired(path, force=True)


def test_other_formats(tmp_path: Path) -> None:
    """There is nothing to repair in them."""
    path = make(tmp_path, SIZE, fmt="qcow")
    with pytest.raises(ConfigError, match="only qcow2 images can be repaired"):
        repaired(path)
