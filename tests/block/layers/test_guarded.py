"""A raw disk of which nobody said so takes no header of an image format."""

import asyncio
from errno import EPERM

import pytest

from nbdserve.block.layers.guarded import Guarded
from nbdserve.block.magics import MAGICS
from nbdserve.errors import RequestError
from tests.server.memory_disk import MemoryDisk


@pytest.mark.parametrize("magic", MAGICS, ids=lambda magic: repr(magic[2]))
async def test_no_header_gets_in(magic: tuple[str, int, bytes]) -> None:
    name, where, data = magic
    disk = MemoryDisk(4096)
    guarded = Guarded(disk)
    with pytest.raises(RequestError, match=name) as refused:
        await guarded.write(0, bytes(where) + data + bytes(100))
    assert refused.value.errno == EPERM
    half = len(data) // 2
    await guarded.write(where, data[:half])
    with pytest.raises(RequestError):
        await guarded.write(where + half, data[half:])
    await guarded.write(512 + where, data)
    assert data not in disk.data[:512]
    await guarded.write(where + half, b"?" * 8)


async def test_halves_at_the_same_time() -> None:
    disk = MemoryDisk(4096)
    disk.gate = asyncio.Event()
    guarded = Guarded(disk)
    halves = asyncio.gather(
        guarded.write(0, b"QF"), guarded.write(2, b"I\xfb"), return_exceptions=True
    )
    await asyncio.sleep(0)
    disk.gate.set()
    first, second = await halves
    assert first is None
    assert isinstance(second, RequestError)


async def test_zeros_complete_no_header() -> None:
    guarded = Guarded(MemoryDisk(4096))
    await guarded.write(0, b"QEDx")
    for change in (guarded.write_zeroes, guarded.trim):
        with pytest.raises(RequestError):
            await change(3, 1)
    await guarded.write_zeroes(0, 4096)


async def test_a_disk_shorter_than_a_sector() -> None:
    disk = MemoryDisk(100)
    guarded = Guarded(disk)
    await guarded.write(50, b"hello")
    with pytest.raises(RequestError):
        await guarded.write(0, b"QFI\xfb")
    assert await guarded.read(50, 5) == b"hello"
