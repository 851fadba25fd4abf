"""Exports whose disk is opened when the first client asks for it.

Ten thousand images take minutes to open, and gigabytes of tables and descriptors; most
of them nobody uses today.
"""

import asyncio
from collections.abc import Awaitable, Callable

from nbdserve.exports.export import Export
from nbdserve.exports.once import Once


class LateExport(Export):
    """An export that is only a name until somebody wants it."""

    def __init__(
        self, name: str, description: str, open_export: Callable[[], Awaitable[Export]]
    ) -> None:
        """Open nothing; `open_export` opens the image when it is wanted."""
        self.name = name
        self.description = description
        self.clients = 0
        self.change = asyncio.Lock()
        self._open_export = open_export
        self._opening = Once(self._open)
        self._is_open = False

    @property
    def is_open(self) -> bool:
        """Whether somebody has wanted it."""
        return self._is_open

    @property
    def size(self) -> int | None:
        """Bytes, once it is open."""
        return self.device.size if self._is_open else None

    @property
    def read_only(self) -> bool:
        """Whether it is known that nobody can write."""
        return self._is_open and self.device.read_only

    async def ready(self) -> None:
        """Open the disk; after a failure the next client tries again."""
        if not self._is_open:
            await self._opening.done()

    async def _open(self) -> None:
        if not self.retired:
            self.become(await self._open_export())
            self._is_open = True

    async def flush(self) -> None:
        """Make everything durable that was written."""
        if self._is_open:
            await super().flush()

    async def close(self) -> None:
        """Close the disk if it is open; nobody opens it any more."""
        self.retired = True
        await self._opening.ended()
        if self._is_open:
            await super().close()
