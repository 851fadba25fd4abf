"""A disk from some offset on is a disk of its own."""

import pytest

from nbdserve.block.layers.window import Window
from nbdserve.errors import ConfigError, RequestError
from tests.server.memory_disk import MemoryDisk

KIB = 1 << 10


async def test_everything_happens_behind_the_offset() -> None:
    disk = MemoryDisk(256 * KIB)
    await disk.write(0, b"\1" * 256 * KIB)
    window = Window(disk, 64 * KIB)
    assert window.size == 192 * KIB
    await window.write(0, b"first", fua=True)
    await window.write_zeroes(64 * KIB, 64 * KIB)
    await window.trim(128 * KIB, 64 * KIB)
    await window.cache(0, KIB)
    await window.flush()
    assert await disk.read(0, 64 * KIB) == b"\1" * 64 * KIB
    assert await disk.read(64 * KIB, 5) == b"first"
    assert await window.read(0, 6) == b"first\1"
    assert await window.read(64 * KIB, 64 * KIB) == bytes(64 * KIB)
    assert await disk.read(128 * KIB, 64 * KIB) == bytes(64 * KIB)
    extents = await window.block_status(64 * KIB, 64 * KIB)
    assert extents == await disk.block_status(128 * KIB, 64 * KIB)
    with pytest.raises(RequestError):
        await window.read(-1, 1)
    with pytest.raises(RequestError):
        await window.write(window.size, b"x")
    await window.close()


async def test_storage_can_be_kept() -> None:
    disk = MemoryDisk(256 * KIB)
    await disk.write(0, b"\1" * 256 * KIB)
    window = Window(disk, discard=False)
    assert not window.can_trim
    await window.trim(0, 64 * KIB)
    await window.trim(0, 64 * KIB, fua=True)
    assert await window.read(0, 64 * KIB) == b"\1" * 64 * KIB
    await window.write_zeroes(0, 64 * KIB)
    assert await window.read(0, 64 * KIB) == bytes(64 * KIB)


def test_an_offset_past_the_end_is_refused() -> None:
    disk = MemoryDisk(256 * KIB)
    assert Window(disk, 256 * KIB).size == 0
    with pytest.raises(ConfigError, match="past the end"):
        Window(disk, 256 * KIB + 1)
