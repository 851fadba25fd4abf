"""The cache of L2 tables: bounded, and never without what is not in the file yet."""

import asyncio
import random
from pathlib import Path

import pytest

from nbdserve.errors import ImageCorruptError
from nbdserve.formats.mapped.opening import EngineOptions
from nbdserve.storage.faults import Fault
from tests.helpers.engine import Disk, convert, open_bytes

CLUSTER = 512
TABLE_MAPS = CLUSTER * CLUSTER // 8
TABLES = 16
SIZE = TABLES * TABLE_MAPS
TINY = EngineOptions(table_cache=1, commit_interval_s=1e6)
#: Three tables of 64 words.
SMALL = EngineOptions(table_cache=3 * 64 * 9, commit_interval_s=1e6)


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    data = random.Random(1).randbytes(SIZE)
    return convert(tmp_path, data, options=f"cluster_size={CLUSTER}").read_bytes()


def filled(disk: Disk) -> Disk:
    disk.model[:] = random.Random(1).randbytes(SIZE)
    return disk


async def test_the_cache_is_bounded(tmp_path: Path, content: bytes) -> None:
    disk = filled(await open_bytes(tmp_path, content, options=SMALL))
    for _ in range(3):
        await disk.assert_content()
        assert len(disk.image._parts.tables.cached) <= 3
    await disk.close_and_check()


async def test_tables_with_held_words_stay(tmp_path: Path, content: bytes) -> None:
    """A word that waits for its commit is nowhere else."""
    backing = random.Random(2).randbytes(SIZE)
    empty = convert(
        tmp_path, bytes(SIZE), options=f"cluster_size={CLUSTER}"
    ).read_bytes()
    disk = await open_bytes(tmp_path, empty, backing=backing, options=TINY)
    disk.storage.fault = Fault(at=-1)
    disk.image._space.commit.redo = AlwaysLogs()  # type: ignore[union-attr]
    for number in range(TABLES):
        await disk.write(number * TABLE_MAPS + 5, b"held")
    assert len(disk.image._parts.tables.cached) >= 2
    await disk.assert_content()
    await disk.image.flush()
    await disk.assert_content()
    disk.image._space.commit.redo = None  # type: ignore[union-attr]
    await disk.image.close()
    again = await open_bytes(tmp_path, disk.memory.content(), backing=backing)
    again.model[:] = disk.model
    await again.assert_content()


class AlwaysLogs:
    """A redo log that says yes and keeps nothing."""

    sequence = 0

    def link(self, *_: int) -> bool:
        return True

    def committed(self, _: int) -> None:
        pass


async def test_a_table_stays_while_its_owner_is_looked_up(
    tmp_path: Path, content: bytes
) -> None:
    """Loaded twice, one copy would not know what is written through the other."""
    gate = asyncio.Event()
    disk = filled(await open_bytes(tmp_path, content, options=TINY, suspending=True))
    assert disk.image._space is not None
    pool = disk.image._space.pool
    references = pool.references

    async def slowly(host_offset: int) -> int:
        await gate.wait()
        return await references(host_offset)

    pool.references = slowly  # type: ignore[method-assign]
    await disk.image.read(0, 1)
    writing = asyncio.create_task(disk.write(0, b"n" * CLUSTER))
    for number in range(1, 4):
        assert await disk.image.read(number * TABLE_MAPS, 1)
    gate.set()
    await writing
    await disk.write(100, b"m" * CLUSTER)
    await disk.assert_content()
    await disk.image.trim(0, TABLE_MAPS)
    disk.model[:TABLE_MAPS] = bytes(TABLE_MAPS)
    await disk.assert_content()
    await disk.close_and_check()


async def test_a_table_is_loaded_once_for_everyone(
    tmp_path: Path, content: bytes
) -> None:
    disk = filled(await open_bytes(tmp_path, content, suspending=True))
    disk.storage.fault = Fault(at=-1, kinds=frozenset({"read"}))
    reads = await asyncio.gather(*(disk.image.read(n * 512, 512) for n in range(20)))
    assert b"".join(reads) == disk.model[: 20 * 512]
    assert disk.storage.calls == 21
    await disk.image.close()


async def test_a_load_that_failed_is_tried_by_the_next(
    tmp_path: Path, content: bytes
) -> None:
    disk = filled(await open_bytes(tmp_path, content, suspending=True))
    disk.storage.fault = Fault(at=0, kinds=frozenset({"read"}))
    results = await asyncio.gather(
        *(disk.image.read(0, 512) for _ in range(4)), return_exceptions=True
    )
    assert sum(isinstance(each, OSError) for each in results) == 1
    assert sum(each == bytes(disk.model[:512]) for each in results) == 3
    await disk.image.close()


async def test_an_l1_entry_past_the_end_names_itself(
    tmp_path: Path, content: bytes
) -> None:
    disk = await open_bytes(tmp_path, content)
    disk.image._parts.tables.l1.words[3] = 1 << 40
    with pytest.raises(ImageCorruptError, match=r"L1 entry 3 .*past the end"):
        await disk.image.read(3 * TABLE_MAPS, 1)
    await disk.image.close()
