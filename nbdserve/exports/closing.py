"""Flush and close exports, none of which may hold up the others or be left half closed."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from nbdserve.exports.export import Export
from nbdserve.exports.once import forget


async def close_all(
    exports: Iterable[Export], timeout_s: float
) -> dict[Export, Exception]:
    """Flush and close the disks of exports, side by side.

    What takes longer than `timeout_s` goes on: a disk whose closing stops midway keeps its file
    and lock.

    Returns:
        What has failed.
    """
    return await _each(exports, _close, timeout_s, "closed")


async def flush_all(
    exports: Iterable[Export], timeout_s: float
) -> dict[Export, Exception]:
    """Make durable what was written to exports; as `close_all`."""
    return await _each(exports, lambda export: export.flush(), timeout_s, "flushed")


async def _close(export: Export) -> None:
    async with export.change:
        await export.close()


async def _each(
    exports: Iterable[Export],
    work: Callable[[Export], Coroutine[Any, Any, None]],
    timeout_s: float,
    done: str,
) -> dict[Export, Exception]:
    tasks = {export: asyncio.create_task(work(export)) for export in exports}
    for task in tasks.values():
        task.add_done_callback(forget)
    if tasks:
        await asyncio.wait(tasks.values(), timeout=timeout_s)
    failures: dict[Export, Exception] = {}
    for export, task in tasks.items():
        if not task.done():
            failures[export] = TimeoutError(
                f"the export {export.name!r} was not {done} within {timeout_s:g} s"
            )
        elif isinstance(error := task.exception(), Exception):
            failures[export] = error
    return failures
