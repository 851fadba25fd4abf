"""Close exports, none of which may hold up the others or be left half closed."""

import asyncio
from collections.abc import Iterable

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
    closing = {export: asyncio.create_task(_close(export)) for export in exports}
    for task in closing.values():
        task.add_done_callback(forget)
    if closing:
        await asyncio.wait(closing.values(), timeout=timeout_s)
    failures: dict[Export, Exception] = {}
    for export, task in closing.items():
        if not task.done():
            failures[export] = TimeoutError(
                f"the export {export.name!r} was not closed within {timeout_s:g} s"
            )
        elif isinstance(error := task.exception(), Exception):
            failures[export] = error
    return failures


async def _close(export: Export) -> None:
    async with export.change:
        await export.close()
