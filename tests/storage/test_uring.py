"""Reads through io_uring, on files whose page cache is emptied first."""

import asyncio
import os
from pathlib import Path

import pytest

from nbdserve.server.inline import go_on
from nbdserve.storage import uring
from nbdserve.storage.file import MISSES_SEEN, FileStorage

PAGE = 4096
PAGES = 600
CONTENT = b"".join(number.to_bytes(4, "big") * 1024 for number in range(PAGES))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A file on a real file system, none of it cached."""
    path = tmp_path / "disk.raw"
    path.write_bytes(CONTENT + b"tail")
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The offsets of what the ring reads."""
    offsets = []
    original = uring.Ring.read

    def read(self: uring.Ring, fd: int, offset: int, view: memoryview) -> uring.Read:
        offsets.append(offset)
        return original(self, fd, offset, view)

    monkeypatch.setattr(uring.Ring, "read", read)
    return offsets


async def test_many_reads_at_once(disk: Path, count: list[int]) -> None:
    storage = FileStorage(disk, read_only=True)
    buffers = [bytearray(PAGE) for _ in range(PAGES)]
    await asyncio.gather(
        *(
            storage.read(number * PAGE, memoryview(buffer))
            for number, buffer in enumerate(buffers)
        )
    )
    assert b"".join(buffers) == CONTENT
    assert len(count) >= 512  # and if the ring was full, threads


async def test_more_reads_than_the_ring_holds(
    disk: Path, count: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uring, "_ENTRIES", 4)
    storage = FileStorage(disk, read_only=True)
    buffers = [bytearray(PAGE) for _ in range(20)]
    await asyncio.gather(
        *(
            storage.read(number * PAGE, memoryview(buffer))
            for number, buffer in enumerate(buffers)
        )
    )
    assert b"".join(buffers) == CONTENT[: 20 * PAGE]
    assert len(count) == 4  # the others took threads
    await storage.close()


async def test_the_end_of_the_file_reads_as_zeros(disk: Path, count: list[int]) -> None:
    storage = FileStorage(disk, read_only=True)
    buffer = bytearray(b"x" * PAGE)
    await storage.read(PAGES * PAGE, memoryview(buffer))
    assert buffer == b"tail".ljust(PAGE, b"\0")
    await storage.read((PAGES + 5) * PAGE, memoryview(buffer))
    assert buffer == bytes(PAGE)
    assert len(count) == 2
    await storage.close()


async def test_closing_waits_for_what_is_in_flight(
    disk: Path, count: list[int]
) -> None:
    storage = FileStorage(disk, read_only=True)
    buffer = bytearray(PAGE)
    reading = asyncio.create_task(storage.read(3 * PAGE, memoryview(buffer)))
    await asyncio.sleep(0)
    await storage.close()
    await reading
    assert count == [3 * PAGE]
    assert buffer == CONTENT[3 * PAGE : 4 * PAGE]
    with pytest.raises(OSError, match="Bad file descriptor"):
        await storage.read(0, memoryview(buffer))


async def test_cancelling_leaves_the_buffer_to_the_kernel(disk: Path) -> None:
    storage = FileStorage(disk, read_only=True)
    buffer = bytearray(PAGE)
    reading = asyncio.create_task(storage.read(9 * PAGE, memoryview(buffer)))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert buffer == CONTENT[9 * PAGE : 10 * PAGE]  # it ended before the caller went on
    await storage.close()


async def test_an_error_is_that_of_pread(disk: Path) -> None:
    storage = FileStorage(disk, read_only=True)
    fd = storage._fd
    storage._fd = os.open(disk.parent, os.O_RDONLY)  # a folder can't be read
    with pytest.raises(IsADirectoryError):
        await storage.read(0, memoryview(bytearray(PAGE)))
    os.close(fd)
    await storage.close()


async def test_without_io_uring_threads_read(
    disk: Path, count: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise PermissionError("no io_uring in here")

    monkeypatch.setattr(uring, "_rings", {})
    monkeypatch.setattr(uring, "_refused", False)
    monkeypatch.setattr(uring, "_setup", refuse)
    storage = FileStorage(disk, read_only=True)
    buffer = bytearray(PAGE)
    await storage.read(7 * PAGE, memoryview(buffer))
    assert buffer == CONTENT[7 * PAGE : 8 * PAGE]
    assert count == []
    assert not uring.available()
    await storage.close()


async def test_what_the_kernel_does_not_take_goes_to_a_thread(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = FileStorage(disk, read_only=True)
    original = uring._syscall
    taken = iter([2, -1])

    def enter(number: int, fd: int, wanted: int, *rest: int) -> int:
        allowed = next(taken, wanted)
        return original(number, fd, allowed, *rest) if allowed >= 0 else -1

    uring.ring(asyncio.get_running_loop())
    monkeypatch.setattr(uring, "_syscall", enter)
    buffers = [bytearray(PAGE) for _ in range(5)]
    for _ in range(3):
        await asyncio.gather(
            *(
                storage.read(number * PAGE, memoryview(buffer))
                for number, buffer in enumerate(buffers)
            )
        )
        assert b"".join(buffers) == CONTENT[: 5 * PAGE]
    await storage.close()


async def test_after_many_misses_reads_are_not_tried_on_the_loop(
    disk: Path, count: list[int]
) -> None:
    storage = FileStorage(disk, read_only=True)
    os.posix_fadvise(storage._fd, 0, 0, os.POSIX_FADV_RANDOM)

    async def pass_over() -> int:
        count.clear()
        view = memoryview(bytearray(PAGE))
        for number in range(40):
            offset = number * 13 * PAGE
            if not storage.try_read(offset, view):
                await storage.read(offset, view)
            assert view == CONTENT[offset : offset + PAGE]
        return len(count)

    assert await pass_over() > 30  # a little is read ahead before the advice
    # all of it is cached now; the ring says so, and they are tried again
    assert await pass_over() <= 2 * MISSES_SEEN
    assert await pass_over() == 0
    await storage.close()


async def test_a_coroutine_without_a_task_goes_on_with_the_completion(
    disk: Path,
) -> None:
    loop = asyncio.get_running_loop()
    storage = FileStorage(disk, read_only=True)
    buffers = [bytearray(PAGE) for _ in range(20)]
    left = len(buffers)
    all_read = asyncio.Event()

    def finished(_: None, failure: BaseException | None) -> None:
        nonlocal left
        assert failure is None
        left -= 1
        if not left:
            all_read.set()

    for number, buffer in enumerate(buffers):
        coroutine = storage.read(number * PAGE, memoryview(buffer))
        go_on(loop, coroutine, coroutine.send(None), finished)
    await all_read.wait()
    assert b"".join(buffers) == CONTENT[: 20 * PAGE]
    await storage.close()


async def test_an_error_of_who_waits_spares_the_others(disk: Path) -> None:
    loop = asyncio.get_running_loop()
    told: list[str] = []
    loop.set_exception_handler(lambda _, context: told.append(context["message"]))
    storage = FileStorage(disk, read_only=True)
    ring = uring.ring(loop)
    assert ring is not None
    wrong, right = bytearray(PAGE), bytearray(PAGE)

    done = asyncio.Event()

    def fail(_: uring.Read) -> None:
        done.set()
        raise RuntimeError("on purpose")

    read = ring.read(storage._fd, 0, memoryview(wrong))
    read.add_done_callback(fail)
    with pytest.raises(asyncio.InvalidStateError):
        read.result()
    await storage.read(PAGE, memoryview(right))
    assert right == CONTENT[PAGE : 2 * PAGE]
    await done.wait()
    assert read.result() == PAGE
    assert await read == PAGE
    assert "fail" in told[0]
    await storage.close()
