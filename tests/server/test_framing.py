"""The chunks of a read, read back by the client's codec."""

from hypothesis import given
from hypothesis import strategies as st

from nbdserve.server.framing import DATA_HEADER, frame_chunks
from nbdserve.wire.client_transmission import ClientTransmission


@given(
    offset=st.integers(0, 3000),
    length=st.integers(0, 20_000),
    cuts=st.lists(st.integers(0, 20_000), max_size=12),
    start=st.integers(0, 100),
)
def test_any_holes_give_the_same_data(
    offset: int, length: int, cuts: list[int], start: int
) -> None:
    """Holes in order, touching or not, aligned or not, however small."""
    edges = sorted(min(cut, length) for cut in cuts)
    holes = [(a, b - a) for a, b in zip(edges[::2], edges[1::2], strict=False) if b > a]
    data = bytearray((7 * n) % 255 + 1 for n in range(length))
    for hole, hole_length in holes:
        data[hole : hole + hole_length] = bytes(hole_length)
    room = bytearray(start + DATA_HEADER + length + 32)
    room[start + DATA_HEADER : start + DATA_HEADER + length] = data
    view = memoryview(room)

    client = ClientTransmission(structured=True)
    cookie = client.read(offset, length)
    for part_start, part_end in frame_chunks(
        view, start, cookie, offset, length, holes
    ):
        assert start <= part_start < part_end <= start + DATA_HEADER + length
        client.feed(view[part_start:part_end])
    reply = client.next_reply()

    assert reply is not None
    assert reply.data == data
    assert all(size % 512 == 0 and at % 512 == 0 for at, size in reply.holes)
