"""Exports whose disk is opened when the first client asks for it.

Ten thousand images take minutes to open, and gigabytes of tables and descriptors; most
of them nobody uses today.
"""

import asyncio
from collections.abc import Awaitable, Callable

from nbdserve.exports.export import Export


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
        self._turn = asyncio.Lock()
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
        async with self._turn:
            if self._is_open or self.retired:
                return
            opened = await self._open_export()
            self.become(opened)
            self._is_open = True

    async def flush(self) -> None:
        """Make everything durable that was written."""
        if self._is_open:
            await super().flush()

    async def close(self) -> None:
        """Close the disk if it is open; nobody opens it any more."""
        self.retired = True
        async with self._turn:  # it may be opening just now
            if self._is_open:
                await super().close()
