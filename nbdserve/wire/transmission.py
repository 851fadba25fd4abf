"""What a refused request still owes the stream.

The server refuses a request by its header alone, but the payload of a write follows
all the same. It has to be read and thrown away before the next header can be
found ("Request message" of doc/proto.md).
"""

from nbdserve.errors import ProtocolError
from nbdserve.wire.constants import MAX_DRAIN
from nbdserve.wire.requests import payload_length
from nbdserve.wire.validate import command_name


def drain_length(
    command: int, flags: int, length: int, *, extended: bool = False
) -> int:
    """Return how many bytes behind the header of a refused request to throw away.

    Raises:
        ProtocolError: So many that reading them would serve nobody; the
            connection has to end.
    """
    drained = payload_length(command, flags, length, extended=extended)
    if drained > MAX_DRAIN:
        raise ProtocolError(
            f"{command_name(command)} announces {drained} bytes of payload, "
            f"more than {MAX_DRAIN}"
        )
    return drained
