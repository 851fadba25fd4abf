"""Compressed clusters: exact size or an error, bounded memory, one inflate for everyone."""

import asyncio
import random
import sys
import threading
import zlib
from pathlib import Path

import pytest

from nbdserve.errors import ImageCorruptError
from nbdserve.formats.mapped import inflate as module
from nbdserve.formats.mapped.inflate import inflate, unzstd
from nbdserve.storage.faults import Fault
from tests.helpers.engine import Disk, convert, open_bytes

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SIZE = 4096
DATA = random.Random(3).randbytes(64) * (SIZE // 64)


def deflated(data: bytes, window: int = -12) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, window, 9)
    return compressor.compress(data) + compressor.flush()


@pytest.fixture(params=["whole clusters first", "streams only"])
def decoders(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library for whole clusters, and on processors it has no wheel for."""
    if request.param == "streams only":
        monkeypatch.setattr(module, "_whole", None)
    else:
        assert module._whole is not None


pytestmark = pytest.mark.usefixtures("decoders")


def test_a_stream_may_be_longer_than_a_cluster_and_have_no_end() -> None:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -12, 9)
    endless = compressor.compress(DATA) + compressor.flush(zlib.Z_SYNC_FLUSH)
    assert inflate(endless, SIZE) == DATA
    assert inflate(deflated(DATA + b"more"), SIZE) == DATA


@pytest.mark.parametrize("window", [-9, -12, -15])
def test_any_window_is_read(window: int) -> None:
    assert inflate(deflated(DATA, window), SIZE) == DATA


@pytest.mark.parametrize("tail", [b"", b"\0" * 100, b"garbage"])
def test_what_follows_the_data_is_ignored(tail: bytes) -> None:
    assert inflate(deflated(DATA) + tail, SIZE) == DATA
    assert unzstd(zstd.compress(DATA) + tail, SIZE) == DATA


def test_zstd_in_several_frames() -> None:
    frames = b"".join(
        zstd.compress(DATA[start : start + 1000]) for start in range(0, SIZE, 1000)
    )
    assert unzstd(frames + b"tail", SIZE) == DATA
    empty = zstd.compress(b"")
    assert unzstd(empty + frames, SIZE) == DATA


@pytest.mark.parametrize(
    "bad",
    [b"", b"\xff" * 50, deflated(DATA)[:-4], deflated(DATA[:-1]), b"\x03\x00"],
    ids=["nothing", "garbage", "cut", "a byte short", "empty stream"],
)
def test_bad_deflate_data(bad: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        inflate(bad, SIZE)


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"\xff" * 50,
        zstd.compress(DATA)[:-4],
        zstd.compress(DATA[:-1]),
        zstd.compress(b""),
        zstd.compress(b"") * 3,
        zstd.compress(DATA[:100]) + b"garbage, not a frame",
    ],
    ids=["nothing", "garbage", "cut", "short", "empty", "empties", "then garbage"],
)
def test_bad_zstd_data(bad: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        unzstd(bad, SIZE)


def test_a_bomb_gives_no_more_than_a_cluster() -> None:
    """Both formats may go on for a gigabyte: what does not fit is never made."""
    bomb = bytes(64 << 20)
    assert inflate(deflated(bomb), SIZE) == bytes(SIZE)
    assert unzstd(zstd.compress(bomb), SIZE) == bytes(SIZE)


# -- in an image


@pytest.fixture(params=["qcow", "qcow2"])
async def compressed(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    content = DATA * 64
    fmt: str = request.param
    path = convert(tmp_path, content, fmt=fmt, compressed=True)
    disk = await open_bytes(tmp_path, path.read_bytes(), fmt=fmt, suspending=True)
    disk.model[:] = content
    return disk


class Counter:
    """Counts how often a cluster is decompressed, and by which threads."""

    def __init__(self, disk: Disk) -> None:
        self.calls = 0
        self.threads: set[int] = set()
        inflater = disk.image._reader._inflater
        self._real = inflater._decompress
        inflater._decompress = self

    def __call__(
        self, data: bytes | bytearray | memoryview, size: int
    ) -> bytes | bytearray:
        self.calls += 1
        self.threads.add(threading.get_ident())
        return self._real(data, size)


@pytest.mark.parametrize("inline", [0, 2 << 20])
async def test_one_inflate_per_cluster_whoever_waits(
    compressed: Disk, inline: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_INLINE", inline)
    counter = Counter(compressed)
    reads = await asyncio.gather(
        *(compressed.image.read(number * 64, 64) for number in range(40))
    )
    assert b"".join(reads) == DATA[: 40 * 64]
    assert counter.calls == 1
    await compressed.image.read(100, 10)
    assert counter.calls == 1, "kept for the neighbours"
    on_loop = threading.get_ident() in counter.threads
    assert on_loop == bool(inline), "large clusters are for a thread"
    await compressed.image.close()


async def test_a_cluster_is_kept_if_only_a_part_of_it_was_read(tmp_path: Path) -> None:
    path = convert(tmp_path, DATA * 64, compressed=True)
    disk = await open_bytes(tmp_path, path.read_bytes())
    counter = Counter(disk)
    size = disk.image._parts.geometry.cluster_size
    whole = (DATA * 64)[:size]
    for calls in (1, 2):
        assert await disk.image.read(0, size) == whole
        assert counter.calls == calls, "nobody comes back for it"
    for _ in range(2):
        assert await disk.image.read(size + 100, 10) == whole[100:110]
    assert counter.calls == 3
    assert await disk.image.read(size, size) == whole
    assert counter.calls == 3, "what is there is used"
    await disk.image.close()


async def test_clusters_are_kept_within_bounds(
    compressed: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Counter(compressed)
    inflater = compressed.image._reader._inflater
    monkeypatch.setattr(inflater, "_most", 2)
    assert module._CACHE_BYTES <= 64 << 20
    await compressed.assert_content()
    await compressed.assert_content()
    clusters = -(
        -len(compressed.model) // compressed.image._parts.geometry.cluster_size
    )
    if clusters > 2:
        assert counter.calls == 2 * clusters
    assert len(inflater._kept) <= 2
    await compressed.image.close()


async def test_whoever_waits_for_a_failed_read_tries_again(compressed: Disk) -> None:
    await compressed.image.cache(0, 10)  # the L2 table is in memory now
    compressed.storage.fault = Fault(at=0, kinds=frozenset({"read"}))
    results = await asyncio.gather(
        *(compressed.image.read(0, 64) for _ in range(4)), return_exceptions=True
    )
    assert sum(isinstance(each, OSError) for each in results) == 1
    assert sum(each == DATA[:64] for each in results) == 3
    await compressed.image.close()


async def test_bad_data_fail_every_reader_with_one_line(compressed: Disk) -> None:
    def bad(data: bytes | bytearray | memoryview, size: int) -> bytes:
        raise ValueError("no such thing")

    compressed.image._reader._inflater._decompress = bad
    for _ in range(2):
        results = await asyncio.gather(
            *(compressed.image.read(0, 64) for _ in range(3)), return_exceptions=True
        )
        assert [type(each) for each in results] == [ImageCorruptError] * 3
    await compressed.image.close()


async def test_an_overwritten_compressed_cluster_is_not_read_from_memory(
    compressed: Disk,
) -> None:
    await compressed.assert_content()
    await compressed.write(10, b"new")
    await compressed.assert_content()
    size = compressed.image._parts.geometry.cluster_size
    await compressed.write(size, b"n" * size)
    await compressed.assert_content()
    await compressed.close_and_check()


async def test_nothing_is_used_again_while_somebody_may_still_read_it(
    compressed: Disk,
) -> None:
    """The first reader fails, the second one, who waited for it, reads the same bytes.

    Meanwhile the cluster is overwritten, and that is durable: but for the reader, its
    place could be punched and given to others.
    """
    image = compressed.image
    await image.cache(0, 10)  # the L2 table is in memory now
    inflater = image._reader._inflater
    load, turns = inflater._load, [asyncio.Event(), asyncio.Event()]
    loads = 0

    async def slowly(word: int) -> bytes | bytearray:
        nonlocal loads
        loads += 1
        number = loads
        await turns[number - 1].wait()
        if number == 1:
            raise OSError(5, "the first one fails")
        return await load(word)

    inflater._load = slowly  # type: ignore[method-assign]
    first = asyncio.create_task(image.read(0, 64))
    second = asyncio.create_task(image.read(64, 64))
    await asyncio.sleep(0)
    size = image._parts.geometry.cluster_size
    await compressed.write(0, b"n" * size)
    await image.flush()
    turns[0].set()
    assert isinstance((await asyncio.gather(first, return_exceptions=True))[0], OSError)
    # enough to use up what is free, and to look for more
    for offset in range(size, len(compressed.model), size):
        await compressed.write(offset, b"o" * size)
    await image.flush()
    turns[1].set()
    assert await second == DATA[:64]
    await compressed.assert_content()
    await compressed.close_and_check()
