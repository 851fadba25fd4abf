"""Put the headers of a read's reply around the data that is already in its place.

A read lands directly in the memory that it is sent from, behind room for one
header. Where a structured reply has holes, the zeros in that memory need not be sent: so
they make room for the headers of the chunks that follow, and nothing is copied.
"""

from collections.abc import Callable, Sequence
from functools import partial

from nbdserve.block.device import Hole
from nbdserve.wire.replies import (
    put_data_header,
    put_done,
    put_extended_data_header,
    put_extended_done,
    put_extended_hole,
    put_hole,
)

#: Bytes of the header in front of the data of a simple reply, and of a data chunk.
SIMPLE_HEADER = 16
DATA_HEADER = 28
#: The same of an extended data chunk.
EXTENDED_DATA_HEADER = 40
#: "Structured reply types": chunks of a read SHOULD be multiples of 512 bytes. A hole of
#: that size also has room for two headers (32 and 28 bytes, extended 44 and 40).
HOLE_UNIT = 512

#: A part of a buffer: where it starts and ends.
Range = tuple[int, int]


def frame_chunks(  # noqa: PLR0913 -- the fields of a request
    view: memoryview,
    start: int,
    cookie: int,
    offset: int,
    length: int,
    holes: Sequence[Hole],
    *,
    extended: bool = False,
) -> list[Range]:
    """Write the headers of a read's chunks, and return what to send, in order.

    Args:
        view: The buffer. The data is at `start + DATA_HEADER` (EXTENDED_DATA_HEADER).
        start: Where the room for the reply starts.
        cookie: Of the request.
        offset: Of the request, in bytes.
        length: Of the request, in bytes.
        holes: Ranges of the data that are holes, in order.
        extended: Whether extended headers were negotiated.
    """
    put_data: Callable[..., int]
    put_zeros: Callable[..., int]
    if extended:
        header_size = EXTENDED_DATA_HEADER
        put_data = partial(put_extended_data_header, request_offset=offset)
        put_zeros = partial(put_extended_hole, request_offset=offset)
    else:
        header_size, put_data, put_zeros = DATA_HEADER, put_data_header, put_hole
    if not length:
        if extended:
            return [(start, put_extended_done(view, start, cookie, offset))]
        return [(start, put_done(view, start, cookie))]
    data = start + header_size
    ranges: list[Range] = []
    done_to = 0  # bytes of the data that have their chunk
    send_from = start
    for hole_start, hole_end in _whole_units(offset, holes):
        if hole_start > done_to:
            send_from = put_data(
                view, data + done_to - header_size, cookie, offset + done_to,
                hole_start - done_to, done=False,
            ) - header_size  # fmt: skip
            hole_header = data + hole_start
        else:
            hole_header = send_from = start if not hole_start else data + hole_start
        end = put_zeros(
            view, hole_header, cookie, offset + hole_start, hole_end - hole_start,
            done=hole_end == length,
        )  # fmt: skip
        ranges.append((send_from, end))
        done_to = hole_end
    if done_to < length:
        header = data + done_to - header_size
        put_data(view, header, cookie, offset + done_to, length - done_to, done=True)
        ranges.append((header, data + length))
    return ranges


def _whole_units(offset: int, holes: Sequence[Hole]) -> list[Range]:
    """Return holes as start and end, rounded inwards to units of the export."""
    result: list[Range] = []
    for hole_start, hole_length in holes:
        first = -(-(offset + hole_start) // HOLE_UNIT) * HOLE_UNIT - offset
        last = (offset + hole_start + hole_length) // HOLE_UNIT * HOLE_UNIT - offset
        if result and result[-1][1] == first:
            first = result.pop()[0]
        if last > first:
            result.append((first, last))
    return result
