"""Meta contexts through real clients, and beside qemu-nbd where it has them."""

import json
from pathlib import Path

import pytest

from tests.helpers.servers import nbdserve, qemu_nbd
from tests.helpers.tools import run

pytestmark = pytest.mark.interop

DEPTH = "qemu:allocation-depth"
BITMAP = "qemu:dirty-bitmap:changes"


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Three images: data in each, zeros on top of data, and a part that none has."""
    names = ["bottom", "middle", "top"]
    for below, name in zip([None, *names], names, strict=False):
        backing = ["-F", "qcow2", "-b", f"{below}.qcow2"] if below else []
        path = tmp_path / f"{name}.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", *backing, path, "16M")
    for name, commands in {
        "bottom": ["write 0 4M"],
        "middle": ["write 1M 1M", "write -z 3M 1M", "write 6M 64k"],
        "top": ["write 2M 64k", "write -z 0 64k", "write 8M 1M"],
    }.items():
        words = [word for command in commands for word in ("-c", command)]
        run("qemu-io", "-f", "qcow2", *words, tmp_path / f"{name}.qcow2")
    return tmp_path / "top.qcow2"


def described(uri: str, context: str) -> list[tuple[int, int, int]]:
    """Offsets, lengths and states as nbdinfo prints them, neighbours joined."""
    result: list[tuple[int, int, int]] = []
    for each in json.loads(run("nbdinfo", f"--map={context}", "--json", uri)):
        offset, length, state = each["offset"], each["length"], each["type"]
        if result and result[-1][2] == state:
            offset, length = result[-1][0], result.pop()[1] + length
        result.append((offset, length, state))
    return result


def as_qemu(socket: Path | None, context: str) -> list[str]:
    """The arguments that let qemu-img see a context as it sees base:allocation."""
    node = f"driver=nbd,server.type=unix,server.path={socket},export=disk"
    return ["--output=json", "--image-opts", f"{node},x-dirty-bitmap={context}"]


def total(ranges: list[tuple[int, int]]) -> int:
    return sum(length for _, length in ranges)


def test_allocation_depth_is_what_qemu_nbd_says(chain: Path, tmp_path: Path) -> None:
    with qemu_nbd(
        chain, tmp_path / "q", image_format="qcow2", options=["-A", "--read-only"]
    ) as peer:
        expected = described(peer.uri("unix"), DEPTH)
    options = ["--allocation-depth", "--read-only"]
    with nbdserve(chain, tmp_path / "n", options=options) as server:
        uri = server.uri("unix")
        assert described(uri, DEPTH) == expected
        # qemu's own client in the place of base:allocation: it makes depths above 2
        # to 2, and bit 0 is "no data" to qemu-img
        mapped = json.loads(run("qemu-img", "map", *as_qemu(server.unix, DEPTH)))
        shallow = [(each["start"], each["length"]) for each in mapped if each["data"]]
        even = [each[:2] for each in expected if each[2] != 1]
        assert total(shallow) == total(even)
    assert {state for _, _, state in expected} == {0, 1, 2, 3}


def test_a_bitmap_tells_what_was_changed(chain: Path, tmp_path: Path) -> None:
    options = ["--bitmap", "changes", "--bitmap", "more"]
    with nbdserve(chain, tmp_path / "n", options=options) as server:
        uri = server.uri("unix")
        assert described(uri, BITMAP) == [(0, 16 << 20, 0)]
        run(
            "qemu-io", "-f", "raw", "-c", "write 1M 512", "-c", "discard 4M 1M",
            "-c", "write -z 9M 64k", "-c", "read 0 1M", uri,
        )  # fmt: skip
        changed = [
            (offset, length)
            for offset, length, state in described(uri, BITMAP)
            if state
        ]
        assert changed == [(1 << 20, 65536), (4 << 20, 1 << 20), (9 << 20, 65536)]
        assert described(uri, "qemu:dirty-bitmap:more") == described(uri, BITMAP)
        listed = json.loads(run("nbdinfo", "--json", uri))["exports"][0]["contexts"]
        assert set(listed) >= {"base:allocation", BITMAP, "qemu:dirty-bitmap:more"}
        assert DEPTH not in listed
        # how backup tools read a bitmap: through the context that replaces allocation
        mapped = json.loads(run("qemu-img", "map", *as_qemu(server.unix, BITMAP)))
        dirty = [(each["start"], each["length"]) for each in mapped if not each["data"]]
        assert dirty == changed
