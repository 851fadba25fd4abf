"""Many jobs under way, their results in order: what keeps disks and cores busy."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


async def in_order(
    jobs: AsyncIterator[Coroutine[Any, Any, Result]], depth: int
) -> AsyncGenerator[Result]:
    """Run `depth` jobs at a time and yield what they return in the order of `jobs`.

    Close it (`contextlib.aclosing`) if it is left early: the jobs under way are
    cancelled and waited for then.
    """
    running: deque[asyncio.Task[Result]] = deque()
    try:
        async for job in jobs:
            running.append(asyncio.create_task(job))
            if len(running) >= depth:
                result = await running[0]
                del running[0]
                yield result
        while running:
            result = await running[0]
            del running[0]
            yield result
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
