"""How quick encryption is, on one core: `python -m tests.bench.encryption`.

The cipher alone, and reads and writes in place of a LUKS image in the page cache through
the engine. Figures are MB for each second of processor time, so that threads do not
flatter them, and microseconds for small requests.
"""

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import nbdserve
from nbdserve.block.device import BlockDevice
from nbdserve.formats.create import create_image
from nbdserve.formats.crypto.luks import CipherSpec
from nbdserve.formats.crypto.new_luks import new_luks
from nbdserve.formats.crypto.secret import Secret
from nbdserve.formats.crypto.sector_cipher import sector_cipher

MIB = 1 << 20
SIZE = 128 * MIB
ROUNDS = 5

CIPHERS = {
    "aes-256-xts-plain64": CipherSpec("aes", "xts", "plain64", "", 64),
    "aes-128-cbc-plain64 (legacy)": CipherSpec("aes", "cbc", "plain64", "", 16),
}


def main() -> int:
    """Print a line for each figure."""
    for name, spec in CIPHERS.items():
        cipher = sector_cipher(spec, os.urandom(spec.key_bytes))
        for length in (MIB, 4096):
            view = memoryview(bytearray(length))
            for verb in (cipher.decrypt, cipher.encrypt):
                show(f"{name}, {verb.__name__}", length, timed(verb, view))
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(engine(Path(folder) / "disk.qcow2"))
    return 0


def timed(verb: Callable[[memoryview, int], None], view: memoryview) -> float:
    """Return the processor seconds of one call, the best of several rounds."""
    best = float("inf")
    count = max(16 * MIB // len(view), 1)
    for _ in range(ROUNDS):
        start_s = time.process_time()
        for number in range(count):
            verb(view, number)
        best = min(best, (time.process_time() - start_s) / count)
    return best


async def engine(path: Path) -> None:
    """Measure requests of a LUKS image."""
    secret = b"bench"
    luks = new_luks(Secret(secret), iter_time_ms=1)
    create_image(path, SIZE, encryption=luks)
    async with nbdserve.open_image(path, secrets=[secret]) as image:
        data = os.urandom(MIB)
        for offset in range(0, SIZE, MIB):
            await image.write(offset, data)
        await image.flush()
        for length in (MIB, 4096):
            buffer = memoryview(bytearray(length))
            read = partial(read_at, image, buffer)
            taken_s = await timed_requests(image, length, read)
            show("LUKS image, read", length, taken_s)
            write = partial(write_at, image, data[:length])
            taken_s = await timed_requests(image, length, write)
            show("LUKS image, write in place", length, taken_s)


async def read_at(image: BlockDevice, buffer: memoryview, offset: int) -> None:
    """Read once."""
    await image.read_into(offset, buffer)


async def write_at(image: BlockDevice, data: bytes, offset: int) -> None:
    """Write once."""
    await image.write(offset, data)


async def timed_requests(
    image: BlockDevice, length: int, request: Callable[[int], Awaitable[object]]
) -> float:
    """Return the processor seconds of one request, the best of several rounds."""
    best = float("inf")
    count = min(image.size // length, 2000)
    for _ in range(ROUNDS):
        start_s = time.process_time()
        for number in range(count):
            await request(number * length)
        best = min(best, (time.process_time() - start_s) / count)
    return best


def show(what: str, length: int, taken_s: float) -> None:
    """Print one figure."""
    if length >= MIB:
        figure = f"{length / taken_s / 1e6:6.0f} MB/s"
    else:
        figure = f"{taken_s * 1e6:6.1f} us"
    size = "1 MiB" if length >= MIB else "4 KiB"
    sys.stdout.write(f"{what + ', ' + size:50} {figure}\n")


if __name__ == "__main__":
    sys.exit(main())
