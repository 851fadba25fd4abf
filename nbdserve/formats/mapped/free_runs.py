"""The free clusters of an image that are known, as runs without neighbours."""


class FreeRuns:
    """Disjoint runs of cluster numbers; runs that touch become one.

    A run is found by either end, so that adding one costs the same however many there
    are: a guest may discard its disk in a hundred thousand pieces.
    """

    def __init__(self) -> None:
        self._by_start: dict[int, int] = {}
        self._by_end: dict[int, int] = {}

    def runs(self) -> list[tuple[int, int]]:
        """Return all runs as (first cluster, count), in no order."""
        return list(self._by_start.items())

    def add(self, start: int, count: int) -> None:
        """Add clusters that are not in here yet."""
        end = start + count
        before = self._by_end.pop(start, None)
        if before is not None:
            del self._by_start[before]
            start = before
        after = self._by_start.pop(end, None)
        if after is not None:
            del self._by_end[end + after]
            end += after
        self._by_start[start] = end - start
        self._by_end[end] = start

    def take(
        self, wanted: int, contiguous: int, below: int | None = None
    ) -> list[tuple[int, int]]:
        """Take up to `wanted` clusters out, in runs of at least `contiguous`.

        Args:
            wanted: The most.
            contiguous: The least of a run.
            below: All of them lie below this one.
        """
        taken: list[tuple[int, int]] = []
        for start, count in list(self._by_start.items()):
            if wanted <= 0:
                break
            piece = min(count, wanted)
            if below is not None:
                piece = min(piece, below - start)
            if piece < contiguous:
                continue
            del self._by_start[start]
            del self._by_end[start + count]
            taken.append((start, piece))
            wanted -= piece
            if piece < count:
                self.add(start + piece, count - piece)
        return taken

    def cut(self, end: int) -> int:
        """Take out the run that ends at `end`, if there is one, and return where it begins."""
        start = self._by_end.pop(end, end)
        self._by_start.pop(start, None)
        return start

    def last_before(self, end: int) -> int:
        """Return where the run begins that ends at `end`; `end` if there is none."""
        return self._by_end.get(end, end)
