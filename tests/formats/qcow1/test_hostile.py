"""Broken and hostile qcow version 1 images in use: typed errors, nothing else harmed."""

import random
from pathlib import Path

import pytest

from nbdserve.errors import ImageCorruptError, ImageError
from tests.helpers.engine import Disk, convert, l1_of, open_bytes, put64, u64

CLUSTER = 4096
SIZE = 1 << 20


@pytest.fixture
def content(tmp_path: Path) -> bytearray:
    data = random.Random(1).randbytes(SIZE)
    return bytearray(convert(tmp_path, data, fmt="qcow").read_bytes())


def l2_of(content: bytearray) -> int:
    return u64(content, l1_of(content))


async def opened(folder: Path, content: bytearray, *, read_only: bool = False) -> Disk:
    disk = await open_bytes(folder, bytes(content), fmt="qcow", read_only=read_only)
    disk.model[:] = random.Random(1).randbytes(SIZE)
    return disk


async def refuses_changes(disk: Disk) -> None:
    for change in (
        disk.image.write(0, b"x" * CLUSTER),
        disk.image.write(10, b"x"),
        disk.image.write_zeroes(0, 100, may_unmap=False),
    ):
        with pytest.raises((ImageCorruptError, OSError)):
            await change


@pytest.mark.parametrize("word", [1, 0x4201, CLUSTER + 7])
async def test_an_unaligned_l2_entry(
    tmp_path: Path, content: bytearray, word: int
) -> None:
    put64(content, l2_of(content), word)
    disk = await opened(tmp_path, content)
    with pytest.raises(ImageCorruptError):
        await disk.image.read(0, 10)
    await refuses_changes(disk)
    assert await disk.image.read(CLUSTER, 10) == disk.model[CLUSTER : CLUSTER + 10]
    await disk.image.close()
    assert disk.memory.content() == bytes(content)


async def test_no_change_reaches_a_table_that_an_entry_names(
    tmp_path: Path, content: bytearray
) -> None:
    put64(content, l2_of(content), l2_of(content))
    disk = await opened(tmp_path, content)
    await refuses_changes(disk)
    with pytest.raises(ImageCorruptError):
        await disk.image.trim(0, CLUSTER)
    await disk.image.flush()
    assert await disk.image.read(CLUSTER, 10) == disk.model[CLUSTER : CLUSTER + 10]
    await disk.image.close()
    assert disk.memory.content() == bytes(content)


async def test_an_l1_entry_past_the_end(tmp_path: Path, content: bytearray) -> None:
    put64(content, l1_of(content), 1 << 40)
    disk = await opened(tmp_path, content)
    with pytest.raises(ImageCorruptError, match="past the end"):
        await disk.image.read(0, 10)
    await refuses_changes(disk)
    await disk.image.close()
    assert disk.memory.content() == bytes(content)


async def test_a_data_cluster_past_the_end(tmp_path: Path, content: bytearray) -> None:
    put64(content, l2_of(content), 1 << 40)
    disk = await opened(tmp_path, content)
    assert await disk.image.read(0, 10) == bytes(10)
    await refuses_changes(disk)
    await disk.image.close()
    assert len(disk.memory.content()) == len(content)


async def test_an_l1_table_past_the_end_is_refused(
    tmp_path: Path, content: bytearray
) -> None:
    put64(content, 40, 1 << 40)
    with pytest.raises(ImageError):
        await opened(tmp_path, content, read_only=True)
