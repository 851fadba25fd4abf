"""Image files in every format we serve, each with a raw mirror of its guest content.

All are made by qemu-img, so that a test never depends on our own idea of a
format. Nearly every one starts with some content: data, zeroes and, where there
is a backing file, clusters that only that has.
"""

import dataclasses
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.helpers.tools import run

MIB = 1 << 20
IMAGE_SIZE = 32 * MIB

SNAPSHOT = "before"


@dataclass(frozen=True)
class Image:
    """One image file and what a guest must find in it.

    Attributes:
        path: The image.
        format: "raw", "qcow" or "qcow2", qemu-img's words.
        mirror: A raw file of the same size and content.
        snapshot_mirror: The content of the internal snapshot, if it has one.
    """

    path: Path
    format: str
    mirror: Path
    snapshot_mirror: Path | None = None

    def copied_to(self, directory: Path) -> Self:
        """The same image, with its mirrors and backing files, in another folder."""
        for file in self.path.parent.iterdir():
            # cp must make no holes inside of clusters: a map would show them.
            sparse = "never" if file.suffix in {".qcow", ".qcow2"} else "always"
            run("cp", f"--sparse={sparse}", file, directory)
        old = self.snapshot_mirror
        return dataclasses.replace(
            self,
            path=directory / self.path.name,
            mirror=directory / self.mirror.name,
            snapshot_mirror=None if old is None else directory / old.name,
        )

    def assert_same_as_mirror(self) -> None:
        """Compare byte for byte what qemu reads from the image with the mirror."""
        # Without -s: a hole and written zeroes are the same to a guest.
        run(
            "qemu-img",
            "compare",
            "-f",
            self.format,
            "-F",
            "raw",
            self.path,
            self.mirror,
        )

    def assert_clean(self) -> None:
        """Check the metadata: neither corruptions (2) nor leaks (3)."""
        if self.format == "qcow2":  # qemu-img has no check for the others
            run("qemu-img", "check", "-f", "qcow2", self.path)

    def assert_snapshot_untouched(self) -> None:
        """Compare the internal snapshot with its content when it was taken."""
        if self.snapshot_mirror is None:
            return
        out = self.path.with_suffix(".snapshot.raw")
        run("qemu-img", "convert", "-l", SNAPSHOT, "-O", "raw", self.path, out)
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", out, self.snapshot_mirror)
        out.unlink()

    def assert_all(self) -> None:
        """Everything that must hold after a clean shutdown of the server."""
        self.assert_clean()
        self.assert_same_as_mirror()
        self.assert_snapshot_untouched()


def fill_pattern(path: Path, size: int, *, seed: int) -> None:
    """Make a raw file of `size` bytes: random, compressible and empty stretches."""
    generator = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        for start in range(0, size, 512 * 1024):
            kind = generator.randrange(4)
            if kind == 0:
                continue  # a hole
            length = min(size - start, generator.randrange(1, 512) * 1024)
            file.seek(start)
            if kind == 1:
                file.write(generator.randbytes(length))
            else:
                file.write(generator.randbytes(64) * (length // 64))


def _plain(image_format: str, *options: str) -> Callable[[Path, str], Image]:
    """An image with content, converted from its mirror."""

    def create(directory: Path, stem: str) -> Image:
        mirror = directory / f"{stem}.mirror"
        fill_pattern(mirror, IMAGE_SIZE, seed=1)
        path = directory / f"{stem}.{image_format}"
        _convert(mirror, path, image_format, *options)
        return Image(path, image_format, mirror)

    return create


def _empty(image_format: str, *options: str) -> Callable[[Path, str], Image]:
    """An image nobody has written to yet."""

    def create(directory: Path, stem: str) -> Image:
        mirror = directory / f"{stem}.mirror"
        with mirror.open("wb") as file:
            file.truncate(IMAGE_SIZE)
        path = directory / f"{stem}.{image_format}"
        argv = ["qemu-img", "create", "-q", "-f", image_format, *_option(options)]
        run(*argv, path, str(IMAGE_SIZE))
        return Image(path, image_format, mirror)

    return create


def _overlay(
    image_format: str,
    backing_format: str,
    *options: str,
    backing_options: tuple[str, ...] = (),
    backing_size: int = IMAGE_SIZE,
) -> Callable[[Path, str], Image]:
    """An image over a backing file, both with content, the backing maybe shorter."""

    def create(directory: Path, stem: str) -> Image:
        mirror = directory / f"{stem}.mirror"
        fill_pattern(mirror, backing_size, seed=2)
        backing = directory / f"{stem}.base.{backing_format}"
        _convert(mirror, backing, backing_format, *backing_options)
        path = directory / f"{stem}.{image_format}"
        argv = ["qemu-img", "create", "-q", "-f", image_format, *_option(options)]
        # A relative name, as in images that are moved together.
        argv += ["-b", backing.name, "-F", backing_format]
        run(*argv, path, str(IMAGE_SIZE))
        with mirror.open("r+b") as file:
            file.truncate(IMAGE_SIZE)
        if image_format == "qcow2":  # qemu's qcow driver loses backing data on write
            for target, name in ((path, image_format), (mirror, "raw")):
                run("qemu-io", "-f", name, "-c", "write -P 0x6f 1M 300k", target)
        return Image(path, image_format, mirror)

    return create


def _with_snapshot(*options: str) -> Callable[[Path, str], Image]:
    """A qcow2 whose clusters are nearly all shared with an internal snapshot."""
    plain = _plain("qcow2", *options)

    def create(directory: Path, stem: str) -> Image:
        image = plain(directory, stem)
        run("qemu-img", "snapshot", "-c", SNAPSHOT, image.path)
        old = directory / f"{stem}.snapshot.mirror"
        shutil.copyfile(image.mirror, old)
        for target, name in ((image.path, "qcow2"), (image.mirror, "raw")):
            run("qemu-io", "-f", name, "-c", "write -P 0x5a 2M 200k", target)
        return Image(image.path, image.format, image.mirror, snapshot_mirror=old)

    return create


def _option(options: tuple[str, ...]) -> list[str]:
    created = [option for option in options if option != "-c"]
    return ["-o", ",".join(created)] if created else []


def _convert(source: Path, target: Path, target_format: str, *options: str) -> None:
    argv = ["qemu-img", "convert", "-f", "raw", "-O", target_format]
    argv += _option(options) + (["-c"] if "-c" in options else [])
    # qemu-img 7.2 writes a compressed qcow image well, and then exits 1 in silence.
    compressed_qcow = target_format == "qcow" and "-c" in options
    run(*argv, source, target, expect=[1] if compressed_qcow else [0])
    run("qemu-img", "compare", "-f", "raw", "-F", target_format, source, target)


# What every client is tried on. "-c" compresses the content.
FLAVOURS: dict[str, Callable[[Path, str], Image]] = {
    "raw": _plain("raw"),
    "qcow": _plain("qcow"),
    "qcow-empty": _empty("qcow"),
    "qcow-compressed": _plain("qcow", "-c"),
    "qcow-over-raw": _overlay("qcow", "raw"),
    "qcow2-v2": _plain("qcow2", "compat=0.10"),
    "qcow2-v3": _plain("qcow2"),
    "qcow2-empty": _empty("qcow2"),
    "qcow2-cluster-512": _plain("qcow2", "cluster_size=512"),
    "qcow2-cluster-4k": _plain("qcow2", "cluster_size=4k"),
    "qcow2-cluster-2M": _plain("qcow2", "cluster_size=2M"),
    "qcow2-refcount-1": _plain("qcow2", "refcount_bits=1"),
    "qcow2-refcount-64": _plain("qcow2", "refcount_bits=64"),
    "qcow2-zlib": _plain("qcow2", "-c"),
    "qcow2-zstd": _plain("qcow2", "compression_type=zstd", "-c"),
    "qcow2-snapshot": _with_snapshot(),
    "qcow2-v2-snapshot": _with_snapshot("compat=0.10"),
    "qcow2-over-raw": _overlay("qcow2", "raw"),
    "qcow2-over-short-raw": _overlay("qcow2", "raw", backing_size=20 * MIB + 1536),
    "qcow2-v2-over-raw": _overlay("qcow2", "raw", "compat=0.10"),
    "qcow2-over-qcow": _overlay("qcow2", "qcow"),
    "qcow2-over-qcow2": _overlay("qcow2", "qcow2"),
    "qcow2-over-zlib": _overlay("qcow2", "qcow2", backing_options=("-c",)),
    "qcow2-over-zstd": _overlay(
        "qcow2", "qcow2", backing_options=("compression_type=zstd", "-c")
    ),
}
