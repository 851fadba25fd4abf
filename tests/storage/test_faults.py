"""The instruments for fault and crash tests are right themselves."""

import asyncio
import errno

import pytest

from nbdserve.storage.faults import (
    ALL_CALLS,
    Fault,
    FaultyStorage,
    Recording,
    RecordingStorage,
)
from nbdserve.storage.memory import MemoryStorage


async def workload(storage: FaultyStorage) -> None:
    storage.try_write(0, b"first")
    await storage.write(10, b"second")
    await storage.flush()
    await storage.zero(0, 2, unmap=True)
    await storage.truncate(100)


async def test_each_call_can_fail() -> None:
    counting = FaultyStorage(MemoryStorage())
    await workload(counting)
    assert counting.calls == 5
    for k in range(counting.calls):
        storage = FaultyStorage(MemoryStorage(), Fault(at=k, error=errno.ENOSPC))
        with pytest.raises(OSError, match="No space left") as caught:
            await workload(storage)
        assert caught.value.errno == errno.ENOSPC
        assert storage.failed == [["write", "write", "flush", "zero", "truncate"][k]]


async def test_reads_fail_only_when_asked() -> None:
    storage = FaultyStorage(MemoryStorage(b"abc"), Fault(at=0))
    assert storage.try_read(0, memoryview(bytearray(3)))
    storage.fault = Fault(at=0, kinds=ALL_CALLS)
    with pytest.raises(OSError, match="Input/output"):
        storage.try_read(0, memoryview(bytearray(3)))
    storage.fault = Fault(at=1, kinds=frozenset({"extents"}))
    with pytest.raises(OSError, match="Input/output"):
        await storage.extents(0, 3)


@pytest.mark.parametrize("inline", [True, False])
async def test_short_write_and_lasting_fault(inline: bool) -> None:
    inner = MemoryStorage(b"......")
    storage = FaultyStorage(inner, Fault(at=0, written=2, lasting=True))

    async def write() -> None:
        if inline:
            storage.try_write(0, b"abcdef")
        else:
            await storage.write(0, b"abcdef")

    for _ in range(2):
        with pytest.raises(OSError, match="Input/output"):
            await write()
    assert inner.content() == b"ab...."
    with pytest.raises(OSError, match="Input/output"):
        await storage.flush()


async def test_suspending_refuses_inline_calls() -> None:
    storage = FaultyStorage(MemoryStorage(b"abc"), suspending=True)
    buffer = memoryview(bytearray(3))
    assert not storage.try_read(0, buffer)
    assert not storage.try_write(0, b"x")
    assert storage.calls == 0
    reading = storage.read(0, buffer)
    assert reading.send(None) is None  # it waits
    with pytest.raises(StopIteration):
        reading.send(None)
    assert bytes(buffer) == b"abc"


async def test_recording_tells_what_a_flush_covers() -> None:
    storage = RecordingStorage(MemoryStorage(), suspending=True)
    await storage.write(0, b"covered")
    storage.mark("acknowledged")
    flushing = asyncio.create_task(storage.flush())
    writing = asyncio.create_task(storage.write(512, b"beside"))
    await asyncio.gather(flushing, writing)
    await storage.zero(0, 3, unmap=True)
    await storage.zero(3, 3, unmap=False)
    await storage.truncate(99)
    await storage.write(8, b"now", durable=True)
    kinds = [operation.kind for operation in storage.operations]
    assert kinds == [
        "write", "mark", "flush", "write", "punch", "zero", "truncate", "write",
    ]  # fmt: skip
    covered, mark, flush, beside, punch, zero, truncate, durable = storage.operations
    assert covered.data == b"covered"
    assert mark.label == "acknowledged"
    assert covered.end is not None
    assert flush.end is not None
    assert beside.end is not None
    assert covered.end < flush.begin < beside.begin < flush.end < beside.end
    assert (punch.offset, punch.length) == (0, 3)
    assert (zero.offset, zero.length) == (3, 3)
    assert truncate.offset == 99
    assert durable.durable


async def test_recording_notes_failures_and_shares_a_clock() -> None:
    recording = Recording()
    faulty = FaultyStorage(MemoryStorage(), Fault(at=0, lasting=True))
    one = RecordingStorage(faulty, recording=recording)
    two = RecordingStorage(MemoryStorage(), recording=recording)
    with pytest.raises(OSError, match="Input/output"):
        one.try_write(0, b"x")
    with pytest.raises(OSError, match="Input/output"):
        await one.flush()
    assert two.try_write(0, b"y")
    failed, flush, written = recording.operations
    assert (failed.error, failed.end) == (errno.EIO, None)
    assert (flush.error, flush.end) == (errno.EIO, None)
    assert written.end == written.begin + 1
    faulty.suspending = True
    assert not one.try_write(0, b"z")
    assert len(recording.operations) == 3
