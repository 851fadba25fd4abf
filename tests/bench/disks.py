"""The disks that the cells are measured on, all made by qemu-img."""

import mmap
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.bench.cells import GIB, KIB, MIB, Disk
from tests.helpers.tools import run

# Empty disks are larger than what a run writes, as in life: 64 Ki random requests
# of 4 KiB meet a fresh cluster nearly two times in three.
SIZES = {
    Disk.ALLOCATED: GIB,
    Disk.EMPTY: 4 * GIB,
    Disk.OVERLAY: GIB,
    Disk.COMPRESSED: 256 * MIB,
}


class Disks:
    """Makes disks in one folder; those that no load changes are made once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def prepare(self, disk: Disk, image_format: str) -> Path:
        """A disk of that kind, "qcow2" or "raw", ready for one run."""
        path = self._directory / f"{disk.value}.{image_format}"
        if disk is Disk.EMPTY:
            path.unlink(missing_ok=True)
            run("qemu-img", "create", "-q", "-f", image_format, path, str(SIZES[disk]))
        elif disk is Disk.OVERLAY:
            path.unlink(missing_ok=True)
            backing = self.prepare(Disk.ALLOCATED, image_format)
            argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", image_format]
            run(*argv, "-b", backing, path)
        elif not path.exists():
            self._fill(disk, image_format, path)
        return path

    @contextmanager
    def settled(
        self, disk: Disk, path: Path, *, cold: bool, kept: bool = False
    ) -> Iterator[None]:
        """Write back what is dirty, and read the image again unless it is to be cold.

        So every run begins with the same page cache, whoever was there before: how large
        its folios are makes a small write 2 or 30 us long.

        Args:
            disk: What kind it is.
            path: Where it is.
            cold: Whether none of it shall be cached.
            kept: Whether to keep what is cached mapped, for longer runs: some machines take
                pages away that nobody has touched for half a minute and nobody maps.
        """
        paths = [path]
        if disk is Disk.OVERLAY:
            paths.append(path.with_stem(Disk.ALLOCATED.value))
        with ExitStack() as held:
            for each in paths:
                self._read_again(each, cold=cold)
                if kept and not cold:
                    held.enter_context(self._mapped(each))
            yield

    @staticmethod
    def _read_again(path: Path, *, cold: bool) -> None:
        with path.open("rb", buffering=0) as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while not cold and file.read(4 * MIB):
                pass

    @staticmethod
    def _mapped(path: Path) -> mmap.mmap:
        with path.open("rb") as file:
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            return mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ)

    def discard(self, disk: Disk, path: Path) -> None:
        """Remove a disk that the next run needs fresh."""
        if disk in {Disk.EMPTY, Disk.OVERLAY}:
            path.unlink()

    def _fill(self, disk: Disk, image_format: str, path: Path) -> None:
        raw = path.with_suffix(".raw")
        if not raw.exists():
            generator = random.Random(0)
            if disk is Disk.COMPRESSED:  # to about a quarter, as file systems may
                blocks = (generator.randbytes(KIB) * 4 for _ in range(16 * KIB))
                piece = b"".join(blocks)
            else:
                piece = generator.randbytes(64 * MIB)
            with raw.open("wb") as file:
                while file.tell() < SIZES[disk]:
                    file.write(piece[: SIZES[disk] - file.tell()])
        if image_format == "raw":
            return
        compress = ["-c"] if disk is Disk.COMPRESSED else []
        run(
            "qemu-img", "convert", *compress, "-f", "raw", "-O", image_format, raw, path
        )
