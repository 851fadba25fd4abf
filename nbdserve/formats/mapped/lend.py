"""Lending host clusters to sockets, where a range is plain data in the page cache."""

from collections.abc import Sequence
from mmap import PAGESIZE
from typing import Final

from nbdserve.block.loan import Piece
from nbdserve.formats.mapped.entries import NORMAL, UNALLOCATED
from nbdserve.formats.mapped.mapping import Mapping
from nbdserve.formats.mapped.parts import Parts

#: More pieces than this are sent more quickly by copying them together.
_MOST_PIECES: Final = 32


class Lender:
    """Lends guest ranges of one image."""

    def __init__(self, parts: Parts, mapping: Mapping, *, read_only: bool) -> None:
        """Clusters of an image that is written to have to be recalled one by one."""
        self._data = parts.data
        self._backing = parts.backing
        self._mapping = mapping
        self._can_lend = parts.cipher is None and (
            read_only
            or (parts.data.can_recall and parts.geometry.cluster_size >= PAGESIZE)
        )

    def lend(self, offset: int, length: int) -> Sequence[Piece] | None:
        """See `BlockDevice.lend`."""
        if not self._can_lend:
            return None
        pieces: list[Piece] = []
        position, end = offset, offset + length
        while position < end:
            run = self._mapping.known_run(position, end)
            if run is None or len(pieces) >= _MOST_PIECES:
                return None
            if run.kind >= NORMAL:
                if not self._data.is_cached(run.host_offset, run.length):
                    return None
                pieces.append((self._data, run.host_offset, run.length))
            elif not self._lend_below(run.kind, position, run.length, pieces):
                return None
            position += run.length
        return pieces

    def _lend_below(
        self, kind: int, offset: int, length: int, pieces: list[Piece]
    ) -> bool:
        """Add what the backing file lends."""
        backing = self._backing
        if kind != UNALLOCATED or backing is None or offset + length > backing.size:
            return False
        lent = backing.lend(offset, length)
        if lent is None:
            return False
        pieces += lent
        return True
