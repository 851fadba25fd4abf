"""Lazy refcounts: the flag is kept, what another writer put off is made up for, we never do."""

import json
from pathlib import Path
from typing import Any

import pytest

from nbdserve.cli.main import main
from nbdserve.errors import ConfigError
from nbdserve.formats.create import create_image
from nbdserve.formats.open import open_image
from nbdserve.formats.qcow2.header import INCOMPATIBLE_DIRTY
from tests.helpers.tools import run

MIB = 1 << 20


def image(*words: object) -> int:
    """Run `nbdserve image` and return its exit code."""
    return main(["image", *map(str, words)])


def specific(path: Path) -> dict[str, Any]:
    """Return what qemu-img says of the format."""
    shown = json.loads(run("qemu-img", "info", "-U", "--output=json", path))
    found: dict[str, Any] = shown["format-specific"]["data"]
    return found


def dirty(path: Path) -> bool:
    """Return whether the dirty bit is set."""
    return bool(path.read_bytes()[79] & INCOMPATIBLE_DIRTY)


def test_create_is_qemus(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert image("create", ours, "5M", "--lazy-refcounts", "on") == 0
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", theirs,
        "5M")  # fmt: skip
    assert ours.read_bytes()[:4096] == theirs.read_bytes()[:4096]
    assert image("create", tmp_path / "off", "5M", "--lazy-refcounts", "off") == 0
    assert specific(tmp_path / "off")["lazy-refcounts"] is False
    with pytest.raises(ConfigError, match="need compat 3"):
        create_image(tmp_path / "x", MIB, compat=2, lazy_refcounts=True)
    with pytest.raises(ConfigError, match="qcow2 only"):
        create_image(tmp_path / "x", MIB, format="raw", lazy_refcounts=True)


@pytest.mark.parametrize("extra", ["", "--compress zlib", "--preallocation metadata"])
def test_convert_keeps_the_choice(tmp_path: Path, extra: str) -> None:
    source, path = tmp_path / "source", tmp_path / "disk"
    source.write_bytes(b"content" * 20_000)
    words = ["--lazy-refcounts", "on", *extra.split()]
    assert image("convert", source, path, *words) == 0
    assert specific(path)["lazy-refcounts"] is True
    run("qemu-img", "check", path)


async def test_writing_keeps_the_flag_and_never_makes_use_of_it(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    create_image(path, 5 * MIB, lazy_refcounts=True)
    async with open_image(path) as device:
        await device.write(MIB, b"x" * MIB)
        assert not dirty(path)
        await device.flush()
        assert not dirty(path)
        # refcounts are right at any moment: leaks at most, which are reserved clusters
        run("qemu-img", "check", "-U", path, expect=[0, 3])
    assert not dirty(path)
    assert specific(path)["lazy-refcounts"] is True
    run("qemu-img", "check", path)


def left_by_qemu(path: Path) -> None:
    """Let qemu write with lazy refcounts, and kill it."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path,
        "5M")  # fmt: skip
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 1M", "-c", "flush", "-c",
        "sigraise 9", path, expect=[-9])  # fmt: skip
    assert dirty(path)


async def test_what_qemu_put_off_is_made_up_for_at_opening(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    left_by_qemu(path)
    run("qemu-img", "check", path, expect=[0, 2, 3])
    before = path.read_bytes()
    async with open_image(path, read_only=True) as device:
        assert await device.read(MIB, 4096) == b"\x07" * 4096
    assert path.read_bytes() == before
    async with open_image(path) as device:
        assert not dirty(path)
        await device.write(3 * MIB, b"y" * MIB)
        assert await device.read(MIB, MIB) == b"\x07" * MIB
    assert not dirty(path)
    run("qemu-img", "check", path)
    assert specific(path)["lazy-refcounts"] is True


def test_amend(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    left_by_qemu(path)
    assert image("amend", path, "--lazy-refcounts", "off") == 0
    assert not dirty(path)
    assert specific(path)["lazy-refcounts"] is False
    run("qemu-img", "check", path)
    assert image("amend", path, "--lazy-refcounts", "on") == 0
    assert specific(path)["lazy-refcounts"] is True
    run("qemu-io", "-f", "qcow2", "-c", "write 0 1M", path)
    run("qemu-img", "check", path)
