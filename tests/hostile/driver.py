"""Does with an image whatever can be done, and watches what that costs and touches."""

import asyncio
import gc
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from nbdserve.block.device import BlockDevice
from nbdserve.errors import ConfigError, ImageError, RequestError
from nbdserve.formats.check import check_image
from nbdserve.formats.convert import Target, convert_to_file
from nbdserve.formats.info import image_info
from nbdserve.formats.map import map_entries
from nbdserve.formats.open import open_image
from nbdserve.formats.qcow2.image import Qcow2Image
from nbdserve.formats.repair import repair_image

KIB = 1 << 10
#: How many images were driven, and how many of them could be opened for writing.
TRIED = {"images": 0, "writable": 0}
#: What one image may cost. The largest tables that are allowed have 32 MiB (L1), 8 MiB
#: (refcounts) and 64 MiB (snapshots), in the file and as numbers.
MOST_MEMORY = 400 << 20
MOST_SECONDS = 20.0
#: Larger disks are not copied: that takes as long as they are large.
_MOST_COPIED = 8 << 20
#: Audit events that make or change a name, or start a program.
_NEVER = frozenset(
    {"os.exec", "os.posix_spawn", "os.system", "subprocess.Popen", "socket.connect"}
)


#: Something to try.
Step = Callable[[], Awaitable[object]]


@dataclass(slots=True)
class Watch:
    """Looks at each file that is opened; the interpreter can't take a hook off again.

    Attributes:
        folder: The only one whose files may be opened; None while nobody looks.
        forbidden: Names there that may not.
        seen: What was opened and should not have been.
    """

    folder: str | None = None
    forbidden: frozenset[str] = frozenset()
    seen: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in _NEVER:
            self.seen.append(f"{event} {arguments!r}"[:200])
        if event != "open" or not isinstance(arguments[0], str | bytes):
            return
        path = os.path.realpath(os.fsdecode(arguments[0]))
        folder, name = os.path.split(path)
        if path == self.folder:
            return  # to make names durable
        if folder == self.folder and name not in self.forbidden:
            return
        if path.endswith((".py", ".pyc", ".so")) or path.startswith("/proc/"):
            return
        self.seen.append(path)


WATCH = Watch()
sys.addaudithook(WATCH)


class HarmError(AssertionError):
    """An image did what no image may do."""


@contextmanager
def watched(folder: Path, forbidden: AbstractSet[str]) -> Iterator[None]:
    """Let nothing but the files of a folder be opened."""
    WATCH.seen.clear()
    WATCH.forbidden = frozenset(forbidden)
    WATCH.folder = os.path.realpath(folder)
    try:
        yield
    finally:
        WATCH.folder = None
    if WATCH.seen:
        raise HarmError(f"opened {WATCH.seen}")


@contextmanager
def bounded() -> Iterator[None]:
    """Let memory and time stay within their bounds."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, start_s = _memory("VmRSS"), time.monotonic()
    yield
    taken, took_s = _memory("VmHWM") - before, time.monotonic() - start_s
    if taken > MOST_MEMORY:
        raise HarmError(f"took {taken >> 20} MiB of memory")
    if took_s > MOST_SECONDS:
        raise HarmError(f"took {took_s:.1f} s")


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    raise HarmError(f"no {name} in /proc/self/status")


class Driver:
    """One image on its way through everything.

    Attributes:
        path: The image.
        opened: Whether it could be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.opened = False

    async def run(self) -> None:
        """Do everything; anything but a typed error is raised as it comes."""
        self._try(self._describe)
        self._try(partial(check_image, self.path))
        await self._try_async(self._read_only)
        await self._try_async(self._writable)
        self._try(partial(check_image, self.path))
        self._try(partial(self._repair, everything=False))
        self._try(partial(self._repair, everything=True))
        await self._try_async(self._writable)
        self._try(self._describe)

    def _describe(self) -> None:
        info = image_info(self.path)
        info.as_json()
        info.as_text()

    def _repair(self, *, everything: bool) -> None:
        repair_image(self.path, everything=everything, agree=lambda _: True)

    async def _read_only(self) -> None:
        async with open_image(self.path, read_only=True) as image:
            for offset in _offsets(image):
                left = image.size - offset
                await self._try_async(partial(image.read, offset, min(5000, left)))
                await self._try_async(partial(image.block_status, offset, left))
            if isinstance(image, Qcow2Image):
                await self._try_async(image.snapshots)
            if image.size <= _MOST_COPIED:
                await self._try_async(partial(self._map, image))
                for target in (Target(format="raw"), Target(compression="zlib")):
                    await self._try_async(partial(self._convert, image, target))
        await self._try_async(self._snapshot)

    async def _snapshot(self) -> None:
        async with open_image(self.path, read_only=True, snapshot="one") as image:
            await image.read(0, min(5000, image.size))

    async def _map(self, image: BlockDevice) -> None:
        async for _ in map_entries(image):
            pass

    async def _convert(self, image: BlockDevice, target: Target) -> None:
        out = self.path.with_name("copy")
        try:
            await convert_to_file(image, out, target, progress=lambda _: None)
        finally:
            out.unlink(missing_ok=True)

    async def _writable(self) -> None:
        async with open_image(self.path) as image:
            self.opened = True
            await asyncio.gather(*map(self._try_async, _requests(image)))
            await self._try_async(image.flush)
            if isinstance(image, Qcow2Image):
                grown = min(image.size + 100 * KIB, 1 << 40)
                await self._try_async(partial(image.create_snapshot, "new"))
                await self._try_async(partial(image.write, 700, b"after"))
                await self._try_async(partial(image.apply_snapshot, "one"))
                await self._try_async(partial(image.delete_snapshot, "one"))
                await self._try_async(partial(image.resize, grown))

    def _try(self, step: Callable[[], object]) -> None:
        try:
            step()
        except (ImageError, RequestError, ConfigError, OSError) as error:
            require_line(error)

    async def _try_async(self, step: Step) -> None:
        try:
            await step()
        except (ImageError, RequestError, ConfigError, OSError) as error:
            require_line(error)


def _requests(image: BlockDevice) -> Iterator[Step]:
    """Yield requests that meet each other."""
    for offset in _offsets(image):
        length = min(9000, image.size - offset)
        yield partial(image.write, offset, b"w" * length)
        yield partial(image.read, offset, length)
        yield partial(image.write_zeroes, offset, length)
        yield partial(image.write_zeroes, offset, length, may_unmap=False)
        yield partial(image.trim, offset, length, fua=True)
        yield partial(image.write, offset, b"v" * length, fua=True)
        yield partial(image.block_status, offset, length)
    if image.size <= _MOST_COPIED:
        yield partial(image.trim, 0, image.size)


def _offsets(image: BlockDevice) -> list[int]:
    """Return where to look: the front, the middle and the end."""
    places = [0, 1000, 30 * KIB, 100 * KIB, 250 * KIB, image.size // 2]
    return [at for at in [*places, image.size - 700] if 0 <= at < image.size]


def require_line(error: Exception) -> None:
    """An error is one line that says something; a system call's has a number."""
    if isinstance(error, OSError) and error.errno is None:
        raise HarmError(f"an OSError without a number: {error!r}") from error
    if not str(error).strip() or "\n" in str(error):
        raise HarmError(f"an error that is not a line: {error!r}") from error
