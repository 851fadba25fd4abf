"""qemu's own tools as clients: what they read, write and learn over NBD.

Where qemu can read the file itself, it is the judge: the server must show the
same bytes and the same holes as qemu's drivers do, and must leave an image that
`qemu-img check` finds nothing in.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.helpers.images import IMAGE_SIZE, MIB, Image, fill_pattern
from tests.helpers.servers import Server
from tests.helpers.tools import run

pytestmark = pytest.mark.interop

STATE_ZERO = 2  # NBD_STATE_ZERO of base:allocation, doc/proto.md

# Odd offsets and lengths, cluster and L2 borders of all our cluster sizes, and
# several requests in flight; overlaps only between commands that are in order.
WRITES = (
    "write -P 0x11 0 4k",
    "write -P 0x12 65024 1k",
    "write -P 0x13 1000 3",
    "aio_write -P 0x14 3M 2M",
    "aio_write -P 0x15 6144k 64k",
    "aio_write -P 0x16 6208k 64k",
    "aio_write -P 0x17 6300k 1k",
    "aio_write -P 0x18 6301k 1k",
    "aio_flush",
    "write -z 8M 1M",
    "write -z -u 10M 700k",
    "write -z 2500k 3k",
    "discard 10M 700k",  # zeroes already, so whatever it does they are zeroes
    "write -P 0x19 10300k 12k",
    "write -f -P 0x1a 12M 5k",
    "write -P 0x1b 2046k 4k",
    "write -P 0x1c 16M 4M",
    "write -z -u 17M 1M",
    "write -P 0x1d 17000k 100k",
    "flush",
    f"write -P 0x1e {IMAGE_SIZE - 512} 512",
    "read -P 0x1d 17000k 100k",
    "read -P 0x13 1000 3",
)


def qemu_io(target: str | Path, *commands: str) -> None:
    """Run commands on a raw target; any complaint is a failure."""
    argv: list[str | Path] = ["qemu-io", "-f", "raw", "--discard=unmap"]
    for command in commands:
        argv += ["-c", command]
    said = run(*argv, target)
    assert "failed" not in said
    assert "error" not in said


def zero_ranges(target: str | Path, image_format: str) -> list[tuple[int, int]]:
    """Where qemu-img map says that there are zeroes: (start, end), merged."""
    listed = run("qemu-img", "map", "--output=json", "-f", image_format, target)
    return merged(
        (extent["start"], extent["length"], extent["zero"])
        for extent in json.loads(listed)
    )


def zero_ranges_of_nbdinfo(uri: str) -> list[tuple[int, int]]:
    """The same from base:allocation, as libnbd hears it."""
    return merged(
        (extent["offset"], extent["length"], bool(extent["type"] & STATE_ZERO))
        for extent in json.loads(run("nbdinfo", "--map", "--json", uri))
    )


def merged(extents: Iterable[tuple[int, int, bool]]) -> list[tuple[int, int]]:
    """The zero ones of gapless (start, length, zero), neighbours as one range."""
    ranges: list[tuple[int, int]] = []
    end = 0
    for start, length, zero in extents:
        assert start == end
        end = start + length
        if not zero:
            continue
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((start, end))
    assert end == IMAGE_SIZE
    return ranges


def test_reads_and_holes_are_those_of_the_file(
    image: Image, server: Server, uri: str, tmp_path: Path
) -> None:
    """qemu-img and nbdinfo see over NBD what qemu sees in the file."""
    described = json.loads(run("qemu-img", "info", "-f", "raw", "--output=json", uri))
    assert described["virtual-size"] == IMAGE_SIZE
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, image.mirror)
    copy = tmp_path / "copy.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, copy)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", copy, image.mirror)
    over_nbd = zero_ranges(uri, "raw")
    over_libnbd = zero_ranges_of_nbdinfo(uri)
    server.stop()
    in_the_file = zero_ranges(image.path, image.format)
    assert over_nbd == in_the_file
    assert over_libnbd == in_the_file
    image.assert_all()


def test_qemu_io_writes(image: Image, server: Server, uri: str) -> None:
    """The same commands on the export and on a raw file end in the same bytes."""
    qemu_io(uri, *WRITES)
    qemu_io(image.mirror, *WRITES)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, image.mirror)
    server.stop()
    image.assert_all()


@pytest.mark.parametrize("transport", ["tcp"], indirect=True)
def test_convert_onto_the_export(
    image: Image, server: Server, uri: str, tmp_path: Path
) -> None:
    """qemu-img convert replaces the whole content, out of order."""
    new = tmp_path / "new.raw"
    fill_pattern(new, IMAGE_SIZE, seed=3)
    argv = ["qemu-img", "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw"]
    run(*argv, new, uri)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, new)
    server.stop()
    dataclasses.replace(image, mirror=new).assert_all()


@pytest.mark.parametrize(
    "image", ["raw", "qcow2-v3", "qcow2-over-qcow2"], indirect=True
)
def test_discarded_space_is_given_back(image: Image, server: Server, uri: str) -> None:
    """A guest's trim frees space in the file, and reads as it did or as zeroes."""
    qemu_io(uri, f"write -P 0x77 0 {IMAGE_SIZE}", "flush")
    full = image.path.stat().st_blocks
    qemu_io(uri, "discard 8M 16M", "flush")
    server.stop()
    assert image.path.stat().st_blocks * 512 <= full * 512 - 12 * MIB
    image.assert_clean()
