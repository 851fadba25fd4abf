"""Disks that grow and shrink: sizes, bytes, and what must not come back."""

import contextlib
import random
from pathlib import Path

import pytest

from nbdserve.errors import ConfigError, ImageError, RequestError
from nbdserve.formats.check import check_image
from nbdserve.formats.open import open_image
from nbdserve.formats.qcow2.image import Qcow2Image
from nbdserve.storage.faults import NO_FAULT, Fault
from tests.helpers.engine import convert, make, open_bytes
from tests.helpers.tools import run

KIB = 1 << 10
MIB = 1 << 20
OPTIONS = ["", "compat=0.10", "cluster_size=512", "cluster_size=4k,refcount_bits=1"]


def random_bytes(size: int, seed: int = 1) -> bytes:
    """Return bytes without holes."""
    return random.Random(seed).randbytes(size)


def assert_reads(path: Path, expected: bytes) -> None:
    """Compare with what qemu-img reads, and let it check."""
    out = path.with_suffix(".raw")
    run("qemu-img", "convert", "-O", "raw", path, out)
    assert out.read_bytes() == expected
    run("qemu-img", "check", path)


@pytest.mark.parametrize("options", OPTIONS)
async def test_grow_and_shrink(tmp_path: Path, options: str) -> None:
    """What a shrink cut off is zeros after growing again, down to the sector."""
    content = random_bytes(300 * KIB + 512)
    path = convert(tmp_path, content, options=options)
    async with open_image(path) as image:
        await image.resize(3 * MIB)
        assert image.size == 3 * MIB
        await image.write(3 * MIB - 512, b"e" * 512)
    expected = bytearray(content.ljust(3 * MIB, b"\0"))
    expected[-512:] = b"e" * 512
    assert_reads(path, bytes(expected))
    size = path.stat().st_blocks
    async with open_image(path) as image:
        await image.resize(100 * KIB + 512, shrink=True)
        assert image.size == 100 * KIB + 512
    assert_reads(path, content[: 100 * KIB + 512])
    assert path.stat().st_blocks < size
    run("qemu-img", "resize", path, "1M")
    assert_reads(path, content[: 100 * KIB + 512].ljust(MIB, b"\0"))
    async with open_image(path) as image:
        await image.resize(2 * MIB)
        assert await image.read(0, 2 * MIB) == content[: 100 * KIB + 512].ljust(
            2 * MIB, b"\0"
        )
    run("qemu-img", "check", path)


async def test_qemu_shrinks_and_we_grow(tmp_path: Path) -> None:
    """qemu leaves the tail of the last cluster: it must not come back."""
    content = random_bytes(256 * KIB)
    path = convert(tmp_path, content)
    run("qemu-img", "resize", "--shrink", path, str(70 * KIB))
    async with open_image(path) as image:
        await image.resize(MIB)
    assert_reads(path, content[: 70 * KIB].ljust(MIB, b"\0"))


@pytest.mark.parametrize("options", ["", "compat=0.10", "cluster_size=2M"])
async def test_growing_shows_no_more_of_the_backing_file(
    tmp_path: Path, options: str
) -> None:
    """A backing file that is longer than the disk stays hidden behind its end."""
    base = tmp_path / "base.raw"
    below = random_bytes(3 * MIB)
    base.write_bytes(below)
    path = tmp_path / "top.qcow2"
    more = ["-o", options] if options else []
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", *more, "-b", str(base)]
    run(*argv, "-F", "raw", path, str(MIB + 512))
    async with open_image(path) as image:
        await image.resize(5 * MIB)
        assert await image.read(0, 5 * MIB) == below[: MIB + 512].ljust(5 * MIB, b"\0")
    assert_reads(path, below[: MIB + 512].ljust(5 * MIB, b"\0"))


async def test_with_snapshots(tmp_path: Path) -> None:
    """A snapshot keeps its size and bytes whatever the disk does."""
    content = random_bytes(200 * KIB)
    path = convert(tmp_path, content, options="cluster_size=512")
    async with open_image(path) as image:
        assert isinstance(image, Qcow2Image)
        await image.create_snapshot("before")
        await image.resize(20 * KIB + 512, shrink=True)
        await image.write(0, b"new")
        await image.resize(4 * MIB)
    expected = b"new" + content[3 : 20 * KIB + 512]
    assert_reads(path, expected.ljust(4 * MIB, b"\0"))
    async with open_image(path, read_only=True, snapshot="before") as image:
        assert await image.read(0, image.size) == content


async def test_vm_state_does_not_become_disk(tmp_path: Path) -> None:
    """What is mapped behind the end of the disk is dropped before the disk gets there."""
    content = random_bytes(200 * KIB)
    path = convert(tmp_path, content, options="cluster_size=512")
    data = bytearray(path.read_bytes())
    # as if the disk ended earlier, with all else as it is
    data[24:32] = (50 * KIB).to_bytes(8, "big")
    disk = await open_bytes(tmp_path, bytes(data))
    await disk.image.resize(200 * KIB)
    disk.model[:] = content[: 50 * KIB]
    disk.model += bytes(150 * KIB)
    await disk.assert_content()
    await disk.close_and_check()


async def test_what_is_refused(tmp_path: Path) -> None:
    """Each refusal names its reason, and changes nothing."""
    path = make(tmp_path, MIB, options="cluster_size=512")
    before = path.read_bytes()
    async with open_image(path) as image:
        with pytest.raises(ConfigError, match="--shrink"):
            await image.resize(MIB - 1024)
        with pytest.raises(ConfigError, match="larger clusters map more"):
            await image.resize(1 << 40)
        with pytest.raises(ConfigError, match="must be 0 to"):
            await image.resize(-512)
        await image.resize(MIB)
    assert path.read_bytes() == before
    old = make(tmp_path, MIB, options="compat=0.10")
    run("qemu-img", "snapshot", "-c", "one", old)
    async with open_image(old) as image:
        with pytest.raises(ImageError, match="amend it to version 3"):
            await image.resize(2 * MIB)
    marked = make(tmp_path, MIB)
    run("qemu-img", "bitmap", "--add", "-g", "512", marked, "b")
    async with open_image(marked) as image:
        with pytest.raises(ImageError, match="bitmap 'b'"):
            await image.resize(0, shrink=True)
        with pytest.raises(ImageError, match="bitmap 'b'"):
            await image.resize(8 << 40)
    first = make(tmp_path, MIB, fmt="qcow")
    async with open_image(first) as image:
        with pytest.raises(RequestError, match="convert it to qcow2"):
            await image.resize(2 * MIB)
    async with open_image(path, read_only=True) as image:
        with pytest.raises(RequestError, match="read-only"):
            await image.resize(2 * MIB)


async def test_raw(tmp_path: Path) -> None:
    """A raw disk is as long as its file."""
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * 1000)
    async with open_image(path, format="raw") as image:
        await image.resize(5000)
        assert await image.read(0, 5000) == b"x" * 1000 + bytes(4000)
        with pytest.raises(ConfigError, match="--shrink"):
            await image.resize(10)
        await image.resize(10, shrink=True)
    assert path.read_bytes() == b"x" * 10


@pytest.mark.parametrize("size", [100 * KIB + 512, MIB])
async def test_a_failed_call_leaves_the_old_size_or_the_new_one(
    tmp_path: Path, size: int
) -> None:
    """Whichever call fails, no byte changes that is on both disks."""
    content = random_bytes(200 * KIB)
    start = convert(tmp_path, content, options="cluster_size=4k").read_bytes()
    for number in range(100):
        disk = await open_bytes(tmp_path, start)
        await disk.image.write(0, content[:512])
        await disk.image.flush()
        disk.storage.calls = 0
        disk.storage.fault = Fault(at=number)
        with contextlib.suppress(OSError):
            await disk.image.resize(size, shrink=True)
        failed, disk.storage.fault = disk.storage.failed, NO_FAULT
        with contextlib.suppress(OSError):
            await disk.image.close()
        saved = disk.saved()
        async with open_image(saved, read_only=True) as image:
            assert image.size in (size, len(content))
            common = min(image.size, len(content))
            assert await image.read(0, common) == content[:common]
            assert not any(await image.read(common, image.size - common))
        result = check_image(saved)
        assert result is not None
        assert not result.corruptions
        if not failed:
            break
    else:
        pytest.fail("it never ended well")
