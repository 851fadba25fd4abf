"""SIGKILL of a server while many writes are in flight, again and again.

The page cache survives: every acknowledged write is there after the restart, and
each sector of one that was in flight is the old or the new one. NBDSERVE_FULL=1 runs
more than a hundred rounds.
"""

import asyncio
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import pytest

from nbdserve.wire.constants import CommandFlag
from tests.helpers.nbd_client import NbdClient
from tests.helpers.servers import Server, nbdserve
from tests.helpers.tools import run

FULL = bool(os.environ.get("NBDSERVE_FULL"))
ROUNDS = 20 if FULL else 2
SIZE = 4 << 20
SECTOR = 512
WRITERS = 8

pytestmark = [pytest.mark.interop, pytest.mark.timeout(900 if FULL else 60)]


@dataclass
class Expected:
    """What each sector may hold.

    Attributes:
        content: What was acknowledged last.
        in_flight: Sector to what unacknowledged requests would put there.
        acknowledged: How many requests were.
    """

    content: bytearray
    in_flight: dict[int, list[bytes]] = field(default_factory=dict)
    acknowledged: int = 0

    def begin(self, offset: int, data: bytes) -> None:
        for at in range(0, len(data), SECTOR):
            piece = data[at : at + SECTOR]
            self.in_flight.setdefault((offset + at) // SECTOR, []).append(piece)

    def acknowledge(self, offset: int, data: bytes) -> None:
        for at in range(0, len(data), SECTOR):
            sector = (offset + at) // SECTOR
            self.in_flight[sector].remove(data[at : at + SECTOR])
            if not self.in_flight[sector]:
                del self.in_flight[sector]
        self.content[offset : offset + len(data)] = data
        self.acknowledged += 1

    def judge(self, found: bytes) -> None:
        for start in range(0, SIZE, SECTOR):
            piece = found[start : start + SECTOR]
            if piece != self.content[start : start + SECTOR]:
                allowed = self.in_flight.get(start // SECTOR, [])
                assert piece in allowed, f"the sector at {start:#x} is nobody's"
        self.content[:] = found
        self.in_flight.clear()


async def load(
    socket: Path,
    expected: Expected,
    generator: random.Random,
    begun: Callable[[], object],
) -> None:
    """Write until the connection breaks; no two requests in flight overlap.

    `begun` is called when the first request is about to be sent.
    """
    lanes = SIZE // WRITERS
    async with await NbdClient.connect_unix(socket) as client:
        await client.go("disk")
        begun()

        async def lane(number: int) -> None:
            while True:
                offset = generator.randrange(lanes // SECTOR) * SECTOR
                length = generator.choice([SECTOR, 8 * SECTOR, 100 * SECTOR])
                length = min(length, lanes - offset)
                offset += number * lanes
                kind = generator.random()
                zeroes = kind < 0.15
                data = bytes(length) if zeroes else generator.randbytes(length)
                expected.begin(offset, data)
                if zeroes:
                    await client.write_zeroes(offset, length)
                else:
                    fua = CommandFlag.FUA if kind > 0.97 else 0
                    await client.write(offset, data, fua=bool(fua))
                expected.acknowledge(offset, data)
                if kind > 0.99:
                    await client.flush()

        ended = await asyncio.gather(
            *(lane(number) for number in range(WRITERS)), return_exceptions=True
        )
        for reason in ended:
            assert isinstance(reason, ConnectionError), reason


async def load_until_killed(
    server: Server, expected: Expected, generator: random.Random
) -> None:
    assert server.unix is not None
    delay = generator.uniform(0.05, 0.4)
    loop = asyncio.get_running_loop()
    begun = partial(loop.call_later, delay, server.kill)
    async with asyncio.timeout(30):
        await load(server.unix, expected, generator, begun)


async def read_all(socket: Path) -> bytes:
    async with await NbdClient.connect_unix(socket) as client:
        await client.go("disk")
        return await client.read(0, SIZE)


def prepare(kind: str, folder: Path) -> tuple[Path, str, bytearray]:
    """Make an image; return its path, its format and its content."""
    content = bytearray(SIZE)
    if kind == "fresh":
        path = folder / "disk.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE))
        return path, "qcow2", content
    if kind == "data-file":
        path = folder / "disk.qcow2"
        options = f"data_file={folder / 'disk.data'}"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(SIZE))
        return path, "qcow2", content
    generator = random.Random(11)
    content[: SIZE * 3 // 4] = generator.randbytes(SIZE * 3 // 4)
    base = folder / "base.raw"
    base.write_bytes(content)
    fmt = "qcow" if kind == "overlay-qcow" else "qcow2"
    path = folder / f"disk.{fmt}"
    argv = ["qemu-img", "create", "-q", "-f", fmt, "-b", base.name, "-F", "raw"]
    if kind == "overlay-subclusters":
        argv += ["-o", "extended_l2=on"]
    run(*argv, path, str(SIZE))
    return path, fmt, content


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        *product(("fresh", "overlay", "overlay-qcow"), ("with state", "without state")),
        ("overlay-subclusters", "with state"),
        ("data-file", "with state"),
    ],
)
def test_acknowledged_writes_survive(
    kind: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fmt, content = prepare(kind, tmp_path)
    expected = Expected(content)
    seed = random.SystemRandom().randrange(1 << 32) if FULL else 1
    generator = random.Random(seed)
    options: list[str] = []
    if state == "with state":
        (tmp_path / "state").mkdir()
        options = ["--state-dir", str(tmp_path / "state")]
    else:  # in a container the server trusts no tmpfs to outlive it
        monkeypatch.setenv("container", "test")
        monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    if kind == "data-file":
        options += ["--allow-data-file", str(tmp_path)]
    for number in range(ROUNDS):
        server = nbdserve(
            path, tmp_path / f"run-{number}", transports=["unix"], options=options
        ).start()
        try:
            asyncio.run(load_until_killed(server, expected, generator))
        finally:
            server.kill()
        if fmt == "qcow2":
            run("qemu-img", "check", path, expect=[0, 3])
        # read by a second server, which also replays; it is killed in its turn
        again = nbdserve(
            path, tmp_path / f"judge-{number}", transports=["unix"], options=options
        ).start()
        try:
            assert again.unix is not None
            expected.judge(asyncio.run(read_all(again.unix)))
        finally:
            again.kill()
    assert expected.acknowledged > 10 * ROUNDS
    last = nbdserve(path, tmp_path / "last", transports=["unix"], options=options)
    with last:
        assert last.unix is not None
        assert asyncio.run(read_all(last.unix)) == expected.content
    mirror = tmp_path / "mirror.raw"
    mirror.write_bytes(expected.content)
    run("qemu-img", "compare", "-f", fmt, "-F", "raw", path, mirror)
    if fmt == "qcow2":
        # crashes leak reserved clusters, nothing else
        run("qemu-img", "check", path, expect=[0, 3])
