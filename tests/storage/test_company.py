"""Nobody is served for long at a time while others are there; asserted by order, not by time."""

import asyncio
import math
import os
from pathlib import Path

import pytest

from nbdserve.storage import uring
from nbdserve.storage.company import company
from nbdserve.storage.file import FileStorage

PAGE = 4096
COUNT = 64


@pytest.fixture
def crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else is there all the time, and the shortest turn is long enough."""
    monkeypatch.setattr(company, "until_s", math.inf)
    monkeypatch.setattr(uring, "SHORT_TURN_S", 0.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(COUNT * PAGE))
    return path


class Turns:
    """Counts the turns of the loop."""

    def __init__(self) -> None:
        self.count = 0
        self._loop = asyncio.get_running_loop()
        self._loop.call_soon(self._tick)

    def _tick(self) -> None:
        self.count += 1
        self._loop.call_soon(self._tick)


@pytest.mark.usefixtures("crowd")
async def test_of_many_reads_that_are_done_each_leaves_room_for_others(
    path: Path,
) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    storage = FileStorage(path, read_only=True)
    turns, seen = Turns(), []

    async def read(number: int) -> None:
        await storage.read(number * PAGE, memoryview(bytearray(PAGE)))
        seen.append(turns.count)

    if uring.ring(asyncio.get_running_loop()) is None:
        pytest.skip("no io_uring here")
    await asyncio.gather(*map(read, range(COUNT)))
    assert len(set(seen)) > COUNT // 2  # one callback, sometimes two, in each
    await storage.close()
