"""Compaction: the file gets smaller, the disk stays what it is, whoever writes meanwhile."""

import asyncio
import random
from pathlib import Path

import pytest

from nbdserve.errors import ConfigError, ImageCorruptError
from nbdserve.formats.open import open_image
from nbdserve.formats.qcow2 import compaction
from nbdserve.formats.qcow2.image import Qcow2Image
from tests.helpers.engine import convert, l2_entry_of, make, open_bytes, put64, u64
from tests.helpers.tools import run

KIB = 1 << 10
MIB = 1 << 20
OPTIONS = [
    ("", False),
    ("", True),
    ("compat=0.10", False),
    ("cluster_size=512,refcount_bits=1", True),
    ("cluster_size=4k,refcount_bits=64", False),
    ("cluster_size=4k", True),
    ("cluster_size=2M", False),
]


def content_of(size: int) -> bytes:
    """Return bytes that compress to about half of their size."""
    noise = random.Random(1).randbytes(size // 2)
    return b"".join(
        noise[at : at + 512] + b"text " * 102 + b"  " for at in range(0, size // 2, 512)
    )


async def compacted(path: Path) -> compaction.Compacted:
    async with open_image(path) as image:
        assert isinstance(image, Qcow2Image)
        return await image.compact()


def assert_shows(path: Path, expected: bytes) -> None:
    """Compare with what qemu-img reads, and let it check: no leaks either."""
    raw = path.with_suffix(".raw")
    raw.write_bytes(expected)
    run("qemu-img", "check", path)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, raw)


@pytest.mark.parametrize(("options", "compressed"), OPTIONS)
async def test_free_space_at_the_start(
    tmp_path: Path, options: str, compressed: bool
) -> None:
    size = (24 if "2M" in options else 3) * MIB // (2 if "512" in options else 1)
    content = content_of(size)
    path = convert(tmp_path, content, options=options, compressed=compressed)
    hole = size // 3 // 4096 * 4096
    last = f"discard {2 * hole} {hole}"
    run("qemu-io", "-c", f"discard 0 {hole}", "-c", last, path)
    before = path.stat().st_size
    result = await compacted(path)
    assert result.finished
    assert_shows(
        path, bytes(hole) + content[hole : 2 * hole] + bytes(hole) + content[3 * hole :]
    )
    after = path.stat().st_size
    if not (compressed and "cluster_size=512" in options):
        # no compressed cluster of 512 bytes is smaller than a sector
        assert result.moved
        assert after < before * (0.9 if "2M" in options else 0.55)
        # as small as a new one, but for tables and packing
        copy = tmp_path / "copy.qcow2"
        compress = ["-c"] if compressed else []
        keep = options or "cluster_size=64k"
        run("qemu-img", "convert", "-O", "qcow2", "-o", keep, *compress, path, copy)
        assert after < copy.stat().st_size * 1.35
    again = await compacted(path)
    assert path.stat().st_size == after
    assert not again.moved or compressed


async def test_tables_at_the_end_move_too(tmp_path: Path) -> None:
    """Another size has put L1 table, refcount table and blocks there."""
    content = content_of(MIB)
    path = convert(tmp_path, content * 2, options="cluster_size=512,refcount_bits=64")
    async with open_image(path) as image:
        await image.resize(40 * MIB)
        await image.write(8 * MIB, content)
        await image.trim(0, 2 * MIB)
    async with open_image(path) as image:
        assert isinstance(image, Qcow2Image)
        l1_before = image.header.l1_table_offset
        table_before = image.header.refcount_table_offset
        await image.compact()
        assert image.header.l1_table_offset < l1_before
    async with open_image(path, read_only=True) as image:
        assert isinstance(image, Qcow2Image)
        assert image.header.refcount_table_offset < table_before
    assert path.stat().st_size < 1.4 * MIB
    assert_shows(path, (bytes(8 * MIB) + content).ljust(40 * MIB, b"\0"))


async def test_zero_clusters_do_without_their_place(tmp_path: Path) -> None:
    content = content_of(2 * MIB)
    path = convert(tmp_path, content)
    run("qemu-io", "-c", "discard 0 1M", "-c", "write -z 1536k 512k", path)
    async with open_image(path, read_only=True) as image:
        extents = await image.block_status(1536 * KIB, 512 * KIB)
        assert extents[0].offset is not None, "qemu has kept the clusters"
    await compacted(path)
    assert path.stat().st_size < MIB
    assert_shows(path, bytes(MIB) + content[MIB : 1536 * KIB] + bytes(512 * KIB))


async def test_what_a_snapshot_shares_stays(tmp_path: Path) -> None:
    content = content_of(2 * MIB)
    path = convert(tmp_path, content)
    run("qemu-io", "-c", "discard 0 1M", path)
    run("qemu-img", "snapshot", "-c", "now", path)
    run("qemu-io", "-c", "write -P 1 0 256k", path)
    before = path.stat().st_size
    result = await compacted(path)
    assert result.stays
    assert path.stat().st_size <= before
    shown = b"\1" * 256 * KIB + bytes(768 * KIB) + content[MIB:]
    assert_shows(path, shown)
    run("qemu-img", "snapshot", "-a", "now", path)
    assert_shows(path, bytes(MIB) + content[MIB:])


async def test_over_a_backing_file(tmp_path: Path) -> None:
    content = content_of(MIB)
    base = tmp_path / "base"
    base.write_bytes(content)
    path = tmp_path / "overlay.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path)
    run("qemu-io", "-c", "write -P 1 0 512k", "-c", "write -P 2 768k 128k", path)
    run("qemu-io", "-c", "discard 0 256k", path)
    before = path.stat().st_size
    await compacted(path)
    assert path.stat().st_size < before
    expected = bytes(256 * KIB) + b"\1" * 256 * KIB
    expected += content[512 * KIB : 768 * KIB] + b"\2" * 128 * KIB
    assert_shows(path, expected + content[896 * KIB :])


@pytest.mark.parametrize("options", ["", "cluster_size=4k", "compat=0.10"])
async def test_clients_go_on_meanwhile(
    tmp_path: Path, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes, discards and reads of several clients, each in its part of the disk."""
    monkeypatch.setattr(compaction, "_COMMIT", 128 * KIB)
    monkeypatch.setattr(compaction, "_CUT", 512 * KIB)
    size = 4 * MIB
    model = bytearray(content_of(size))
    path = convert(tmp_path, bytes(model), options=options)
    run("qemu-io", "-c", "discard 0 2M", path)
    model[: 2 * MIB] = bytes(2 * MIB)
    ended = False
    done: compaction.Compacted | None = None

    async with open_image(path) as image:
        assert isinstance(image, Qcow2Image)

        async def client(number: int) -> None:
            chance = random.Random(number)
            start = number * MIB
            while not ended:
                offset = start + chance.randrange(MIB - 70 * KIB)
                length = chance.choice((512, 4096, 70 * KIB))
                pick = chance.random()
                if pick < 0.5:
                    data = chance.randbytes(length)
                    await image.write(offset, data)
                    model[offset : offset + length] = data
                elif pick < 0.6:
                    await image.write_zeroes(offset, length)
                    model[offset : offset + length] = bytes(length)
                elif pick < 0.65:
                    await image.flush()
                else:
                    found = await image.read(offset, length)
                    assert found == model[offset : offset + length]
                await asyncio.sleep(0)

        clients = [asyncio.create_task(client(each)) for each in range(4)]
        for _ in range(3):
            done = await image.compact()
        ended = True
        await asyncio.gather(*clients)
    assert done is not None
    assert_shows(path, bytes(model))


@pytest.mark.parametrize("step", [1, 3, 8, 20])
async def test_it_may_be_interrupted(tmp_path: Path, step: int) -> None:
    content = content_of(2 * MIB)
    path = convert(tmp_path, content, options="cluster_size=4k")
    run("qemu-io", "-c", "discard 0 1M", path)
    async with open_image(path) as image:
        assert isinstance(image, Qcow2Image)
        calls = 0

        def progress(_moved: int, _total: int) -> None:
            nonlocal calls
            calls += 1
            if calls == step:
                work.cancel()

        work = asyncio.create_task(image.compact(progress=progress))
        await asyncio.wait([work])
        assert work.cancelled() or calls < step
        with pytest.raises(ConfigError):
            await asyncio.gather(image.compact(), image.compact())
    assert_shows(path, bytes(MIB) + content[MIB:])


async def test_closing_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "_SPARE", 0)
    content = content_of(4 * MIB)
    path = convert(tmp_path, content, options="cluster_size=4k")
    run("qemu-io", "-c", "discard 0 2M", path)
    image = await open_image(path)
    assert isinstance(image, Qcow2Image)
    work = asyncio.create_task(image.compact(pace=1.0))
    await asyncio.sleep(0.01)
    await image.close()
    assert not (await work).finished
    assert_shows(path, bytes(2 * MIB) + content[2 * MIB :])


async def test_an_entry_that_names_free_space_is_refused(tmp_path: Path) -> None:
    """Cutting the file would lose what lies there."""
    content = content_of(MIB)
    path = convert(tmp_path, content)
    run("qemu-io", "-c", "discard 0 512k", path)
    data = bytearray(path.read_bytes())
    # the refcount of the last data cluster says that it is free
    entry = u64(data, l2_entry_of(data, MIB - 64 * KIB)) & 0x00FF_FFFF_FFFF_FE00
    block = u64(data, u64(data, 48))
    at = block + 2 * (entry >> 16)
    assert data[at : at + 2] == b"\0\1"
    data[at : at + 2] = b"\0\0"
    disk = await open_bytes(tmp_path, bytes(data))
    assert isinstance(disk.image, Qcow2Image)
    with pytest.raises(ImageCorruptError, match="refcount says it is free"):
        await disk.image.compact()
    disk.model[:] = bytes(512 * KIB) + content[512 * KIB :]
    await disk.assert_content()
    await disk.image.close()
    assert len(disk.memory.content()) >= entry + 64 * KIB


async def test_a_cluster_named_twice_stays(tmp_path: Path) -> None:
    """Its refcount is wrong: giving it up for one entry would take it from the other."""
    content = content_of(MIB)
    path = convert(tmp_path, content)
    run("qemu-io", "-c", "discard 0 512k", path)
    data = bytearray(path.read_bytes())
    last = u64(data, l2_entry_of(data, MIB - 64 * KIB))
    put64(data, l2_entry_of(data, 0), last)
    disk = await open_bytes(tmp_path, bytes(data))
    assert isinstance(disk.image, Qcow2Image)
    result = await disk.image.compact()
    assert result.stays
    disk.model[:] = content[-64 * KIB :] + bytes(448 * KIB) + content[512 * KIB :]
    await disk.assert_content()
    await disk.image.close()


async def test_a_new_image_has_nothing_to_move(tmp_path: Path) -> None:
    path = make(tmp_path, 10 * MIB)
    result = await compacted(path)
    assert (result.moved, result.stays, result.finished) == (0, 0, True)
    run("qemu-img", "check", path)
