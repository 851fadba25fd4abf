"""Which regions of a file are split, and that nothing else changes."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.storage import mapped
from nbdserve.storage.file import FileStorage
from nbdserve.storage.folios import Folios
from nbdserve.storage.residency import Residency

MIB = 1 << 20
REGION = 2 * MIB


class Asked(Residency):
    """Notes for which places it is asked, and says that nothing is cached there."""

    def __init__(self) -> None:
        super().__init__()
        self.offsets: list[int] = []

    def pages_cached(self, fd: int, offset: int, length: int) -> int:
        self.offsets.append(offset)
        return 0


def storm(folios: Folios) -> None:
    for number in range(8):
        assert not folios.wanted
        folios.slow(0, 1e9 + number / 100)
    assert folios.wanted


def test_a_few_slow_writes_are_nothing() -> None:
    folios = Folios(Asked())
    for number in range(100):
        folios.slow(0, 100.0 + number * 0.2)
    assert not folios.wanted


def test_each_region_is_tried_once_and_again_if_it_stays_slow() -> None:
    asked = Asked()
    folios = Folios(asked)
    storm(folios)
    for offset in (5 * REGION + 4096, 5 * REGION, 0, 5 * REGION + MIB):
        folios.split(-1, offset)
    assert asked.offsets == [5 * REGION + 4096, 0]
    for _ in range(31):
        folios.slow(5 * REGION, 200.0)
    folios.split(-1, 5 * REGION)
    assert len(asked.offsets) == 2
    folios.slow(5 * REGION, 200.0)
    folios.slow(77 * REGION, 200.0)  # never tried
    folios.split(-1, 5 * REGION)
    folios.split(-1, 0)
    assert asked.offsets == [5 * REGION + 4096, 0, 5 * REGION]


@pytest.fixture
def file(tmp_path: Path) -> Iterator[tuple[Path, FileStorage]]:
    path = tmp_path / "file"
    path.write_bytes(random.Random(1).randbytes(4 * REGION + 777))
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
    storage = FileStorage(path)
    yield path, storage
    os.close(storage._fd)


def test_splitting_changes_no_byte(file: tuple[Path, FileStorage]) -> None:
    path, storage = file
    expected = bytearray(path.read_bytes())
    folios = Folios(storage._residency)
    for offset in range(0, len(expected), MIB):
        folios.split(storage._fd, offset)
    folios.split(storage._fd, 100 * REGION)  # past the end
    assert path.read_bytes() == expected
    for offset in range(0, len(expected), 300_000):
        assert storage.try_write(offset, b"new")
        expected[offset : offset + 3] = b"new"
    assert path.read_bytes() == expected


def test_a_file_that_cannot_be_mapped_stays_as_it_is(
    file: tuple[Path, FileStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, storage = file
    monkeypatch.setattr(mapped, "_mmap", lambda *_: mapped._FAILED)
    storm(storage._folios)
    assert storage.try_write(0, b"written")
    assert path.read_bytes()[:7] == b"written"


def test_small_writes_are_tried_while_they_are_slow(
    file: tuple[Path, FileStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, storage = file
    split: list[int] = []
    monkeypatch.setattr(
        storage._folios, "split", lambda _fd, offset: split.append(offset)
    )
    assert storage.try_write(0, b"quick or not")
    assert not split
    storm(storage._folios)
    assert storage.try_write(REGION, b"x" * 4096)
    assert storage.try_write(0, b"x" * MIB)
    assert split == [REGION]
    assert path.read_bytes()[REGION : REGION + 4096] == b"x" * 4096
