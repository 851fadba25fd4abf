"""Free space of a qcow version 1 image, which keeps no account of it.

Nothing in the file tells which clusters are in use, so new ones come from the end
of the file, and from what this session itself has freed. `Pool` extends the file durably
before a cluster is linked: other programs take the end of the file for free space.
"""

from nbdserve.formats.mapped.commit import Freed
from nbdserve.formats.mapped.pool import Durability, Pool, Written
from nbdserve.storage.base import Storage


class UncountedPool(Pool):
    """The pool of a qcow version 1 image."""

    def __init__(
        self,
        storage: Storage,
        cluster_bits: int,
        durability: Durability,
        metadata: set[int],
        tables: set[int],
    ) -> None:
        """See `Pool`."""
        end = -(-storage.size >> cluster_bits)
        super().__init__(storage, cluster_bits, durability, end, metadata, tables)

    async def _reserve(self, runs: list[tuple[int, int]]) -> list[Written]:
        """Nothing records a reservation but the length of the file."""
        return []

    async def _unreserve(self, runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Whoever has given clusters back was the only one who used them."""
        return runs

    async def release(self, freed: list[Freed]) -> None:
        """Use whole clusters again; compressed ones may share theirs with others."""
        size = 1 << self._cluster_bits
        whole = [
            (offset, length)
            for offset, length in freed
            if not offset % size and not length % size
        ]
        async with self._lock:
            await self._reuse(self._clusters(whole))

    async def references(self, host_offset: int) -> int:
        """Return 1: the format has no way to share a cluster."""
        return 1

    async def _old_holes(
        self, most: int, known: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Return none: nothing tells which clusters are free."""
        return []

    def require_data(self, host_offset: int, length: int) -> None:
        """See `Pool`: only whole clusters are ever used again (see `release`)."""
        size = 1 << self._cluster_bits
        if not host_offset % size and not length % size:
            super().require_data(host_offset, length)
