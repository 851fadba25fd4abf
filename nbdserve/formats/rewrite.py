"""Writing a disk as a new qcow2 image, compressed on all cores if that is wanted."""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

from nbdserve.block.device import BlockDevice
from nbdserve.formats.copy import Progress
from nbdserve.formats.pipeline import in_order
from nbdserve.formats.qcow2.sequential_writer import COMPRESSORS, SequentialWriter
from nbdserve.formats.regions import (
    STEP,
    Window,
    differing_runs,
    read_padded,
    read_window,
    windows,
    zeros,
)


class _Run(NamedTuple):
    """Neighbouring clusters that are stored in the same way.

    Attributes:
        first: The number of the first one.
        clusters: How many.
        data: Plain bytes, or the compressed ones of a single cluster; None are
            zeros in front of a backing file's data.
        packed: Whether `data` are compressed.
    """

    first: int
    clusters: int
    data: memoryview | None
    packed: bool = False


async def write_disk(
    source: BlockDevice,
    writer: SequentialWriter,
    *,
    backing: BlockDevice | None,
    progress: Progress,
) -> None:
    """Write all of `source`; the caller finishes the image.

    Args:
        source: The disk; it reads as zeros past its end.
        writer: A new image.
        backing: What the image shows where it has nothing.
        progress: See `Progress`.
    """
    cores = os.cpu_count() or 1
    size = writer.size
    pool = ThreadPoolExecutor(cores) if writer.compression else nullcontext()
    with pool as threads:
        preparation = _Preparation(source, backing, writer, threads)
        depth = cores + 2
        async with aclosing(in_order(preparation.steps(size), depth)) as steps:
            async for end, runs in steps:
                for run in runs:
                    await _store(writer, run)
                progress(end)
    progress(size)


async def _store(writer: SequentialWriter, run: _Run) -> None:
    if run.data is None:
        await writer.zeros(run.first, run.clusters)
    elif run.packed:
        await writer.compressed(run.first, bytes(run.data))
    else:
        await writer.plain(run.first, run.data)


@dataclass(frozen=True, slots=True)
class _Preparation:
    """What can be done for several steps side by side: read, compare, compress."""

    source: BlockDevice
    backing: BlockDevice | None
    writer: SequentialWriter
    threads: ThreadPoolExecutor | None

    async def steps(
        self, size: int
    ) -> AsyncGenerator[Coroutine[Any, Any, tuple[int, list[_Run]]]]:
        """Yield a job for each step in which there is something to store."""
        devices = [self.source]
        if self.backing is not None:
            devices.append(self.backing)
        step = max(STEP, self.writer.cluster_size)
        async with aclosing(windows(devices, size, step)) as found:
            async for window in found:
                yield self._prepare(window)

    async def _prepare(self, window: Window) -> tuple[int, list[_Run]]:
        cluster_size = self.writer.cluster_size
        # whole clusters: what lies behind the end of the disk is zeros
        length = -(-window.length // cluster_size) * cluster_size
        data = await read_window(self.source, window, length)
        reference = zeros(length)
        if self.backing is not None:
            reference = memoryview(bytearray(length))
            await read_padded(self.backing, window.offset, reference)
        runs: list[_Run] = []
        view = memoryview(data)
        for start, end in differing_runs(data, reference, cluster_size):
            runs += self._split(window.offset + start, view[start:end])
        if self.threads is not None:
            runs = await self._pack(self.threads, runs)
        return window.offset + window.length, runs

    def _split(self, offset: int, data: memoryview) -> list[_Run]:
        """Tell zeros, which need no storage, from data."""
        cluster_size = self.writer.cluster_size
        first, count = offset // cluster_size, len(data) // cluster_size
        if self.backing is None:
            return [_Run(first, count, data)]
        runs: list[_Run] = []
        position = 0
        stored = differing_runs(bytearray(data), zeros(len(data)), cluster_size)
        for start, end in [*stored, (len(data), len(data))]:
            if position < start:
                number = first + position // cluster_size
                runs.append(_Run(number, (start - position) // cluster_size, None))
            if start < end:
                number = first + start // cluster_size
                length = (end - start) // cluster_size
                runs.append(_Run(number, length, data[start:end]))
            position = end
        return runs

    async def _pack(self, threads: ThreadPoolExecutor, runs: list[_Run]) -> list[_Run]:
        """Compress each cluster that gets smaller by it."""
        loop = asyncio.get_running_loop()
        compress: Callable[[memoryview], bytes]
        compress = COMPRESSORS[self.writer.compression or "zlib"]
        cluster_size = self.writer.cluster_size

        async def pack(number: int, data: memoryview) -> _Run:
            packed = await loop.run_in_executor(threads, compress, data)
            if len(packed) < cluster_size:
                return _Run(number, 1, memoryview(packed), packed=True)
            return _Run(number, 1, data)

        jobs: list[Coroutine[Any, Any, _Run]] = []
        for run in runs:
            if run.data is None:
                jobs.append(_as_it_is(run))
                continue
            for index in range(run.clusters):
                start = index * cluster_size
                piece = run.data[start : start + cluster_size]
                jobs.append(pack(run.first + index, piece))
        return list(await asyncio.gather(*jobs))


async def _as_it_is(run: _Run) -> _Run:
    return run
