"""A disk in memory whose calls can be made to wait or fail."""

import asyncio  # noqa: TC003
from collections.abc import Sequence

from nbdserve.block.device import BlockDevice, Hole
from nbdserve.block.extents import Extent


class MemoryDisk(BlockDevice):
    """A bytearray; `holes` are ranges (offset, length) that it reports as such.

    While `gate` is set to an event, each call that changes or reads data waits for it.
    `failure` is raised by each call once the gate is passed.
    """

    def __init__(self, size: int, *, read_only: bool = False) -> None:
        self.data = bytearray(size)
        self.size = size
        self.read_only = read_only
        self.preferred_block = 4096
        self.can_trim = True
        self.can_fast_zero = True
        self.holes: list[tuple[int, int]] = []
        self.extents: list[Extent] | None = None
        self.gate: asyncio.Event | None = None
        self.failure: BaseException | None = None
        self.calls: list[tuple[object, ...]] = []
        self.started = 0
        self.closed = False

    async def _pass(self) -> None:
        self.started += 1
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure

    async def read_into(self, offset: int, buffer: memoryview) -> Sequence[Hole]:
        await self._pass()
        end = offset + len(buffer)
        buffer[:] = self.data[offset:end]
        return [
            (max(start, offset) - offset, min(start + length, end) - max(start, offset))
            for start, length in self.holes
            if start < end and start + length > offset
        ]

    async def write(
        self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False
    ) -> None:
        await self._pass()
        self.calls.append(("write", offset, len(data), fua))
        self.data[offset : offset + len(data)] = data

    async def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        may_unmap: bool = True,
        fast_only: bool = False,
        fua: bool = False,
    ) -> None:
        await self._pass()
        self.calls.append(("write_zeroes", offset, length, may_unmap, fast_only, fua))
        if length <= 1 << 20:
            self.data[offset : offset + length] = bytes(length)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        await self._pass()
        self.calls.append(("trim", offset, length, fua))

    async def flush(self) -> None:
        await self._pass()
        self.calls.append(("flush",))

    async def cache(self, offset: int, length: int) -> None:
        await self._pass()
        self.calls.append(("cache", offset, length))

    async def block_status(
        self, offset: int, length: int, *, max_extents: int = 1 << 20
    ) -> list[Extent]:
        await self._pass()
        if self.extents is not None:
            return self.extents[:max_extents]
        return [Extent(length, data=True, zero=False)]

    async def close(self) -> None:
        self.closed = True
