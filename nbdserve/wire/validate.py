"""The judge: may this request be carried out?

`judge` is one pure function that decides about every request, from what was negotiated
and nothing else. A request that it lets pass lies within the export, carries only
flags that mean something for its command, and may be handed to the engine as it is.

It runs for every request, so what a session allows is worked out once (`ExportFacts`)
and a good request costs one look into a dict and two comparisons. Only a
bad one takes the second function, which says what is wrong.
"""

from dataclasses import dataclass, field
from typing import Final, NamedTuple

from nbdserve.wire.constants import (
    MAX_PAYLOAD,
    Command,
    CommandFlag,
    NbdError,
    TransmissionFlag,
)

_ALL_FLAGS: Final = 0xFFFF
_CHANGING: Final = frozenset({Command.WRITE, Command.TRIM, Command.WRITE_ZEROES})


class Refusal(NamedTuple):
    """Why a request is answered with an error instead of being carried out.

    Attributes:
        error: For the reply.
        text: One line for the person who reads the client's log.
    """

    error: NbdError
    text: str


class Allowed(NamedTuple):
    """What one command may look like in a session.

    Attributes:
        forbidden_flags: Any of these bits is refused.
        least: Bytes; the least length.
        most: Bytes; the greatest length.
        end: Bytes; the greatest `offset + length`.
    """

    forbidden_flags: int
    least: int
    most: int
    end: int


@dataclass(frozen=True, slots=True)
class ExportFacts:
    """What was negotiated: everything the judge needs to know.

    Attributes:
        size: Bytes of the export.
        transmission_flags: As sent to this client.
        structured: Whether structured replies (or extended headers) were negotiated.
        meta_contexts: How many contexts NBD_CMD_BLOCK_STATUS reports; 0 disables it.
        minimum_block: Bytes; offsets and lengths have to be multiples of it.
        max_payload: Bytes that one READ or WRITE may carry.
        extended: Whether extended headers were negotiated.
        allowed: Derived from the others: command -> what it may look like.
    """

    size: int
    transmission_flags: int
    structured: bool = False
    meta_contexts: int = 0
    minimum_block: int = 1
    max_payload: int = MAX_PAYLOAD
    extended: bool = False
    allowed: dict[int, Allowed] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Work out the table."""
        object.__setattr__(self, "allowed", _allowed(self))


def _allowed(facts: ExportFacts) -> dict[int, Allowed]:
    """Return what each command that was advertised may look like."""
    flags = facts.transmission_flags
    # "NBD_CMD_FLAG_FUA ... valid during all commands", once it was advertised
    anywhere = CommandFlag.FUA if flags & TransmissionFlag.SEND_FUA else 0
    anything = 1 << 64

    def command(
        own_flags: int = 0, least: int = 0, most: int = anything, end: int = facts.size
    ) -> Allowed:
        # as plain numbers: ~ of an IntFlag forgets the bits that have no name
        return Allowed(_ALL_FLAGS & ~int(anywhere | own_flags), least, most, end)

    df = CommandFlag.DF if flags & TransmissionFlag.SEND_DF and facts.structured else 0
    result = {
        int(Command.READ): command(df, most=facts.max_payload),
        # its flags and range mean nothing: the client is leaving
        int(Command.DISC): Allowed(0, 0, anything, 2 * anything),
    }
    if flags & TransmissionFlag.SEND_FLUSH:
        # offset and length "MUST be zero" for the client, and mean nothing to us;
        # nbd-server takes any, and refusing a flush helps nobody
        result[Command.FLUSH] = command(end=2 * anything)
    if flags & TransmissionFlag.SEND_CACHE:
        result[Command.CACHE] = command()
    if facts.structured and facts.meta_contexts:
        result[Command.BLOCK_STATUS] = command(CommandFlag.REQ_ONE, least=1)
    if not flags & TransmissionFlag.READ_ONLY:
        payload_len = CommandFlag.PAYLOAD_LEN if facts.extended else 0
        result[Command.WRITE] = command(payload_len, most=facts.max_payload)
        if flags & TransmissionFlag.SEND_TRIM:
            result[Command.TRIM] = command()
        if flags & TransmissionFlag.SEND_WRITE_ZEROES:
            fast = flags & TransmissionFlag.SEND_FAST_ZERO
            result[Command.WRITE_ZEROES] = command(
                CommandFlag.NO_HOLE | (CommandFlag.FAST_ZERO if fast else 0)
            )
    # plain numbers: arithmetic on IntFlag is ten times slower
    return {
        int(key): Allowed(*(int(value) for value in row)) for key, row in result.items()
    }


#: The payload of NBD_CMD_BLOCK_STATUS: a length, and the id of each context wanted.
_STATUS_PAYLOAD_LEAST: Final = 8 + 4
# plain numbers: arithmetic on IntFlag is ten times slower
_PAYLOAD_LEN: Final = int(CommandFlag.PAYLOAD_LEN)
_WRITE: Final = int(Command.WRITE)
_BLOCK_STATUS: Final = int(Command.BLOCK_STATUS)


def judge_extended(
    facts: ExportFacts, command: int, flags: int, offset: int, length: int
) -> Refusal | None:
    """Decide about one request with an extended header, as `judge` does.

    Of an NBD_CMD_BLOCK_STATUS with a payload this is the first half: its range is in the
    payload, and `parse_status_payload` of `wire/requests.py` and `judge` see to that.
    """
    if not flags & _PAYLOAD_LEN:
        if command != _WRITE or command not in facts.allowed:
            return judge(facts, command, flags, offset, length)
        return Refusal(
            NbdError.EINVAL, f"{command_name(command)} without NBD_CMD_FLAG_PAYLOAD_LEN"
        )
    if command != _BLOCK_STATUS:
        return judge(facts, command, flags, offset, length)
    if not facts.transmission_flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD:
        return Refusal(
            NbdError.EINVAL, f"{command_name(command)}: no payload was advertised"
        )
    most = 8 + 4 * facts.meta_contexts
    if not _STATUS_PAYLOAD_LEAST <= length <= most or length % 4:
        return Refusal(
            NbdError.EINVAL, f"{command_name(command)}: a payload of {length} bytes"
        )
    return None


def judge(
    facts: ExportFacts, command: int, flags: int, offset: int, length: int
) -> Refusal | None:
    """Decide about one request.

    Returns:
        None if it may be carried out, else why not. The connection goes on
        either way; whether the payload of a refused write is drained is a
        matter of its length alone (`MAX_DRAIN`).
    """
    allowed = facts.allowed.get(command)
    if allowed is None:
        return _refuse_command(facts, command)
    forbidden_flags, least, most, end = allowed
    if (
        flags & forbidden_flags
        or not least <= length <= most
        or offset + length > end
        or (facts.minimum_block != 1 and (offset | length) % facts.minimum_block)
    ):
        return _refuse(facts, command, flags, offset, length)
    return None


def _refuse_command(facts: ExportFacts, command: int) -> Refusal:
    """Say why a command is not allowed at all."""
    name = command_name(command)
    if facts.transmission_flags & TransmissionFlag.READ_ONLY and command in _CHANGING:
        # "Error values": EPERM for "a write to a read-only export"
        return Refusal(NbdError.EPERM, f"{name}: the export is read-only")
    if command == Command.BLOCK_STATUS:
        return Refusal(
            NbdError.EINVAL, f"{name}: no meta context was negotiated for this export"
        )
    return Refusal(NbdError.EINVAL, f"{name} was not advertised")


def _refuse(
    facts: ExportFacts, command: int, flags: int, offset: int, length: int
) -> Refusal | None:
    """Say what is wrong with a request whose command is allowed."""
    forbidden_flags, least, most, end = facts.allowed[command]
    name = command_name(command)
    if flags & forbidden_flags:
        return Refusal(
            NbdError.EINVAL,
            f"{name}: flags {flags & forbidden_flags:#x} were not advertised for it",
        )
    if length < least:
        return Refusal(NbdError.EINVAL, f"{name}: length is {length}")
    if length > most:
        return Refusal(NbdError.EINVAL, f"{name}: {length} bytes, more than {most}")
    if offset + length > end:
        # "Error values": ENOSPC for a write past the end, EINVAL for the others
        writes = command in {Command.WRITE, Command.WRITE_ZEROES}
        return Refusal(
            NbdError.ENOSPC if writes else NbdError.EINVAL,
            f"{name}: {offset}+{length} is past the end at {end}",
        )
    if command in {Command.FLUSH, Command.DISC}:
        return None  # their range means nothing, so neither does its alignment
    return Refusal(
        NbdError.EINVAL,
        f"{name}: {offset}+{length} is not aligned to {facts.minimum_block}",
    )


def command_name(command: int) -> str:
    """Return a command as a person reads it: `NBD_CMD_READ`, `command 99`."""
    try:
        return f"NBD_CMD_{Command(command).name}"
    except ValueError:
        return f"command {command}"
