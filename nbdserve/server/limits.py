"""What one server, one connection and one turn of the loop may use, and why."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Final

from nbdserve.config.spelling import did_you_mean
from nbdserve.config.units import parse_size
from nbdserve.errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a server; every field may be changed by its operator."""

    #: A client that wants to talk does so within seconds; qemu gives as long.
    handshake_timeout_s: float = 10.0
    #: File descriptors and a few KiB each; qemu's own default is 100.
    connections: int = 4096
    #: Of one export, so that the clients of one do not keep out those of another.
    connections_per_export: int = 1024
    #: Waiting requests per connection. The kernel and fio send 128 at most, nbdcopy 64
    #: for each of its connections; eight times that still is a few MiB of tasks.
    requests_in_flight: int = 1024
    #: Of one connection: two requests of the greatest size.
    bytes_in_flight: int = 128 * MIB
    #: Of all connections: large requests wait while it is reached, and small ones of
    #: connections that have some in flight. The others go on, so that nobody starves.
    total_bytes_in_flight: int = 1024 * MIB
    #: How long a peer may move nothing while the server holds memory for it: a reply
    #: that is not read, a payload that does not come. While memory is short, a
    #: sixteenth of what is held has to move in that time. Who holds nothing may be silent.
    stall_timeout_s: float = 60.0
    #: How long a client may ask for nothing. For ever: a mounted disk may be idle for days,
    #: and its guest would find it gone. Peers that are gone are found by keepalive.
    idle_timeout_s: float = math.inf
    #: After how many idle seconds the kernel begins to ask whether a TCP peer is still
    #: there; who does not answer is gone after twice as long.
    keepalive_s: float = 60.0
    #: Options of one handshake: a client that describes every export of a list needs two
    #: for each. qemu was seen taking 5000, nbdkit stops at 32.
    options: int = 4096
    #: One turn of one connection. Others wait as long for each busy one.
    turn_s: float = 0.0005
    turn_bytes: int = MIB
    #: How long the loop stays awake after a reply, in case that the client asks again at
    #: once; 0 lets it sleep. See `busy_poll.py`.
    busy_poll_s: float = 0.0001
    #: Memory that is kept for the next large requests.
    idle_buffer_bytes: int = 128 * MIB
    #: After SIGTERM: how long requests in flight may take, before the server
    #: gives up on them (systemd's default for the whole is 90 s).
    drain_timeout_s: float = 20.0
    #: How long a peer may take to close its end after the server closed its own;
    #: until then its kernel can still deliver the last replies.
    linger_s: float = 0.5
    #: How long flushing and closing all images may take.
    close_timeout_s: float = 30.0


#: The limits as operators write them; what ends in -s is in seconds.
NAMES: Final = tuple(field.name.replace("_", "-") for field in fields(Limits))
_MAY_BE_0: Final = frozenset({"busy-poll-s"})
#: MAX_TCP_KEEPIDLE of Linux: with more, no client could be welcomed.
_MOST: Final = {"keepalive-s": 32767}


def changed(limits: Limits, settings: Iterable[tuple[str, str]]) -> Limits:
    """Return limits with some of them set by name.

    Args:
        limits: The others stay as they are in here.
        settings: Names as operators write them, with `-`, and values: seconds
            for what ends in `-s`, else a number that may end in K, M, G or T.

    Raises:
        ConfigError: There is no such limit, or it can't have that value.
    """
    kinds = dict(zip(NAMES, fields(Limits), strict=True))
    values: dict[str, float] = {}
    for name, text in settings:
        field = kinds.get(name)
        if field is None:
            hint = did_you_mean(name, NAMES) or f": there are {', '.join(NAMES)}"
            raise ConfigError(f"there is no limit {name!r}{hint}")
        if field.type is float:
            if not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text, re.ASCII):
                raise ConfigError(f"the limit {name}={text} is not a number of seconds")
            value: float = float(text)
        else:
            value = _whole_number(name, text)
        if not value and name not in _MAY_BE_0:
            raise ConfigError(f"the limit {name} can't be 0")
        if value > _MOST.get(name, value):
            raise ConfigError(f"the limit {name} can be at most {_MOST[name]}")
        values[field.name] = value
    return replace(limits, **values)  # type: ignore[arg-type]


def _whole_number(name: str, text: str) -> int:
    try:
        return parse_size(text)
    except ConfigError as error:
        problem = f": {error}" if "bytes" in name else f"={text} is not a whole number"
        raise ConfigError(f"the limit {name}{problem}") from None
