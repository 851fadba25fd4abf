"""What a disk may read as while several requests are in flight, sector by sector.

Requests of one batch are in flight together. A sector that all its writers cover
completely must end as one of them; where a writer covers a part of it, each byte must
be somebody's. A discard leaves what was there, or zeros.
"""

import random
from dataclasses import dataclass, field

SECTOR = 512


@dataclass(frozen=True)
class Operation:
    """One request.

    Attributes:
        kind: write, fua, zero, zero-data, trim, read, status, cache or flush.
        offset: Bytes.
        length: Bytes.
        seed: Decides the data of a write.
    """

    kind: str
    offset: int
    length: int
    seed: int

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def changes(self) -> bool:
        return self.kind in ("write", "fua", "zero", "zero-data", "trim")

    def data(self) -> bytes:
        """Return what the range has afterwards if nobody else writes to it."""
        if self.kind in ("write", "fua"):
            return random.Random(self.seed).randbytes(self.length)
        return bytes(self.length)


@dataclass
class Oracle:
    """The content of a disk.

    Attributes:
        content: As of the last settled batch.
    """

    content: bytearray
    _writers: list[tuple[Operation, bytes]] = field(default_factory=list)

    def begin(self, operations: list[Operation]) -> None:
        """Let a batch begin."""
        self._writers = [(each, each.data()) for each in operations if each.changes]

    def judge_read(self, offset: int, found: bytes) -> None:
        """Judge what a read of this batch has found."""
        self._judge(offset, found, settled=False)

    def settle(self, found: bytes) -> None:
        """Judge the whole disk after the batch has ended; this is its content then."""
        assert len(found) == len(self.content)
        if not self._writers:
            assert found == self.content
            return
        self._judge(0, found, settled=True)
        self.content[:] = found
        self._writers = []

    def _judge(self, offset: int, found: bytes, *, settled: bool) -> None:
        if found == self.content[offset : offset + len(found)] and not settled:
            return
        end = offset + len(found)
        first = offset - offset % SECTOR
        writers = [each for each in self._writers if each[0].offset < end]
        for start in range(first, end, SECTOR):
            low, high = max(start, offset), min(start + SECTOR, end)
            piece = found[low - offset : high - offset]
            here = [
                (each, data)
                for each, data in writers
                if each.offset < high and each.end > low
            ]
            if not here:
                assert piece == self.content[low:high], f"sector {start:#x}"
                continue
            self._judge_sector(piece, low, here, settled=settled)

    def _judge_sector(
        self,
        piece: bytes,
        low: int,
        writers: list[tuple[Operation, bytes]],
        *,
        settled: bool,
    ) -> None:
        high = low + len(piece)
        whole = [
            data[low - each.offset : high - each.offset]
            for each, data in writers
            if each.offset <= low and each.end >= high
        ]
        old = bytes(self.content[low:high])
        old_allowed = not settled or all(each.kind == "trim" for each, _ in writers)
        if piece in whole or (old_allowed and piece == old):
            return
        where = f"sector {low:#x} is nobody's: {[each for each, _ in writers]}"
        assert len(whole) < len(writers), where
        for at in range(low, high):
            allowed = {
                data[at - each.offset]
                for each, data in writers
                if each.offset <= at < each.end
            }
            kinds = {each.kind for each, _ in writers if each.offset <= at < each.end}
            if not settled or kinds <= {"trim"}:
                allowed.add(old[at - low])
            assert piece[at - low] in allowed, f"byte {at:#x}: {where}"
