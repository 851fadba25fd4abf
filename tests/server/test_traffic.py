"""Random traffic against a model: no reply may contain another request's bytes."""

import asyncio
import random
from collections.abc import Sequence
from itertools import pairwise

import pytest

from nbdserve.block.device import Hole
from nbdserve.server.limits import Limits
from tests.helpers.nbd_client import NbdClient
from tests.server.conftest import Running
from tests.server.memory_disk import MemoryDisk

REGION = 1 << 20


class Moody(MemoryDisk):
    """A disk of which every third call waits for some turns of the loop."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.dice = random.Random(size)

    async def _wait(self) -> None:
        if self.dice.random() < 0.3:
            for _ in range(self.dice.randrange(6)):
                await asyncio.sleep(0)

    async def read_into(self, offset: int, buffer: memoryview) -> Sequence[Hole]:
        await self._wait()
        holes = await super().read_into(offset, buffer)
        await self._wait()
        return holes

    async def write(
        self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False
    ) -> None:
        await self._wait()
        await super().write(offset, data, fua=fua)
        await self._wait()


@pytest.fixture
def disk() -> MemoryDisk:
    return Moody(4 * REGION)


async def traffic(client: NbdClient, base: int, seed: int) -> None:
    """Write and read pieces of one's own region, several at a time, and compare."""
    dice = random.Random(seed)
    model = bytearray(REGION)
    for _ in range(25):
        # pieces that do not overlap, so that the order of the replies doesn't matter
        cuts = sorted(dice.sample(range(REGION), dice.choice([2, 9, 40])))
        tasks = []
        for start, end in pairwise(cuts):
            length = min(end - start, dice.choice([1, 512, 4096, 40_000, 300_000]))
            if dice.random() < 0.5:
                data = dice.randbytes(length)
                model[start : start + length] = data
                tasks.append(client.write(base + start, data))
            else:
                expected = bytes(model[start : start + length])
                tasks.append(check(client, base + start, expected))
        await asyncio.gather(*tasks)
    assert await client.read(base, REGION) == model


async def check(client: NbdClient, offset: int, expected: bytes) -> None:
    assert await client.read(offset, len(expected)) == expected


@pytest.mark.parametrize(
    "limits",
    [
        Limits(linger_s=0.1),
        Limits(linger_s=0.1, requests_in_flight=3, bytes_in_flight=100_000),
        Limits(linger_s=0.1, total_bytes_in_flight=50_000, turn_bytes=10_000),
    ],
)
async def test_random_traffic(running: Running) -> None:
    # a stack kept for every callback makes this forty times slower
    asyncio.get_running_loop().set_debug(False)
    clients = [await running.client(structured=bool(n % 2)) for n in range(3)]
    clients.append(await running.connect())
    await clients[-1].go("disk", extended=True)
    await asyncio.gather(
        *(traffic(client, n * REGION, n) for n, client in enumerate(clients))
    )
