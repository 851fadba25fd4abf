"""Conversations with mistakes in them, and plain noise, against a server in memory.

A structured fuzzer: valid conversations of both phases, of which some bytes are changed,
left out or doubled. The server may answer, refuse or hang up; it must not raise anything
but its own errors, hang, or leak. Every failure names the seed that repeats it.
NBDSERVE_FULL=1 sends more than two million messages.
"""

import asyncio
import os
import random
import struct
from collections.abc import Callable, MutableMapping
from typing import Any

import pytest

from nbdserve.errors import ProtocolError
from nbdserve.exports.export import Export
from nbdserve.server.limits import Limits
from nbdserve.wire.client_handshake import contexts_data, info_data
from nbdserve.wire.constants import (
    EXTENDED_REQUEST_MAGIC,
    IHAVEOPT,
    REQUEST_MAGIC,
    Command,
    CommandFlag,
    Info,
    Option,
    OptionReply,
)
from nbdserve.wire.handshake import (
    ContextsAsked,
    ExportInfo,
    ExportsAsked,
    HandshakeState,
    ServerHandshake,
)
from nbdserve.wire.options import OPTION
from nbdserve.wire.requests import EXTENDED_REQUEST, REQUEST
from tests.server.conftest import Running
from tests.server.memory_disk import MemoryDisk

FULL = os.environ.get("NBDSERVE_FULL") == "1"
#: Of each of the two loops, over sockets.
MESSAGES = 600_000 if FULL else 150_000
#: Without sockets.
HANDSHAKE_MESSAGES = 1_000_000 if FULL else 200_000
#: Conversations that go on at the same time.
AT_ONCE = 8

EDGES = [0, 1, 2, 7, 8, 12, 16, 255, 512, 4096, 32768, 32769, 65536, 1 << 20,
         (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, (1 << 64) - 1]  # fmt: skip
NAMES = ["disk", "", "other", "x" * 4096, "x" * 4097, "\N{SNOWMAN}"]
QUERIES = ["base:allocation", "base:", "qemu:", "qemu:dirty-bitmap:b", "nonsense", ":"]
DISK = ExportInfo("disk", 4 << 20, 1, "a disk", meta_contexts=("base:allocation",))


class Author:
    """Writes messages, most of them right."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        #: the part of its messages that have a mistake
        self.mistakes = self.dice.choice([0, 0.01, 0.05, 0.3])

    def mutated(self, message: bytes) -> bytes:
        """A message as it is, or with one mistake."""
        dice = self.dice
        if not message or dice.random() >= self.mistakes:
            return message
        data = bytearray(message)
        start = dice.randrange(len(data))
        match dice.randrange(6):
            case 0:
                data[start] ^= 1 << dice.randrange(8)
            case 1:
                del data[start : start + dice.choice([1, 4, 16])]
            case 2:
                data[start:start] = dice.randbytes(dice.choice([1, 4, 16]))
            case 3:
                data += data[start:]
            case 4:
                wide = dice.choice([">H", ">I", ">Q"])
                edge = dice.choice(EDGES) % (1 << 8 * struct.calcsize(wide))
                data[start : start + struct.calcsize(wide)] = struct.pack(wide, edge)
            case _:
                return dice.randbytes(dice.choice([1, 28, 32, 200, 3000]))
        return bytes(data)

    def option(self) -> bytes:
        """One option of the handshake; seldom one that ends it."""
        dice = self.dice
        number: int = dice.choice(
            [3, 6, 6, 8, 9, 10, 10, 11, 4, 5, 99, dice.randrange(1 << 32)]
        )
        if dice.random() < 0.02:
            number = dice.choice([Option.GO, Option.ABORT, Option.EXPORT_NAME])
        name = dice.choice(NAMES)
        if number in {Option.INFO, Option.GO}:
            data = info_data(name, dice.sample(list(Info), dice.randrange(4)))
        elif number in {Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT}:
            data = contexts_data(name, dice.choices(QUERIES, k=dice.randrange(5)))
        elif number == Option.EXPORT_NAME:
            data = name.encode()
        else:
            data = dice.choice([b"", b"", b"", dice.randbytes(dice.choice([1, 2000]))])
        return self.mutated(OPTION.pack(IHAVEOPT, number, len(data)) + data)

    def request(self, *, extended: bool) -> bytes:
        """One request of the transmission phase; seldom one that ends it."""
        dice = self.dice
        command: int = dice.choice(
            [0, 0, 1, 1, 3, 4, 5, 6, 7, 7, dice.randrange(1 << 16)]
        )
        flags = dice.choice([0, 0, 0, 1, 2, 4, 8, 16, 32, dice.randrange(1 << 16)])
        if dice.random() < 0.002:
            command = Command.DISC
        offset = dice.choice([dice.randrange(4 << 20), dice.choice(EDGES)])
        length = dice.choice([dice.randrange(3000), dice.choice(EDGES)])
        payload = b""
        if command == Command.WRITE and dice.random() < 0.98:
            flags |= CommandFlag.PAYLOAD_LEN if extended else 0
            length = dice.choice([0, 1, 512, 4096, 40_000])
            payload = dice.randbytes(length)
        elif flags & CommandFlag.PAYLOAD_LEN and extended:
            ids = dice.choices(range(4), k=dice.randrange(4))
            payload = struct.pack(f">Q{len(ids)}I", dice.randrange(1, 1 << 20), *ids)
            length = len(payload)
        elif not extended:
            length %= 1 << 32
        layout, magic = (
            (EXTENDED_REQUEST, EXTENDED_REQUEST_MAGIC)
            if extended
            else (REQUEST, REQUEST_MAGIC)
        )
        cookie = dice.randrange(1 << 64)
        header = layout.pack(magic, flags, command, cookie, offset, length)
        return self.mutated(header + payload)


def answer(handshake: ServerHandshake) -> None:
    """Answer whatever is asked, as the server does."""
    while (ask := handshake.next_ask()) is not None:
        if isinstance(ask, ExportsAsked):
            handshake.list_exports([("disk", "a disk"), ("", "")])
            handshake.end_list()
        elif ask.name not in {"disk", ""}:
            handshake.refuse(OptionReply.ERR_UNKNOWN, "no such export")
        elif isinstance(ask, ContextsAsked):
            handshake.answer_contexts(DISK)
        else:
            handshake.answer_export(DISK)


@pytest.mark.timeout(900 if FULL else 60)
def test_the_option_phase() -> None:
    sent = seed = 0
    while sent < HANDSHAKE_MESSAGES:
        author = Author(seed)
        handshake = ServerHandshake()
        handshake.feed(author.mutated(struct.pack(">I", author.dice.choice([1, 3, 3]))))
        for _ in range(30):
            sent += 1
            handshake.feed(author.option())
            try:
                answer(handshake)
            except ProtocolError:
                break
            except Exception as failure:
                raise AssertionError(f"seed {seed}") from failure
            assert len(handshake.data_to_send()) < 1 << 20
            if handshake.state is not HandshakeState.OPTIONS:
                break
        seed += 1
    print(f"option phase: {sent} messages, {seed} handshakes")  # noqa: T201


class Talk:
    """One conversation over a socket, from the first byte to its end."""

    def __init__(self, running: Running, seed: int) -> None:
        self.running = running
        self.author = Author(seed)
        self.sent = 0

    async def run(self) -> None:
        client = await self.running.connect()
        reader = asyncio.create_task(self._swallow(client.sock))
        try:
            async with asyncio.timeout(20):
                for _ in range(200):
                    self.sent += 1
                    await client._send_raw(self._next())
                    if reader.done():
                        break
                client.sock.shutdown(1)
                await reader
        except OSError:
            pass  # hung up
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            client.sock.close()

    def _next(self) -> bytes:
        dice = self.author.dice
        if self.sent == 1:
            self.extended = dice.random() < 0.5
            self.options = dice.choice([0, 0, 1, 10, 60])
            return self.author.mutated(struct.pack(">I", dice.choice([1, 3, 3])))
        if self.options > 0:
            self.options -= 1
            return self.author.option()
        if not self.options:
            self.options = -1
            return self._choose()
        return self.author.request(extended=self.extended)

    def _choose(self) -> bytes:
        """Enter the transmission phase, without a mistake."""
        mode = Option.EXTENDED_HEADERS if self.extended else Option.STRUCTURED_REPLY
        message = b""
        for option, data in [
            (mode, b""),
            (Option.SET_META_CONTEXT, contexts_data("disk", QUERIES)),
            (Option.GO, info_data("disk")),
        ]:
            message += OPTION.pack(IHAVEOPT, option, len(data)) + data
        return message

    @staticmethod
    async def _swallow(sock: Any) -> None:
        loop = asyncio.get_running_loop()
        while await loop.sock_recv(sock, 1 << 20):
            pass


@pytest.mark.timeout(900 if FULL else 60)
@pytest.mark.parametrize(
    "limits",
    [Limits(linger_s=0.05, total_bytes_in_flight=8 << 20, requests_in_flight=9)],
)
async def test_both_phases_over_sockets(
    running: Running, logs: list[MutableMapping[str, Any]]
) -> None:
    loop = asyncio.get_running_loop()
    loop.set_debug(False)
    complaints: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    disk = MemoryDisk(4 << 20)
    running.registry._exports["disk"] = Export("disk", disk, bitmaps=["b"])
    await running.disk.close()
    shake: Callable[[], float] = random.Random(1).random

    async def hesitate() -> None:
        if shake() < 0.2:
            await asyncio.sleep(0)

    disk._pass = hesitate  # type: ignore[method-assign]
    sent = seed = requests = 0
    while sent < MESSAGES:
        talks = [Talk(running, seed + number) for number in range(AT_ONCE)]
        await asyncio.gather(*(talk.run() for talk in talks))
        sent += sum(talk.sent for talk in talks)
        seeds = f"seeds {seed} to {seed + AT_ONCE}"
        bugs = [log for log in logs if log["log_level"] in {"error", "critical"}]
        assert not bugs, seeds
        assert not complaints, seeds
        requests += sum(log.get("requests", 0) for log in logs)
        seed += AT_ONCE
        logs.clear()
    print(f"both phases: {sent} messages, {requests} requests carried out")  # noqa: T201
    assert requests > sent // 5, "the server takes hardly any: the fuzzer is blunt"
    client = await running.client()  # in good health
    await client.write(0, b"well")
    assert await client.read(0, 4) == b"well"
