"""Meta contexts as clients list, select and use them."""

import pytest

from nbdserve.block.extents import Extent
from nbdserve.exports.export import Export
from nbdserve.wire.client_handshake import contexts_data
from nbdserve.wire.constants import BASE_ALLOCATION, Option
from tests.server.conftest import MIB, Running
from tests.server.memory_disk import MemoryDisk

DEPTH = "qemu:allocation-depth"
B0, B1 = "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1"
ALL = [BASE_ALLOCATION, DEPTH, B0, B1]


@pytest.fixture
def tracked(running: Running) -> MemoryDisk:
    disk = MemoryDisk(MIB)
    running.registry.add(
        Export("tracked", disk, allocation_depth=True, bitmaps=["b0", "b1"])
    )
    return disk


@pytest.mark.parametrize(
    ("queries", "listed", "selected"),
    [
        ([], ALL, []),
        (["base:"], [BASE_ALLOCATION], []),
        (["qemu:"], [DEPTH, B0, B1], []),
        (["qemu:dirty-bitmap:"], [B0, B1], []),
        (["qemu:dirty-bitmap:b"], [], []),
        (["qemu:dirty-bitmap:b1", B1], [B1], [B1]),
        ([DEPTH, "other:thing", "base:allocation"], *[[BASE_ALLOCATION, DEPTH]] * 2),
        (["nonsense", ":", ""], [], []),
    ],
)
async def test_queries(
    running: Running,
    tracked: MemoryDisk,
    queries: list[str],
    listed: list[str],
    selected: list[str],
) -> None:
    client = await running.connect()
    await client.option(Option.STRUCTURED_REPLY)
    data = contexts_data("tracked", queries)
    found = (await client.option(Option.LIST_META_CONTEXT, data)).contexts
    assert [context.name for context in found] == listed
    chosen = (await client.option(Option.SET_META_CONTEXT, data)).contexts
    assert [context.name for context in chosen] == selected


async def test_contexts_are_offered_only_where_the_operator_asked(
    running: Running, tracked: MemoryDisk
) -> None:
    client = await running.connect()
    await client.option(Option.STRUCTURED_REPLY)
    found = await client.option(Option.LIST_META_CONTEXT, contexts_data("disk", []))
    assert [context.name for context in found.contexts] == [BASE_ALLOCATION]


async def test_several_contexts_in_one_reply(
    running: Running, tracked: MemoryDisk
) -> None:
    tracked.extents = [
        Extent(65536, data=True, zero=False),
        Extent(65536, data=True, zero=False, depth=2),
        Extent(MIB - 131072, data=False, zero=True, present=False),
    ]
    client = await running.connect()
    await client.go("tracked", contexts=reversed(ALL))
    await client.write(65536, b"x")
    statuses = await client.block_statuses(0, MIB)
    dirty = [(65536, 0), (65536, 1), (MIB - 131072, 0)]
    assert statuses == {
        BASE_ALLOCATION: [(131072, 0), (MIB - 131072, 3)],
        DEPTH: [(65536, 1), (65536, 3), (MIB - 131072, 0)],
        B0: dirty,
        B1: dirty,
    }
