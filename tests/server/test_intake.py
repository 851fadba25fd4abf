"""Payloads of large writes that go from the socket into a file past the server's memory."""

import asyncio
import errno
import os
import random
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdserve.block.layers.dirty import DirtyTracking
from nbdserve.block.layers.guarded import Guarded
from nbdserve.block.layers.window import Window
from nbdserve.block.loan import Piece
from nbdserve.exports.export import Export
from nbdserve.formats.open import open_image
from nbdserve.formats.raw import RawImage
from nbdserve.server.intake import IN_PLACE
from nbdserve.storage.file import FileStorage
from nbdserve.wire.constants import REQUEST_MAGIC, Command
from nbdserve.wire.requests import REQUEST
from tests.helpers.nbd_client import NbdClient, NbdRequestFailed, error_name
from tests.helpers.tools import run
from tests.server.conftest import MIB, Running, until
from tests.server.memory_disk import MemoryDisk
from tests.server.test_exchange import opens

KIB = 1 << 10


class PlacedDisk(MemoryDisk):
    """A disk whose bytes below `in_place` are in a file, and the others in memory."""

    def __init__(self, storage: FileStorage, size: int) -> None:
        super().__init__(size)
        self.storage = storage
        self.in_place = size
        self.placed = 0

    def place(self, offset: int, length: int) -> Piece | None:
        if offset >= self.in_place or not self.storage.takes_pipes():
            return None
        self.placed += 1
        # as if every cluster of 64 KiB were elsewhere, now and then
        room = 64 * KIB - offset % (64 * KIB) if self.placed % 3 else length
        return self.storage, offset, min(length, room, self.in_place - offset)

    async def write(
        self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False
    ) -> None:
        in_file = max(0, min(len(data), self.in_place - offset))
        if in_file:
            await self.storage.put(offset, data[:in_file])
        await super().write(offset + in_file, data[in_file:], fua=fua)

    async def content(self) -> bytes:
        """What is on the disk."""
        data = bytearray(self.size)
        await self.storage.read(0, memoryview(data)[: self.in_place])
        data[self.in_place :] = self.data[self.in_place :]
        return bytes(data)

    async def close(self) -> None:
        await self.storage.close()
        await super().close()


@pytest.fixture
def disk(tmp_path: Path) -> MemoryDisk:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(8 * MIB))
    return PlacedDisk(FileStorage(path), 8 * MIB)


@pytest.fixture
def placed(disk: MemoryDisk) -> PlacedDisk:
    assert isinstance(disk, PlacedDisk)
    return disk


def header(offset: int, length: int) -> bytes:
    return REQUEST.pack(REQUEST_MAGIC, 0, Command.WRITE, 1, offset, length)


def payload(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("in_place", [8 * MIB, 5 * MIB + 4096, 0])
async def test_what_is_written_arrives(
    running: Running, placed: PlacedDisk, structured: bool, in_place: int
) -> None:
    placed.in_place = in_place
    client = await running.client(structured=structured)
    expected = bytearray(8 * MIB)
    chance = random.Random(in_place)
    for turn in range(8):
        writes = []
        for number in range(6):
            length = chance.choice((5, 4 * KIB, IN_PLACE - 1, IN_PLACE, MIB, 2 * MIB))
            length -= chance.choice((0, 0, 1, 4 * KIB)) % length
            offset = chance.randrange(8 * MIB - length)
            data = payload(length, 100 * turn + number)
            # this disk lets nobody wait, so the last one wins
            expected[offset : offset + length] = data
            writes.append(client.write(offset, data, fua=not chance.randrange(8)))
        await asyncio.gather(*writes)
    assert await placed.content() == expected
    story = next(iter(running.server._connections)).story
    assert story["errors"] == 0
    assert bool(placed.placed) is bool(in_place)


async def test_it_needs_no_memory(running: Running, placed: PlacedDisk) -> None:
    client = await running.client()
    data = payload(4 * MIB)
    await client._send_raw(header(MIB, len(data)) + data[:-1])
    await until(lambda: placed.placed > 10)
    await asyncio.sleep(0.05)
    assert running.server._shared.budget.used == 0
    reply = client.reply_to(client.transmission.write(MIB, data[-1:]))
    client.transmission.data_to_send()  # its header and payload: the byte that is missing
    await client._send_raw(data[-1:])
    assert not (await reply).error
    assert (await placed.content())[MIB : 5 * MIB] == data


async def test_byte_by_byte(running: Running, placed: PlacedDisk) -> None:
    client = await running.client()
    data = payload(IN_PLACE + 3)
    stream = header(77, len(data)) + data
    reply = client.reply_to(client.transmission.write(77, data))
    client.transmission.data_to_send()
    for start in [*range(40), *range(40, len(stream), 9999)]:
        end = start + 1 if start < 40 else start + 9999
        await client._send_raw(stream[start:end])
        await asyncio.sleep(0)
    assert not (await reply).error
    await client.flush()
    assert (await placed.content())[77 : 77 + len(data)] == data


@pytest.mark.parametrize("fails_from", [MIB, 2 * MIB - 1])
async def test_a_failure_ends_the_request_alone(
    running: Running,
    placed: PlacedDisk,
    monkeypatch: pytest.MonkeyPatch,
    fails_from: int,
) -> None:
    client = await running.client()
    data = payload(2 * MIB)
    write_piped = FileStorage.write_piped

    def fail(self: FileStorage, offset: int, pipe_fd: int, length: int) -> None:
        if offset + length > fails_from:
            raise OSError(errno.ENOSPC, "no space")
        write_piped(self, offset, pipe_fd, length)

    monkeypatch.setattr(FileStorage, "write_piped", fail)
    first = asyncio.create_task(client.write(0, data))
    others = [asyncio.create_task(client.write(at, data[:512])) for at in (0, 4096)]
    with pytest.raises(NbdRequestFailed) as caught:
        await first
    assert error_name(caught.value) == "ENOSPC"
    await asyncio.gather(*others)
    monkeypatch.undo()
    await client.write(MIB, data)
    assert (await placed.content())[MIB : 3 * MIB] == data


async def test_a_failure_of_what_came_with_the_header(
    running: Running, placed: PlacedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def fail(_: FileStorage, offset: int, data: bytes) -> bool:
        tried.append((offset, len(data)))
        monkeypatch.undo()
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(FileStorage, "try_write", fail)
    client = await running.client()
    data = payload(MIB)
    await client._send_raw(header(MIB, MIB) + data[:1000])
    reply = client.reply_to(client.transmission.write(MIB, data))
    client.transmission.data_to_send()
    await asyncio.sleep(0.02)
    await client._send_raw(data[1000:])
    # once more, as a whole
    assert not (await reply).error
    assert tried == [(MIB, 1000)]
    assert (await placed.content())[MIB : 2 * MIB] == data


async def test_the_rest_goes_to_memory_where_no_place_is_left(
    running: Running, placed: PlacedDisk
) -> None:
    client, other = await running.client(), await running.client()
    data = payload(4 * MIB)
    reply = client.reply_to(client.transmission.write(0, data))
    client.transmission.data_to_send()
    await client._send_raw(header(0, len(data)) + data[: 2 * MIB])
    await until(lambda: placed.placed > 5)
    await asyncio.sleep(0.02)
    placed.in_place = 2 * MIB
    budget = running.server._shared.budget
    budget.take(budget.limit)
    sending = asyncio.create_task(client._send_raw(data[2 * MIB :]))
    await asyncio.sleep(0.05)
    assert not reply.done()
    await other.write(7 * MIB, b"o" * 512)
    budget.give_back(budget.limit)
    await sending
    assert not (await reply).error
    assert (await placed.content())[: 4 * MIB] == data


async def test_who_goes_away_in_between_leaves_nothing(
    running: Running, placed: PlacedDisk
) -> None:
    client, other = await running.client(), await running.client()
    await client._send_raw(header(0, MIB) + payload(MIB)[:-5])
    await until(lambda: placed.placed > 5)
    await client.close()
    await until(lambda: running.server.connections == 1)
    await other.write(MIB, payload(MIB))
    assert (await placed.content())[MIB : 2 * MIB] == payload(MIB)


async def test_it_ends_on_the_disk_on_which_it_began(
    running: Running, placed: PlacedDisk
) -> None:
    export = running.registry.get("disk")
    assert export is not None
    client = await running.client()
    new = MemoryDisk(8 * MIB)
    data = payload(4 * MIB)
    reply = client.reply_to(client.transmission.write(0, data))
    client.transmission.data_to_send()
    await client._send_raw(header(0, len(data)) + data[:MIB])
    await until(lambda: placed.placed > 5)
    exchange = asyncio.create_task(running.server.exchange_disk(export, opens(new)))
    await asyncio.sleep(0.02)
    placed.in_place = 2 * MIB
    placed.gate = asyncio.Event()
    await client._send_raw(data[MIB:])
    await until(lambda: placed.started == 1)
    assert not exchange.done()
    content = asyncio.create_task(placed.content())
    await content
    placed.gate.set()
    assert not (await reply).error
    await exchange
    assert content.result()[: 2 * MIB] + placed.data[2 * MIB : 4 * MIB] == data
    await client.write(0, data)
    assert new.data[: 4 * MIB] == data


async def test_without_a_descriptor_for_a_pipe_it_is_received(
    running: Running, placed: PlacedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> tuple[int, int]:
        raise OSError(errno.EMFILE, "too many open files")

    client = await running.client()
    with monkeypatch.context() as context:
        context.setattr("nbdserve.server.intake.os.pipe2", refuse)
        await client.write(0, payload(MIB))
    await client.write(MIB, payload(MIB, 1))
    expected = payload(MIB) + payload(MIB, 1)
    assert (await placed.content())[: 2 * MIB] == expected


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EPERM])
async def test_without_splice_it_is_received(
    running: Running,
    placed: PlacedDisk,
    monkeypatch: pytest.MonkeyPatch,
    error: int,
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(error, "not here")

    monkeypatch.setattr("nbdserve.server.intake.os.splice", refuse)
    client = await running.client()
    data = payload(MIB)
    reply = client.reply_to(client.transmission.write(3, data))
    client.transmission.data_to_send()
    await client._send_raw(header(3, MIB) + data[:1000])
    await until(lambda: placed.placed > 0)
    await client._send_raw(data[1000:])
    assert not (await reply).error
    assert (await placed.content())[3 : 3 + MIB] == data


async def test_urgent_bytes_are_no_obstacle(
    running: Running, placed: PlacedDisk
) -> None:
    """splice(2) never gets past them, not even to the end of the stream."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        client = await running.clients.enter_async_context(
            await NbdClient.connect_tcp(*listener.getsockname())
        )
        served = running.server.welcome(*listener.accept())
    await client.go("disk")
    data = payload(MIB)
    reply = client.reply_to(client.transmission.write(0, data))
    client.transmission.data_to_send()
    await client._send_raw(header(0, MIB) + data[: MIB // 2])
    await until(lambda: placed.placed > 5)
    # what is urgent is no part of the stream
    assert client.sock.send(b"!", socket.MSG_OOB) == 1
    await client._send_raw(data[MIB // 2 :])
    assert not (await asyncio.wait_for(reply, 5)).error
    assert (await placed.content())[:MIB] == data
    await client.write(MIB, data)
    assert not served.done()


async def begin(client: NbdClient, placed: PlacedDisk, data: bytes) -> None:
    """Send the first MiB of a write, of which some goes in place."""
    await client._send_raw(header(0, len(data)) + data[:MIB])
    await until(lambda: placed.placed > 5)
    await asyncio.sleep(0.02)


async def test_who_stays_silent_does_not_keep_an_old_disk(
    running: Running, placed: PlacedDisk
) -> None:
    running.server._limits = running.server._limits.__class__(drain_timeout_s=0.4)
    export = running.registry.get("disk")
    assert export is not None
    silent, client = await running.client(), await running.client()
    await begin(silent, placed, payload(4 * MIB))
    new = MemoryDisk(8 * MIB)
    exchange = asyncio.create_task(running.server.exchange_disk(export, opens(new)))
    await asyncio.sleep(0)
    write = asyncio.create_task(client.write(MIB, b"w" * 512))
    await exchange
    await write
    assert placed.closed
    assert new.data[MIB : MIB + 512] == b"w" * 512
    assert new.data[:MIB] == bytes(MIB)
    await until(lambda: running.server.connections == 1)


async def test_a_disk_that_is_tracked_is_left_as_well(
    running: Running, placed: PlacedDisk
) -> None:
    export = Export("tracked", placed, bitmaps=["changes"])
    running.registry.add(export)
    client = await running.connect()
    await client.go("tracked")
    data = payload(4 * MIB)
    reply = client.reply_to(client.transmission.write(0, data))
    client.transmission.data_to_send()
    await begin(client, placed, data)
    new = MemoryDisk(8 * MIB)
    exchange = asyncio.create_task(running.server.exchange_disk(export, opens(new)))
    await asyncio.sleep(0.02)
    placed.in_place = 2 * MIB
    placed.gate = asyncio.Event()
    await client._send_raw(data[MIB:])
    await until(lambda: placed.started == 1)
    content = await placed.content()
    placed.gate.set()
    assert not (await reply).error
    await exchange
    assert content[: 2 * MIB] + placed.data[2 * MIB : 4 * MIB] == data
    await client.write(6 * MIB, b"new")
    assert new.data[6 * MIB : 6 * MIB + 3] == b"new"
    tracking = export.device
    assert isinstance(tracking, DirtyTracking)
    (bitmap,) = tracking.bitmaps
    dirty = dict(bitmap.dirty())
    assert dirty[0] == 4 * MIB
    assert 6 * MIB in dirty


async def test_file_systems_that_cannot(
    running: Running, placed: PlacedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    splice = os.splice

    def refuse_files(
        source: int,
        target: int,
        count: int,
        *,
        offset_dst: int | None = None,
        flags: int = 0,
    ) -> int:
        if offset_dst is not None:
            raise OSError(errno.EINVAL, "not here")
        return splice(source, target, count, flags=flags)

    monkeypatch.setattr("nbdserve.server.intake.os.splice", refuse_files)
    client = await running.client()
    data = payload(3 * MIB)
    await client.write(5, data)
    assert not placed.storage._can_splice
    assert (await placed.content())[5 : 5 + len(data)] == data


@pytest.fixture
async def raw(tmp_path: Path) -> AsyncIterator[RawImage]:
    path = tmp_path / "image.raw"
    path.write_bytes(bytes(4 * MIB))
    image = RawImage(FileStorage(path))
    yield image
    await image.close()


async def test_layers_have_their_say(raw: RawImage) -> None:
    storage = raw._storage
    assert raw.place(5, 100) == (storage, 5, 100)
    assert Window(raw, 512).place(5, 100) == (storage, 517, 100)
    assert Guarded(raw).place(511, MIB) is None
    assert Guarded(raw).place(512, MIB) == (storage, 512, MIB)
    tracking = DirtyTracking(raw, ["bitmap"])
    assert tracking.place(MIB, MIB) == (storage, MIB, MIB)
    (bitmap,) = tracking.bitmaps
    assert list(bitmap.dirty()) == [(MIB, MIB)]
    assert MemoryDisk(MIB).place(0, MIB) is None


async def test_raw_files_that_need_more_than_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "image.raw"
    path.write_bytes(bytes(MIB))
    for image in (
        RawImage(FileStorage(path, lock=False), writethrough=True),
        RawImage(FileStorage(path, read_only=True, lock=False)),
    ):
        assert image.place(0, MIB) is None
        await image.close()


async def test_only_clusters_of_our_own(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
    run("qemu-io", "-f", "qcow2", "-c", "write 0 2M", "-c", "write 4M 1M", path)
    run("qemu-img", "snapshot", "-c", "kept", path)
    run("qemu-io", "-f", "qcow2", "-c", "write 0 2M", path)
    image = await open_image(path)
    assert image.place(0, MIB) is None  # no table is in memory
    await image.write(0, b"x")
    place = image.place(64 * KIB + 5, MIB)
    assert place is not None
    assert place[2] == MIB
    assert image.place(4 * MIB, MIB) is None  # a snapshot has it too
    assert image.place(2 * MIB, MIB) is None  # nothing is there
    storage, host_offset, _ = place
    assert storage.try_write(host_offset, b"y" * MIB)
    expected = b"x".ljust(64 * KIB + 5, b"\xcd") + b"y" * MIB
    assert await image.read(0, len(expected)) == expected
    await image.close()
    run("qemu-img", "check", "-q", path)
    image = await open_image(path, cache="writethrough")
    await image.write(0, b"x")
    assert image.place(0, MIB) is None
    await image.close()
