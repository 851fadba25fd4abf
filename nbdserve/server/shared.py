"""What all connections of a loop have together."""

from dataclasses import dataclass

from nbdserve.server.budget import Budget
from nbdserve.server.bulk import Turnstile
from nbdserve.server.busy_poll import BusyPoll
from nbdserve.server.intake import Pipe
from nbdserve.server.limits import Limits
from nbdserve.server.outbox import Arena


@dataclass(frozen=True, slots=True)
class Shared:
    """What all connections of a loop have together.

    Attributes:
        limits: What each of them may use.
        incoming: Where bytes are received.
        outgoing: Where replies are put together.
        budget: Bytes in flight of all.
        turnstile: Where very large reads take turns.
        pipe: Brings payloads from sockets to files.
        busy_poll: Keeps the loop awake for the next request.
    """

    limits: Limits
    incoming: Arena
    outgoing: Arena
    budget: Budget
    turnstile: Turnstile
    pipe: Pipe
    busy_poll: BusyPoll
