"""Writing: in place where the cluster is ours alone, through the allocator elsewhere."""

from nbdserve.block.loan import Piece
from nbdserve.formats.mapped.allocator import Allocator
from nbdserve.formats.mapped.commit import Committer
from nbdserve.formats.mapped.entries import NORMAL, OWNED
from nbdserve.formats.mapped.mapping import Mapping
from nbdserve.formats.mapped.parts import Parts
from nbdserve.storage.base import Buffer


class Writer:
    """Writes guest ranges of one image."""

    def __init__(
        self, parts: Parts, mapping: Mapping, allocator: Allocator, commit: Committer
    ) -> None:
        """Join the parts."""
        geometry = parts.geometry
        self._data = parts.data
        self._parts = parts
        self._cipher = parts.cipher
        self._cached = parts.tables.cached
        self._mapping = mapping
        self._allocator = allocator
        self._commit = commit
        self._pins = parts.pins
        self._table_bits = geometry.table_bits
        self._cluster_bits = geometry.cluster_bits
        self._cluster_size = geometry.cluster_size
        self._index_mask = geometry.l2_entries - 1
        self._offset_mask = parts.codec.l2_offset_mask

    async def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """Write `data`; see `BlockDevice.write`."""
        commit = self._commit
        if commit.failed is not None or commit.refusal is not None:
            commit.check_writable()
        view = data if isinstance(data, memoryview) else memoryview(data)
        while view:
            within = offset & (self._cluster_size - 1)
            table = self._cached.get(offset >> self._table_bits)
            index = (offset >> self._cluster_bits) & self._index_mask
            if table is None or table.kinds[index] != OWNED:
                done = await self._allocator.write(offset, view)
            else:
                table.recent = True
                done = self._cluster_size - within
                if done < len(view):
                    most = (within + len(view) - 1 >> self._cluster_bits) + 1
                    most = min(most, self._index_mask + 1 - index)
                    count = self._mapping.alike(table, index, OWNED, most)
                    done = min((count << self._cluster_bits) - within, len(view))
                else:
                    done = len(view)
                host_offset = (table.words[index] & self._offset_mask) + within
                piece = view if done == len(view) else view[:done]
                if self._cipher is not None:
                    await self._parts.put_encrypted(
                        self._cipher, offset, host_offset, piece
                    )
                elif not self._data.try_write(host_offset, piece):
                    await self._write_slowly(host_offset, piece)
            if done == len(view):
                break
            offset += done
            view = view[done:]
        commit.dirty = True
        if commit.failed is not None:
            # a sync failed meanwhile
            commit.check()
        if fua or commit.writethrough:
            await commit.flush()

    def place(self, offset: int, length: int) -> Piece | None:
        """See `BlockDevice.place`: clusters of our own, as in `write`."""
        commit = self._commit
        if (
            commit.failed is not None
            or commit.refusal is not None
            or commit.writethrough
            or self._cipher is not None
            or not self._data.takes_pipes()
        ):
            return None
        run = self._mapping.known_run(offset, offset + length)
        if run is not None and run.kind == NORMAL:
            self._allocator.claim_known(offset, run.length)
            run = self._mapping.known_run(offset, offset + length)
        if run is None or run.kind != OWNED:
            return None
        commit.dirty = True
        return self._data, run.host_offset, run.length

    async def _write_slowly(self, host_offset: int, piece: memoryview) -> None:
        generation = self._pins.enter()
        try:
            await self._data.write(host_offset, piece)
        finally:
            self._pins.leave(generation)
