"""A file or block device as a place of bytes."""

import asyncio
import errno
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.errors import ConfigError
from nbdserve.storage import executor, mapped
from nbdserve.storage import file as file_module
from nbdserve.storage.file import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    INLINE_LIMIT,
    FileStorage,
)
from nbdserve.storage.pace import BUDGET_S, PAUSE_S, STALL_S, Pace

MIB = 1 << 20


@pytest.fixture(params=["disk", "tmpfs"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file of 1 MiB: one on a disk (RWF_NOWAIT), one on tmpfs (no RWF_NOWAIT)."""
    if request.param == "disk":
        file = Path.cwd() / ".pytest_cache" / f"disk-{os.getpid()}-{id(request)}"
        file.parent.mkdir(exist_ok=True)
    else:
        file = Path("/dev/shm") / f"nbdserve-{os.getpid()}-{id(request)}"
    file.write_bytes(os.urandom(MIB))
    yield file
    file.unlink()


def created(path: Path, size: int) -> FileStorage:
    path.touch()
    os.truncate(path, size)
    return FileStorage(path)


async def read(storage: FileStorage, offset: int, length: int) -> bytes:
    buffer = memoryview(bytearray(b"\xee" * length))
    if not storage.try_read(offset, buffer):
        await storage.read(offset, buffer)
    return bytes(buffer)


async def test_reads_what_is_there_both_ways(path: Path) -> None:
    content = path.read_bytes()
    storage = FileStorage(path, read_only=True)
    assert storage.size == MIB
    assert await read(storage, 12345, 5000) == content[12345:17345]
    buffer = memoryview(bytearray(777))
    await storage.read(1, buffer)
    assert bytes(buffer) == content[1:778]
    await storage.close()


async def test_past_the_end_are_zeros(path: Path) -> None:
    content = path.read_bytes()
    storage = FileStorage(path, read_only=True)
    assert await read(storage, MIB - 10, 30) == content[-10:] + bytes(20)
    assert await read(storage, 5 * MIB, 30) == bytes(30)
    buffer = memoryview(bytearray(b"\xee" * 30))
    await storage.read(MIB - 10, buffer)
    assert bytes(buffer) == content[-10:] + bytes(20)
    await storage.close()


async def test_cold_data_is_not_waited_for_inline(tmp_path: Path) -> None:
    path = Path.cwd() / ".pytest_cache" / f"cold-{os.getpid()}"
    content = os.urandom(MIB)
    path.write_bytes(content)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        storage = FileStorage(path)
        buffer = memoryview(bytearray(4096))
        assert not storage.try_read(512 * 1024, buffer)
        await storage.read(512 * 1024, buffer)
        assert bytes(buffer) == content[512 * 1024 : 516 * 1024]
        assert storage.try_read(512 * 1024, buffer)
        assert await read(storage, 0, MIB) == content
        await storage.close()
    finally:
        path.unlink()


async def test_ranges_are_flushed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = FileStorage(path)
    whole: list[str] = []

    async def flush() -> None:
        whole.append("flush")

    monkeypatch.setattr(storage, "flush", flush)
    for offset, length in ((0, 1), (4095, 2), (MIB - 512, 512), (5, MIB - 10)):
        assert storage.try_write(offset, os.urandom(length))
        await storage.flush_range(offset, length)
    assert not whole
    # Where a file can't be mapped (some file systems in user space), all is flushed.
    monkeypatch.setattr(mapped, "_mmap", lambda *_: mapped._FAILED)
    for _ in range(2):
        await storage.flush_range(0, 512)
    assert whole == ["flush"] * 2
    await storage.close()


async def test_flushing_a_range_of_a_closed_file_fails(path: Path) -> None:
    storage = FileStorage(path)
    await storage.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        await storage.flush_range(0, 512)


async def test_writes_both_ways_and_grows(path: Path) -> None:
    model = bytearray(path.read_bytes())
    storage = FileStorage(path)
    assert storage.try_write(100, b"abc" * 100)
    model[100:400] = b"abc" * 100
    await storage.write(5000, memoryview(b"xyz" * 3))
    model[5000:5009] = b"xyz" * 3
    await storage.write(6000, bytearray(b"durable"), durable=True)
    model[6000:6007] = b"durable"
    assert storage.try_write(MIB + 5, b"tail")
    model += bytes(5) + b"tail"
    assert storage.size == MIB + 9
    await storage.write(MIB + 9, b"more")
    model += b"more"
    assert storage.size == MIB + 13
    await storage.flush()
    await storage.close()
    assert path.read_bytes() == model


async def test_large_transfers_are_left_to_a_thread(path: Path) -> None:
    storage = FileStorage(path)
    large = bytes(INLINE_LIMIT + 1)
    assert not storage.try_write(0, large)
    assert not storage.try_read(0, memoryview(bytearray(large)))
    await storage.close()


async def test_truncate_both_ways(path: Path) -> None:
    content = path.read_bytes()
    storage = FileStorage(path)
    await storage.truncate(2 * MIB)
    assert storage.size == 2 * MIB
    await storage.truncate(1000)
    assert storage.size == 1000
    await storage.truncate(2000)
    assert await read(storage, 0, 2000) == content[:1000] + bytes(1000)
    await storage.close()
    assert path.stat().st_size == 2000


async def test_punch_gives_storage_back(path: Path) -> None:
    model = bytearray(path.read_bytes())
    storage = FileStorage(path)
    await storage.flush()
    before = path.stat().st_blocks
    await storage.zero(64 * 1024, 128 * 1024, unmap=True)
    model[64 * 1024 : 192 * 1024] = bytes(128 * 1024)
    await storage.punch(MIB - 4096, MIB)
    model[MIB - 4096 :] = bytes(4096)
    await storage.zero(1, 3, unmap=True)
    model[1:4] = bytes(3)
    assert await read(storage, 0, MIB) == model
    assert storage.size == MIB
    assert path.stat().st_blocks <= before - (128 + 4) * 2
    assert await storage.extents(0, MIB) == [
        (64 * 1024, True),
        (128 * 1024, False),
        (MIB - 196 * 1024, True),
        (4096, False),
    ]
    assert await storage.extents(60 * 1024, 100 * 1024, max_extents=1) == [(4096, True)]
    assert await storage.extents(70 * 1024, 4096) == [(4096, False)]
    await storage.close()


async def test_a_large_punch_goes_through_a_thread(path: Path) -> None:
    storage = FileStorage(path)
    await storage.truncate(8 * MIB)
    await storage.punch(0, 8 * MIB)
    assert await storage.extents(0, 8 * MIB) == [(8 * MIB, False)]
    await storage.close()


async def test_zero_range_keeps_storage_or_says_no() -> None:
    path = Path.cwd() / ".pytest_cache" / f"zero-{os.getpid()}"
    storage = created(path, 0)
    try:
        await storage.write(0, b"x" * MIB)
        await storage.flush()
        before = path.stat().st_blocks
        await storage.zero(4096, 65536, unmap=False)
        assert await read(storage, 4096, 65536) == bytes(65536)
        assert path.stat().st_blocks >= before
    finally:
        await storage.close()
        path.unlink()


async def test_tmpfs_has_no_zero_range() -> None:
    path = Path("/dev/shm") / f"nbdserve-zero-{os.getpid()}"
    storage = created(path, MIB)
    try:
        for _ in range(2):
            with pytest.raises(OSError, match="not supported") as error:
                await storage.zero(0, 4096, unmap=False)
            assert error.value.errno == errno.EOPNOTSUPP
        await storage.zero(0, 4096, unmap=True)
    finally:
        await storage.close()
        path.unlink()


async def test_many_extents_let_others_run() -> None:
    path = Path("/dev/shm") / f"nbdserve-extents-{os.getpid()}"
    storage = created(path, 8 * MIB)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    try:
        for offset in range(0, 8 * MIB, 8192):
            storage.try_write(offset, b"x")
        task = asyncio.create_task(other())
        extents = await storage.extents(0, 8 * MIB)
        task.cancel()
        assert extents == [(4096, True), (4096, False)] * 1024
        assert turns >= 7
    finally:
        await storage.close()
        path.unlink()


@pytest.mark.parametrize("punches", [1, 1000])
async def test_what_is_punched_between_two_looks_is_no_empty_extent(
    path: Path, monkeypatch: pytest.MonkeyPatch, punches: int
) -> None:
    half = MIB // 2
    content = path.read_bytes()
    storage = FileStorage(path)
    seek = os.lseek
    punched = 0

    def busy_seek(fd: int, position: int, how: int) -> int:
        nonlocal punched
        if position >= half:
            return seek(fd, position, how)
        if how == os.SEEK_DATA and 0 < punched < punches:
            os.pwrite(fd, content[:half], 0)
        found = seek(fd, position, how)
        if how == os.SEEK_DATA and punched < punches:
            punched += 1
            mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
            file_module._fallocate(fd, mode, 0, half)
        return found

    monkeypatch.setattr(os, "lseek", busy_seek)
    extents = await storage.extents(0, MIB)
    monkeypatch.undo()
    await storage.close()
    if punches == 1:
        assert extents == [(half, False), (half, True)]
    else:
        assert extents == [(MIB, True)]


async def test_read_only_refuses_every_change(path: Path) -> None:
    content = path.read_bytes()
    storage = FileStorage(path, read_only=True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        storage.try_write(0, b"x")
    with pytest.raises(OSError, match="Bad file descriptor"):
        await storage.write(0, b"x")
    with pytest.raises(OSError, match="Bad file descriptor"):
        await storage.zero(0, 4096, unmap=True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        await storage.truncate(0)
    await storage.close()
    assert path.read_bytes() == content


async def test_closing_waits_for_threads_and_ends_all_use(path: Path) -> None:
    storage = FileStorage(path)
    await storage.prefetch(0, MIB)
    writes = [
        asyncio.create_task(storage.write(i * 4096, b"w" * 4096)) for i in range(20)
    ]
    await asyncio.sleep(0)
    await storage.close()
    await asyncio.gather(*writes)
    assert path.read_bytes()[: 20 * 4096] == b"w" * 20 * 4096
    with pytest.raises(OSError, match="Bad file descriptor"):
        storage.try_read(0, memoryview(bytearray(1)))
    with pytest.raises(OSError, match="Bad file descriptor"):
        await storage.flush()
    await storage.close()


async def test_throttled_writes_move_to_threads(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_end_s, second_start_s = 100.2, 100.2 + PAUSE_S + 0.1
    clock = iter(
        [
            # a stall, what comes within the pause, and the attempt after it: stalls too
            *(100.0, first_end_s, first_end_s + PAUSE_S / 2),
            *(second_start_s, second_start_s + 0.2),
            # now the pause is twice as long
            second_start_s + 0.2 + PAUSE_S * 1.5,
        ]
    )
    monkeypatch.setattr("nbdserve.storage.file.perf_counter", lambda: next(clock))
    storage = FileStorage(path)
    assert storage.try_write(0, b"slow")
    assert not storage.try_write(0, b"next")
    assert storage.try_write(0, b"then")
    assert not storage.try_write(0, b"again")
    await storage.close()


def test_pace_forgives_rare_stalls() -> None:
    pace = Pace()
    now_s = 10.0
    for _ in range(100):
        pace.stalled(now_s, now_s + STALL_S * 2)
        now_s += 1.0
    assert pace.resume_at_s == 0.0
    for _ in range(int(BUDGET_S / (STALL_S * 2)) + 1):
        assert pace.resume_at_s == 0.0
        pace.stalled(now_s, now_s + STALL_S * 2)
        now_s += 0.01
    assert pace.resume_at_s > now_s


async def test_another_call_with_the_descriptor(path: Path) -> None:
    storage = FileStorage(path)
    assert await storage.call(lambda fd: os.pwrite(fd, b"more", MIB)) == 4
    assert storage.size == MIB + 4
    await storage.close()


async def test_without_nowait_slow_reads_move_to_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first_end_s, second_start_s = 100.2, 100.2 + PAUSE_S + 0.1
    clock = iter(
        [
            # a stall, what comes within the pause, and the attempt after it: stalls too
            *(100.0, first_end_s, first_end_s + PAUSE_S / 2),
            *(second_start_s, second_start_s + 0.2),
            # now the pause is twice as long
            second_start_s + 0.2 + PAUSE_S * 1.5,
        ]
    )
    monkeypatch.setattr("nbdserve.storage.file.perf_counter", lambda: next(clock))
    path = Path("/dev/shm") / f"nbdserve-slow-{os.getpid()}"
    storage = created(path, MIB)
    buffer = memoryview(bytearray(512))
    assert storage.try_read(0, buffer)
    assert not storage.try_read(0, buffer)
    assert storage.try_read(0, buffer)
    await storage.close()
    path.unlink()


async def test_slow_punches_move_to_threads(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 100.2, 100.2 + PAUSE_S / 2])
    monkeypatch.setattr("nbdserve.storage.file.perf_counter", lambda: next(clock))
    storage = FileStorage(path)
    await storage.punch(0, 4096)
    punching = storage.punch(4096, 4096)
    assert punching.send(None) is not None  # it waits for a thread
    punching.close()
    await storage.close()
    assert path.read_bytes()[:8192] == bytes(8192)


async def test_empty_ranges(path: Path) -> None:
    storage = FileStorage(path)
    assert storage.try_read(0, memoryview(bytearray()))
    assert storage.try_write(0, b"")
    await storage.zero(0, 0, unmap=True)
    assert await storage.extents(0, 0) == []
    assert storage.size == MIB
    await storage.close()


class TestOpening:
    """What a person gets wrong."""

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"nofile\.img: No such file"):
            FileStorage(tmp_path / "nofile.img")

    def test_directory(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"is a directory, not a file"):
            FileStorage(tmp_path)

    def test_fifo(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(ConfigError, match=r"fifo: is a FIFO, not a file"):
            FileStorage(tmp_path / "fifo")

    def test_socket(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / "sock"))
            with pytest.raises(ConfigError, match=r"sock: is a socket, not a file"):
                FileStorage(tmp_path / "sock", read_only=True)

    def test_character_device(self) -> None:
        with pytest.raises(ConfigError, match=r"/dev/zero: is a character device"):
            FileStorage("/dev/zero", read_only=True)

    def test_name_with_newline_and_raw_bytes(self, tmp_path: Path) -> None:
        name = os.fsdecode(os.fsencode(tmp_path) + b"/a\nb\xff")
        with pytest.raises(ConfigError) as error:
            FileStorage(name)
        assert str(error.value).endswith(r"/a\nb\xff: No such file or directory")

    def test_name_with_nul(self) -> None:
        with pytest.raises(ConfigError, match="null byte"):
            FileStorage("a\0b")

    def test_no_permission(self, tmp_path: Path) -> None:
        path = tmp_path / "secret.img"
        path.write_bytes(b"x")
        path.chmod(0)
        program = (
            "import os, sys\n"
            "from nbdserve.storage.file import FileStorage\n"
            "os.chdir(sys.argv[1]); os.setgroups([]); os.setuid(65534)\n"
            "try: FileStorage('secret.img')\n"
            "except Exception as error: print(type(error).__name__, error)\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout == "ConfigError secret.img: Permission denied\n"


class TestBlockDevice:
    """A loop device behaves as a disk of fixed size."""

    @pytest.fixture
    def device(self, tmp_path: Path) -> Iterator[Path]:
        (tmp_path / "backing").write_bytes(os.urandom(MIB))
        result = subprocess.run(
            ["losetup", "-f", "--show", tmp_path / "backing"],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            pytest.fail(f"needs root and loop devices: {result.stderr.strip()}")
        yield Path(result.stdout.strip())
        subprocess.run(["losetup", "-d", result.stdout.strip()], check=True)

    async def test_reads_writes_and_discards(self, device: Path) -> None:
        model = bytearray(device.read_bytes())
        storage = FileStorage(device)
        assert stat.S_ISBLK(device.stat().st_mode)
        assert storage.size == MIB
        assert storage.fixed_size
        assert not storage.zeroes_on_extend
        assert storage.try_write(513, b"odd")
        model[513:516] = b"odd"
        await storage.write(9000, b"durable", durable=True)
        model[9000:9007] = b"durable"
        await storage.zero(16384 + 1, 20000, unmap=True)
        model[16385:36385] = bytes(20000)
        await storage.zero(40961, 5, unmap=True)
        model[40961:40966] = bytes(5)
        await storage.zero(65536, 8192, unmap=False)
        model[65536:73728] = bytes(8192)
        assert await read(storage, 0, MIB) == model
        assert await storage.extents(100, 5000) == [(5000, True)]
        await storage.flush()
        await storage.close()
        assert device.read_bytes() == model

    async def test_size_is_fixed(self, device: Path) -> None:
        storage = FileStorage(device)
        with pytest.raises(OSError, match="fixed size"):
            await storage.truncate(2 * MIB)
        with pytest.raises(OSError, match="No space left"):
            storage.try_write(MIB, b"x")
        assert await read(storage, MIB - 1, 10) == device.read_bytes()[-1:] + bytes(9)
        await storage.close()


class TestExecutor:
    """The threads for calls that wait."""

    async def test_result_and_error_come_back(self) -> None:
        assert await executor.run(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await executor.run(divmod, 7, 0)

    async def test_cancelling_waits_for_the_call(self) -> None:
        reader, writer = os.pipe()

        async def request() -> bytes:
            return await executor.run(os.read, reader, 10)

        task = asyncio.create_task(request())
        await asyncio.sleep(0)
        task.cancel()
        for _ in range(3):
            await asyncio.sleep(0)
        assert not task.done()
        os.write(writer, b"x")
        with pytest.raises(asyncio.CancelledError):
            await task
        os.close(reader)
        os.close(writer)

    def test_a_hung_call_does_not_keep_the_process(self) -> None:
        program = (
            "import asyncio, os\n"
            "from nbdserve.storage.executor import run\n"
            "async def main():\n"
            "    run(os.read, os.pipe()[0], 1)\n"
            "asyncio.run(main())\n"
        )
        subprocess.run([sys.executable, "-c", program], check=True, timeout=20)

    def test_a_forked_child_has_threads_of_its_own(self) -> None:
        program = (
            "import asyncio, os\n"
            "from nbdserve.storage.executor import run\n"
            "async def main(): return await run(abs, -7)\n"
            "assert asyncio.run(main()) == 7\n"
            "child = os.fork()\n"
            "if child == 0: os._exit(asyncio.run(main()))\n"
            "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
        )
        subprocess.run([sys.executable, "-c", program], check=True, timeout=20)
