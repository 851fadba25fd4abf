"""A client with much to do does not keep another one waiting; asserted by order, not by time."""

import asyncio
import math

import pytest

from nbdserve.server.connection import Connection
from nbdserve.storage.company import MODEST, SHORT_TURN_BYTES, company
from nbdserve.wire.client_transmission import Reply
from nbdserve.wire.constants import Command
from tests.helpers.nbd_client import NbdClient
from tests.server.conftest import Running, until

COUNT = 512  # far more than a short turn takes
BLOCK = 512  # so that much of a burst arrives at once


@pytest.fixture(autouse=True)
def nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests had clients as well."""
    monkeypatch.setattr(company, "modest", None)
    monkeypatch.setattr(company, "until_s", 0.0)


async def write_burst(client: NbdClient, count: int) -> list[asyncio.Future[Reply]]:
    """Queue `count` writes, and return what waits for their replies."""
    cookies = [
        client.transmission.request(
            Command.WRITE, offset=number * BLOCK, length=BLOCK, payload=b"\1" * BLOCK
        )
        for number in range(count)
    ]
    return [client.reply_to(cookie) for cookie in cookies]


async def test_a_burst_lets_a_modest_client_in(running: Running) -> None:
    busy, other = await running.client(), await running.client()
    await other.write(0, b"\0" * BLOCK)
    assert company.present()
    company.until_s = math.inf
    running.disk.calls.clear()
    replies = await write_burst(busy, COUNT)
    last = other.write(COUNT * BLOCK, b"\2" * BLOCK)
    await asyncio.gather(busy.send_queued(), last)
    await asyncio.gather(*replies)
    order = [call[1] for call in running.disk.calls]
    assert set(order) == {number * BLOCK for number in range(COUNT + 1)}
    assert order.index(COUNT * BLOCK) < COUNT - 1


async def test_who_is_alone_has_long_turns(running: Running) -> None:
    client = await running.client()
    await client.write(0, b"\0" * BLOCK)
    company.until_s = math.inf
    replies = await write_burst(client, COUNT)
    await client.send_queued()
    await asyncio.gather(*replies)
    (mine,) = running.server._connections
    assert isinstance(mine, Connection)
    assert not mine._crowded


@pytest.mark.parametrize("much", ["many requests", "many bytes"])
async def test_who_asks_for_much_is_not_modest(running: Running, much: str) -> None:
    client = await running.client()
    if much == "many bytes":
        await client.read(0, SHORT_TURN_BYTES + 1)
        assert not company.present()
        return
    for _ in range(8):
        replies = await write_burst(client, 8 * MODEST)
        await client.send_queued()
        await asyncio.gather(*replies)
    company.until_s = 0.0
    replies = await write_burst(client, 8 * MODEST)
    await client.send_queued()
    await asyncio.gather(*replies)
    assert not company.present()


async def test_who_left_is_no_company(running: Running) -> None:
    client = await running.client()
    await client.read(0, BLOCK)
    assert company.present()
    await client.disconnect()
    await until(lambda: not company.present(), "the end of the connection")
