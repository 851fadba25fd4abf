"""What a refused request still owes the stream.

The server refuses a request by its header alone, but the payload of a write follows
all the same. It has to be read and thrown away before the next header can be
found ("Request message" of doc/proto.md).
"""

from nbdserve.errors import ProtocolError
from nbdserve.wire.constants import MAX_DRAIN, MAX_PAYLOAD
from nbdserve.wire.requests import payload_length
from nbdserve.wire.validate import command_name


def drain_length(
    command: int,
    flags: int,
    length: int,
    *,
    extended: bool = False,
    max_payload: int = MAX_PAYLOAD,
) -> int:
    """Return how many bytes behind the header of a refused request to throw away.

    Args:
        command: Of the request.
        flags: Of the request.
        length: Of the request.
        extended: Whether extended headers were negotiated.
        max_payload: As advertised. With extended headers a longer payload ends the
            connection ("SHOULD initiate hard disconnect"); with compact ones twice
            as much is borne (`MAX_DRAIN`).

    Raises:
        ProtocolError: So many that reading them would serve nobody; the
            connection has to end.
    """
    drained = payload_length(command, flags, length, extended=extended)
    most = max_payload if extended else MAX_DRAIN
    if drained > most:
        raise ProtocolError(
            f"{command_name(command)} announces {drained} bytes of payload, "
            f"more than {most}"
        )
    return drained
