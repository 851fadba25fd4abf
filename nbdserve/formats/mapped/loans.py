"""Host clusters that are lent to sockets, and kept from being used again meanwhile.

A client that does not read its replies holds at most what its socket takes (4 MiB), and
only those clusters: everything else that is freed comes back as usual.
"""

from collections.abc import Callable

#: Clusters as (first, count).
Clusters = tuple[int, int]


class Loans:
    """The clusters of one image that are lent, by number.

    Attributes:
        withheld: Runs that are free but for being lent.
    """

    def __init__(self, cluster_bits: int) -> None:
        self.withheld: list[Clusters] = []
        self._cluster_bits = cluster_bits
        self._lent: dict[int, list[Clusters]] = {}
        self._next = 0
        self._returned: Callable[[], None] | None = None

    def on_returned(self, returned: Callable[[], None]) -> None:
        """Name what is called when something withheld may be free by now."""
        self._returned = returned

    def lend(self, places: list[tuple[int, int]]) -> Callable[[], None]:
        """Note that host ranges (offset, length in bytes) are lent.

        Returns:
            What gives them back.
        """
        number = self._next
        self._next += 1
        self._lent[number] = [
            (
                start >> self._cluster_bits,
                (start + length - 1 >> self._cluster_bits)
                + 1
                - (start >> self._cluster_bits),
            )
            for start, length in places
        ]

        def give_back() -> None:
            del self._lent[number]
            if self.withheld and self._returned is not None:
                self._returned()

        return give_back

    def withhold(self, start: int, count: int) -> list[Clusters]:
        """Keep what is lent of a run of free clusters; return the rest."""
        if not self._lent:
            return [(start, count)]
        end = start + count
        rest: list[Clusters] = []
        lent = sorted(run for runs in self._lent.values() for run in runs)
        for first, number in lent:
            stop = min(first + number, end)
            if stop <= start or first >= end:
                continue
            if first > start:
                rest.append((start, first - start))
            self.withheld.append((max(first, start), stop - max(first, start)))
            start = stop
        if start < end:
            rest.append((start, end - start))
        return rest
