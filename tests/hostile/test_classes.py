"""The table of classes: each test that it names exists. And the classes tested nowhere else."""

import ast
import os
import re
import struct
from pathlib import Path

import pytest

from nbdserve.errors import ImageError, RequestError
from nbdserve.formats.check import check_image
from nbdserve.formats.info import image_info
from nbdserve.formats.open import open_image
from tests.helpers.engine import HEADER_L1_OFFSET, HEADER_SNAPSHOTS, convert, make
from tests.hostile.driver import bounded, require_line

MIB = 1 << 20
TESTS = Path(__file__).parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (TESTS / "hostile" / "CLASSES.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| class ")
]


def test_the_table_is_a_table() -> None:
    assert len(ROWS) > 30
    assert all(len(row) == 3 and all(row) for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_a_class_has_a_test(row: list[str]) -> None:
    for entry in row[2].split(", "):
        found = re.fullmatch(r"`([\w/]+\.py)::(test_\w+)`", entry)
        assert found, f"not the name of a test: {entry}"
        path, name = found.groups()
        tree = ast.parse((TESTS / path).read_text())
        assert name in {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }


@pytest.mark.parametrize("what", ["L1", "snapshots", "refcounts"])
async def test_giant_tables_are_bounded(what: str, tmp_path: Path) -> None:
    """As large as they may be, in a file that is nearly all holes."""
    path = make(tmp_path, MIB)
    start = MIB
    with path.open("r+b") as file:
        if what == "L1":
            file.seek(HEADER_L1_OFFSET - 4)
            file.write(struct.pack(">IQ", 4 * MIB, start))
        elif what == "snapshots":
            file.seek(HEADER_SNAPSHOTS)
            file.write(struct.pack(">IQ", 65536, start))
        else:
            file.seek(48)
            file.write(struct.pack(">QI", start, 128))
        file.truncate(start + 80 * MIB)
    with bounded():
        image_info(path)
        check_image(path)
        for read_only in (True, False):
            try:
                async with open_image(path, read_only=read_only) as image:
                    assert await image.read(0, 4096) == bytes(4096)
                    await image.write(0, b"x" * 4096)
            except (ImageError, RequestError) as error:
                require_line(error)


@pytest.mark.parametrize("image_format", ["raw", "qcow", "qcow2"])
@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize("kept", [0, 4096, 70_000, 300_000])
async def test_a_file_that_is_cut_under_us(
    image_format: str, read_only: bool, kept: int, tmp_path: Path
) -> None:
    """Reading gives what is left and zeros, or an error; nothing hangs or ends us."""
    content = os.urandom(MIB)
    path = convert(tmp_path, content, fmt=image_format)
    image = await open_image(path, format=image_format, read_only=read_only)
    try:
        assert await image.read(0, 100) == content[:100]
        os.truncate(path, kept)
        for offset in range(0, MIB, 50_000):
            try:
                data = await image.read(offset, 10_000)
            except (ImageError, OSError):
                continue
            assert all(
                a in {b, 0} for a, b in zip(data, content[offset:], strict=False)
            )
        if not read_only:
            for offset in range(0, MIB, 100_000):
                try:
                    await image.write(offset, b"written")
                    await image.trim(offset, 40_000)
                except (ImageError, OSError) as error:
                    require_line(error)
    finally:
        try:
            await image.close()
        except (ImageError, OSError) as error:
            require_line(error)


@pytest.mark.parametrize("image_format", ["raw", "qcow", "qcow2"])
async def test_a_file_that_grows_under_us(image_format: str, tmp_path: Path) -> None:
    content = os.urandom(MIB)
    path = convert(tmp_path, content, fmt=image_format)
    async with open_image(path, format=image_format) as image:
        with path.open("ab") as file:
            file.write(b"\xff" * (200 * MIB // 100))
        assert image.size == MIB
        assert await image.read(0, MIB) == content
        await image.write(1000, b"written")
    expected = content[:1000] + b"written" + content[1007:]
    async with open_image(path, format=image_format, read_only=True) as image:
        assert await image.read(0, MIB) == expected
