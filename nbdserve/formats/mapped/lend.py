"""Lending host clusters to sockets, where a range is plain data in the page cache."""

from typing import Final

from nbdserve.block.loan import Loan, Piece
from nbdserve.formats.mapped.entries import NORMAL, UNALLOCATED
from nbdserve.formats.mapped.loans import Loans
from nbdserve.formats.mapped.mapping import Mapping
from nbdserve.formats.mapped.parts import Parts

#: More pieces than this are sent more quickly by copying them together.
_MOST_PIECES: Final = 32


class Lender:
    """Lends guest ranges of one image."""

    def __init__(self, parts: Parts, mapping: Mapping, loans: Loans | None) -> None:
        """`loans` is None for an image that is read-only: then nothing is used again."""
        self._data = parts.data
        self._encrypted = parts.cipher is not None
        self._backing = parts.backing
        self._mapping = mapping
        self._loans = loans

    def lend(self, offset: int, length: int, *, for_good: bool) -> Loan | None:
        """See `BlockDevice.lend`."""
        if self._encrypted or (for_good and self._loans is not None):
            return None
        pieces: list[Piece] = []
        places: list[tuple[int, int]] = []
        position, end = offset, offset + length
        while position < end:
            run = self._mapping.known_run(position, end)
            if run is None or len(pieces) >= _MOST_PIECES:
                return None
            if run.kind >= NORMAL:
                if not self._data.is_cached(run.host_offset, run.length):
                    return None
                pieces.append((self._data, run.host_offset, run.length))
                places.append((run.host_offset, run.length))
            elif not self._lend_below(run.kind, position, run.length, pieces):
                return None
            position += run.length
        if self._loans is None or not places:
            return Loan(pieces)
        return Loan(pieces, self._loans.lend(places))

    def _lend_below(
        self, kind: int, offset: int, length: int, pieces: list[Piece]
    ) -> bool:
        """Add what the backing file lends."""
        backing = self._backing
        if kind != UNALLOCATED or backing is None or offset + length > backing.size:
            return False
        loan = backing.lend(offset, length, for_good=True)
        if loan is None:
            return False
        pieces += loan.pieces
        return True
