"""What is counted while serving: plain integers, summed up when somebody asks."""

from dataclasses import dataclass


@dataclass(slots=True)
class ConnectionCounters:
    """What one connection did.

    Attributes:
        requests: Answered or being answered, refused ones included.
        errors: Requests answered with an error.
        bytes_read: Data of successful reads.
        bytes_written: Data of successful writes.
    """

    requests: int = 0
    errors: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
