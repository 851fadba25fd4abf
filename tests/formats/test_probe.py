"""The format is told from the magic, and raw is never guessed for writing."""

import struct

import pytest

from nbdserve.errors import ImageFormatError
from nbdserve.formats.probe import choose, probe
from nbdserve.storage.faults import RecordingStorage
from nbdserve.storage.memory import MemoryStorage


def image(version: int | None) -> MemoryStorage:
    content = b"" if version is None else struct.pack(">4sI", b"QFI\xfb", version)
    return MemoryStorage(content, size=512, name="disk.img")


@pytest.mark.parametrize(
    ("version", "expected"), [(1, "qcow"), (2, "qcow2"), (3, "qcow2"), (None, "raw")]
)
async def test_probe(version: int | None, expected: str) -> None:
    assert await probe(image(version)) == expected
    assert await probe(RecordingStorage(image(version), suspending=True)) == expected


@pytest.mark.parametrize("content", [b"", b"Q", b"QFI\xfb"])
async def test_short_files(content: bytes) -> None:
    storage = MemoryStorage(content, name="short")
    if content == b"QFI\xfb":
        with pytest.raises(ImageFormatError, match="version 0"):
            await probe(storage)
    else:
        assert await probe(storage) == "raw"


@pytest.mark.parametrize("version", [0, 4, 0xFFFFFFFF])
async def test_unknown_version_is_named(version: int) -> None:
    with pytest.raises(ImageFormatError, match=rf"disk\.img: .* version {version};"):
        await choose(image(version), "auto", read_only=True)


async def test_raw_is_not_guessed_for_writing() -> None:
    with pytest.raises(
        ImageFormatError, match=r"disk\.img: has no qcow .* --format raw .* --read-only"
    ):
        await choose(image(None), "auto", read_only=False)
    assert await choose(image(None), "auto", read_only=True) == "raw"
    assert await choose(image(None), "raw", read_only=False) == "raw"
    assert await choose(image(3), "raw", read_only=False) == "raw"


async def test_a_wrong_format_is_said_plainly() -> None:
    assert await choose(image(3), "qcow2", read_only=False) == "qcow2"
    with pytest.raises(
        ImageFormatError, match=r"disk\.img: is no qcow2 image, but qcow"
    ):
        await choose(image(1), "qcow2", read_only=False)
    with pytest.raises(ImageFormatError, match=r"is no qcow2 image$"):
        await choose(image(None), "qcow2", read_only=False)
    with pytest.raises(ImageFormatError, match="format 'vmdk' is not one of raw"):
        await choose(image(None), "vmdk", read_only=True)
