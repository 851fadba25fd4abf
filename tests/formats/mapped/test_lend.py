"""What an image lends instead of copying."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from nbdserve.block.loan import Piece
from nbdserve.formats.mapped.image import MappedImage
from nbdserve.formats.open import open_image
from tests.helpers.tools import run

MIB = 1 << 20
SIZE = 8 * MIB
CONTENT = bytes(range(1, 256)) * (SIZE // 255) + b"\1" * (SIZE % 255)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    source = tmp_path / "source.raw"
    source.write_bytes(CONTENT)
    target = tmp_path / "base.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", source, target)
    return target


async def opened(path: Path, *, read_only: bool = False) -> MappedImage:
    image = await open_image(path, read_only=read_only)
    assert isinstance(image, MappedImage)
    return image


def lent(image: MappedImage, offset: int, length: int, *files: Path) -> Sequence[Piece]:
    """Borrow a range; the kernel may take pages out of its cache at any moment."""
    for _ in range(100):
        for file in files:
            file.read_bytes()
        pieces = image.lend(offset, length)
        if pieces is not None:
            return pieces
    raise AssertionError("nothing was lent")


def content_of(pieces: Sequence[Piece]) -> bytes:
    result = b""
    for storage, offset, length in pieces:
        data = bytearray(length)
        storage.read_now(offset, memoryview(data))
        result += data
    return result


@pytest.mark.parametrize("read_only", [False, True])
async def test_plain_data_in_memory_is_lent(base: Path, read_only: bool) -> None:
    image = await opened(base, read_only=read_only)
    # A table has to be in memory: a loan never waits.
    assert image.lend(0, MIB) is None
    await image.read(0, 1)
    for offset, length in ((0, SIZE), (1, 65536), (3 * MIB - 5, MIB)):
        pieces = lent(image, offset, length, base)
        assert content_of(pieces) == CONTENT[offset : offset + length]
    await image.close()


async def test_backing_files_lend(base: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    run("qemu-img", "create", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay, "9M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 3 1M 64k", overlay)
    image = await opened(overlay)
    await image.read(0, SIZE)
    pieces = lent(image, MIB - 7, 100_000, base, overlay)
    wanted = CONTENT[MIB - 7 : MIB] + b"\3" * 65536 + CONTENT[MIB + 65536 :]
    assert content_of(pieces) == wanted[:100_000]
    # past the end of the backing file there are zeros
    assert image.lend(SIZE - 1, 2) is None
    await image.close()


async def test_zeros_and_compressed_clusters_are_not_lent(
    base: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small.qcow2"
    run("qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2", base, small)
    image = await opened(small)
    await image.write_zeroes(0, MIB)
    await image.write(2 * MIB, b"n" * 65536)
    await image.read(0, SIZE)
    assert image.lend(0, 65536) is None
    assert image.lend(MIB, 65536) is None
    assert image.lend(2 * MIB, 65537) is None
    pieces = lent(image, 2 * MIB, 65536, small)
    assert content_of(pieces) == b"n" * 65536
    await image.close()
