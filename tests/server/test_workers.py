"""What is asked of worker processes, without a server in front of them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdserve.config.model import ImageConfig
from nbdserve.errors import ConfigError, ImageError
from nbdserve.server.channel import Begin
from nbdserve.server.limits import Limits
from nbdserve.server.workers import DistantExport, Worker

#: Generous: two cores may be busy with everybody's tests.
TIMEOUT_S = 30.0


@asynccontextmanager
async def working() -> AsyncIterator[Worker]:
    worker = Worker(0, Begin(Limits(), None, "console", "error"))
    await worker.start()
    try:
        async with asyncio.timeout(TIMEOUT_S):
            yield worker
    finally:
        await worker.stop(TIMEOUT_S)


def export(worker: Worker, image: Any) -> DistantExport:
    return DistantExport("a", "", image, [worker])


async def test_every_call_is_answered() -> None:
    async with working() as worker:
        for _ in range(2):
            with pytest.raises(ImageError, match="the export 'a': AttributeError"):
                await export(worker, object()).ready()


async def test_what_cannot_be_offered_is_closed_again(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(512))
    async with working() as worker:
        first, second = (
            export(worker, ImageConfig("a", str(tmp_path / name), "raw"))
            for name in "ab"
        )
        await first.ready()
        with pytest.raises(ConfigError, match="two exports named 'a'"):
            await second.ready()
        await first.close()
        await second.ready()  # it was not left locked
        await second.close()


async def test_an_answer_that_is_too_long_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(512))
    image = ImageConfig("a", str(tmp_path / "a"), "raw")
    # the names of contexts are longer than those of bitmaps
    names = tuple(str(number) for number in range(9000))
    async with working() as worker:
        for _ in range(2):  # as nothing is left open
            with pytest.raises(ImageError, match="the export 'a': the answer"):
                await export(worker, replace(image, bitmaps=names)).ready()
        await export(worker, image).ready()
