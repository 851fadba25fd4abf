"""A raw disk: bytes, holes, zeros, and what is durable."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.block.extents import Extent
from nbdserve.errors import RequestError
from nbdserve.formats.create import create_image
from nbdserve.formats.open import open_image
from nbdserve.formats.raw import RawImage
from nbdserve.storage.base import Storage
from nbdserve.storage.faults import Fault, FaultyStorage, RecordingStorage
from nbdserve.storage.file import FileStorage
from nbdserve.storage.memory import MemoryStorage

MIB = 1 << 20
SIZE = 3 * MIB + 777


@pytest.fixture(params=["disk", "tmpfs", "memory", "suspending"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """Everything a raw image may lie on."""
    if request.param == "memory":
        yield MemoryStorage(size=SIZE)
        return
    if request.param == "suspending":
        yield RecordingStorage(MemoryStorage(size=SIZE), suspending=True)
        return
    folder = tmp_path if request.param == "disk" else Path("/dev/shm")
    path = folder / f"nbdserve-raw-{os.getpid()}.img"
    path.touch()
    os.truncate(path, SIZE)
    yield FileStorage(path)
    path.unlink()


async def test_every_call_as_a_user_sees_it(storage: Storage) -> None:
    image = RawImage(storage)
    assert image.size == SIZE
    model = bytearray(SIZE)

    await image.write(SIZE - 3, b"end")
    model[-3:] = b"end"
    await image.write(1000, b"hello" * 1000)
    model[1000:6000] = b"hello" * 1000
    await image.write(8 * 4096, memoryview(b"f" * 4096), fua=True)
    model[8 * 4096 : 9 * 4096] = b"f" * 4096
    await image.write_zeroes(2000, 3000)
    model[2000:5000] = bytes(3000)
    await image.write_zeroes(5500, 10, may_unmap=False, fua=True)
    model[5500:5510] = bytes(10)
    await image.flush()
    assert await image.read(0, SIZE) == model
    assert await image.read(1999, 2) == b"o\0"

    await image.trim(8 * 4096, 4096, fua=True)
    assert await image.read(8 * 4096, 4096) == bytes(4096)
    await image.cache(0, SIZE)
    await image.close()


async def test_holes(storage: Storage) -> None:
    image = RawImage(storage)
    await image.write(MIB, b"d" * 65536)
    await image.flush()
    extents = await image.block_status(0, SIZE)
    assert extents == [
        Extent(MIB, data=False, zero=True, offset=0),
        Extent(65536, data=True, zero=False, offset=MIB),
        Extent(SIZE - MIB - 65536, data=False, zero=True, offset=MIB + 65536),
    ]
    assert await image.block_status(0, SIZE, max_extents=1) == extents[:1]
    assert await image.block_status(MIB - 10, 30) == [
        Extent(10, data=False, zero=True, offset=MIB - 10),
        Extent(20, data=True, zero=False, offset=MIB),
    ]

    buffer = bytearray(b"\xee" * 2 * MIB)
    assert list(await image.read_into(0, memoryview(buffer))) == [(0, MIB)]
    assert buffer == bytes(MIB) + b"d" * 65536 + bytes(MIB - 65536)
    buffer = bytearray(b"\xee" * MIB)
    assert list(await image.read_into(0, memoryview(buffer))) == [(0, MIB)]
    assert buffer == bytes(MIB)
    assert list(await image.read_into(MIB, memoryview(buffer))) == []
    small = bytearray(b"\xee" * 4096)
    assert list(await image.read_into(0, memoryview(small))) == []
    assert small == bytes(4096)
    await image.close()


steps = st.lists(
    st.tuples(
        st.sampled_from(["write", "fua", "zero", "nohole", "trim"]),
        st.integers(0, 70000),
        st.integers(0, 70000),
    ),
    max_size=10,
)


@given(steps, st.booleans())
async def test_same_as_a_bytearray(
    actions: list[tuple[str, int, int]], suspending: bool
) -> None:
    size = 70001
    inner = MemoryStorage(b"\x01" * size)
    image = RawImage(RecordingStorage(inner, suspending=suspending))
    model = bytearray(b"\x01" * size)
    for number, (what, start, asked) in enumerate(actions, 2):
        length = min(asked, size - start)
        if what in ("write", "fua"):
            await image.write(start, bytes([number]) * length, fua=what == "fua")
            model[start : start + length] = bytes([number]) * length
        elif what == "trim":
            await image.trim(start, length)
            model[start : start + length] = bytes(length)
        else:
            await image.write_zeroes(start, length, may_unmap=what == "zero")
            model[start : start + length] = bytes(length)
    assert await image.read(0, size) == model
    assert inner.size == size


async def test_no_quick_zeros_means_writing_them_or_enotsup() -> None:
    inner = MemoryStorage(b"x" * (2 * MIB + 5))
    fault = Fault(at=0, error=errno.EOPNOTSUPP, kinds=frozenset({"zero"}), lasting=True)
    image = RawImage(FaultyStorage(inner, fault))
    with pytest.raises(RequestError, match="no quick way") as error:
        await image.write_zeroes(0, 10, fast_only=True)
    assert error.value.errno == errno.ENOTSUP
    assert inner.content() == b"x" * (2 * MIB + 5)
    await image.write_zeroes(1, 2 * MIB)
    assert inner.content() == b"x" + bytes(2 * MIB) + b"xxxx"
    await image.trim(2 * MIB, 5)  # advice that can't be followed is no error
    await image.close()


async def test_any_other_error_of_zeros_and_trim_is_the_answer() -> None:
    fault = Fault(at=0, error=errno.ENOSPC, kinds=frozenset({"zero"}), lasting=True)
    image = RawImage(FaultyStorage(MemoryStorage(b"x" * 100), fault))
    with pytest.raises(OSError, match="No space"):
        await image.write_zeroes(0, 10)
    with pytest.raises(OSError, match="No space"):
        await image.trim(0, 10)
    await image.close()


async def test_a_failed_write_is_not_the_end() -> None:
    storage = FaultyStorage(MemoryStorage(size=4096), Fault(at=0, error=errno.ENOSPC))
    image = RawImage(storage)
    with pytest.raises(OSError, match="No space"):
        await image.write(0, b"x", fua=True)
    await image.write(0, b"x", fua=True)
    await image.close()


@pytest.mark.parametrize("via", ["flush", "fua", "close"])
async def test_after_a_failed_sync_nothing_is_acknowledged(via: str) -> None:
    inner = MemoryStorage(size=4096)
    storage = FaultyStorage(inner)
    image = RawImage(storage)
    if via == "flush":
        storage.fault = Fault(at=0)
        with pytest.raises(OSError, match="Input/output"):
            await image.flush()
    elif via == "fua":
        storage.fault = Fault(at=1)
        with pytest.raises(OSError, match="Input/output"):
            await image.write(0, b"x", fua=True)
    else:
        storage.fault = Fault(at=0)
        with pytest.raises(OSError, match="Input/output"):
            await image.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            inner.try_read(0, memoryview(bytearray(1)))
        return
    for call in (
        image.write(0, b"y"),
        image.write_zeroes(0, 5),
        image.trim(0, 5),
        image.flush(),
    ):
        with pytest.raises(OSError, match="an earlier sync failed") as error:
            await call
        assert error.value.errno == errno.EIO
    assert await image.read(0, 1) in (b"x", b"\0")
    await image.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        inner.try_read(0, memoryview(bytearray(1)))


async def test_durable_means_synced_before_the_answer() -> None:
    storage = RecordingStorage(MemoryStorage(size=4096))
    image = RawImage(storage)
    await image.write(0, b"x", fua=True)
    assert storage.operations[-1].durable
    for call in (
        image.write_zeroes(0, 512, fua=True),
        image.trim(0, 512, fua=True),
    ):
        await call
        assert storage.operations[-1].kind == "flush"
        assert storage.operations[-1].end is not None
    await image.close()


async def test_writethrough_makes_every_change_durable() -> None:
    storage = RecordingStorage(MemoryStorage(size=4096))
    image = RawImage(storage, writethrough=True)
    await image.write(0, b"x")
    assert storage.operations[-1].durable
    await image.write_zeroes(0, 512)
    assert storage.operations[-1].kind == "flush"
    await image.close()


@pytest.mark.parametrize("on_storage", [True, False])
async def test_read_only(on_storage: bool) -> None:
    inner = MemoryStorage(b"abc", read_only=on_storage)
    image = RawImage(inner, read_only=not on_storage)
    assert image.read_only
    assert not image.can_trim
    for call in (image.write(0, b"x"), image.write_zeroes(0, 1), image.trim(0, 1)):
        with pytest.raises(RequestError, match="is read-only") as error:
            await call
        assert error.value.errno == errno.EPERM
    await image.flush()
    assert await image.read(0, 3) == b"abc"
    await image.close()


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
async def test_ranges_that_leave_the_disk_are_refused(
    tmp_path: Path, format_: str
) -> None:
    path = tmp_path / "disk"
    create_image(path, 4096, format=format_)
    async with open_image(path, format=format_) as image:
        for offset, length in ((-1, 2), (4095, 2), (8192, 1), (4097, 0)):
            with pytest.raises(RequestError, match="not all on a disk of 4096"):
                await image.write(offset, b"x" * length)
            with pytest.raises(RequestError, match="not all on a disk"):
                await image.read(offset, length)
            for change in (image.trim, image.write_zeroes, image.block_status):
                with pytest.raises(RequestError, match="not all on a disk"):
                    await change(offset, length)
        assert await image.read(0, 4096) == bytes(4096)
