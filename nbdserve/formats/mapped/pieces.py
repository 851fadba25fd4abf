"""What has to be put into a cluster so that a write to a part of it leaves the rest as it was."""

from nbdserve.formats.mapped import subclusters
from nbdserve.formats.mapped.entries import COMPRESSED, SHARED
from nbdserve.formats.mapped.geometry import Geometry
from nbdserve.formats.mapped.read import Reader
from nbdserve.formats.mapped.tables import Table


class Pieces:
    """Surrounds the bytes of a write with those that are there, by the subcluster.

    Where there are no subclusters, a cluster is treated as all 32 of them.
    """

    def __init__(self, geometry: Geometry, reader: Reader) -> None:
        """Read what is there through `reader`."""
        self._geometry = geometry
        self._reader = reader

    def wanted(
        self, table: Table, index: int, within: int, length: int
    ) -> tuple[int, int]:
        """Return what a new cluster must have, in place of one that is written in part.

        Returns:
            Its subclusters, and the bitmap it will have.
        """
        kind = table.kinds[index]
        if table.bitmaps is None or kind in (COMPRESSED, SHARED):
            return subclusters.ALL, subclusters.ALL
        bitmap = table.bitmaps[index]
        bits = self._geometry.cluster_bits
        wanted = subclusters.touched(within, length, bits)
        wanted |= subclusters.allocated(bitmap)
        return wanted, subclusters.with_allocated(bitmap, wanted)

    async def around(
        self, table: Table, index: int, wanted: int, within: int, data: memoryview
    ) -> tuple[list[tuple[int, memoryview]], bool]:
        """Return what subclusters have to hold: `data`, and around it what they show now.

        Args:
            table: With
            index: the entry of the cluster, which may be another one.
            wanted: Which subclusters. Of `data`, what lies in others is left out.
            within: Where in the cluster `data` begins.
            data: What is to be written.

        Returns:
            Where in the cluster to put what; and whether each of those subclusters was
            read and all of them were a hole.
        """
        bits = self._geometry.cluster_bits - subclusters.SUBCLUSTER_BITS
        pieces: list[tuple[int, memoryview]] = []
        zeros = True
        for first, last in subclusters.runs(wanted):
            start, stop = first << bits, last << bits
            if within <= start and stop <= within + len(data):
                # nothing of what is there stays
                pieces.append((start, data[start - within : stop - within]))
                zeros = False
                continue
            piece = memoryview(bytearray(stop - start))
            zeros &= await self._read_old(table, index, start, piece)
            begin, end = max(start, within), min(stop, within + len(data))
            if begin < end:
                part = data[begin - within : end - within]
                piece[begin - start : end - start] = part
            pieces.append((start, piece))
        return pieces, zeros

    def parts_of(
        self, mask: int, within: int, data: memoryview
    ) -> list[tuple[int, memoryview]]:
        """Return the parts of `data` in some subclusters, and where they begin."""
        bits = self._geometry.cluster_bits - subclusters.SUBCLUSTER_BITS
        parts: list[tuple[int, memoryview]] = []
        for first, last in subclusters.runs(mask):
            begin = max(first << bits, within)
            end = min(last << bits, within + len(data))
            if begin < end:
                parts.append((begin, data[begin - within : end - within]))
        return parts

    async def _read_old(
        self, table: Table, index: int, start: int, piece: memoryview
    ) -> bool:
        """Read a piece of a cluster as it was; return whether all of it is a hole."""
        geometry = self._geometry
        start += (table.number << geometry.table_bits) + (
            index << geometry.cluster_bits
        )
        # past the end of the disk there are zeros
        piece = piece[: max(geometry.size - start, 0)]
        holes = await self._reader.read_into(start, piece) if piece else ()
        return not piece or (
            bool(holes) and sum(length for _, length in holes) == len(piece)
        )
