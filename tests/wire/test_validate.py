"""The judge, sentence by sentence of doc/proto.md."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.wire.constants import Command, CommandFlag, NbdError, TransmissionFlag
from nbdserve.wire.validate import ExportFacts, command_name, judge

ALL = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_DF
    | TransmissionFlag.SEND_CACHE
    | TransmissionFlag.SEND_FAST_ZERO
)
SIZE = 1_000_000_000
FULL = ExportFacts(SIZE, ALL, structured=True, meta_contexts=1)
READ_ONLY = ExportFacts(
    SIZE,
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.READ_ONLY
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA,
)
RANGED = [
    Command.READ,
    Command.WRITE,
    Command.TRIM,
    Command.CACHE,
    Command.WRITE_ZEROES,
    Command.BLOCK_STATUS,
]


def error(
    facts: ExportFacts, command: int, flags: int = 0, offset: int = 0, length: int = 0
) -> NbdError | None:
    refusal = judge(facts, command, flags, offset, length)
    if refusal is None:
        return None
    assert command_name(command) in refusal.text
    return refusal.error


@pytest.mark.parametrize("command", RANGED)
def test_what_lies_within_the_export_is_allowed(command: Command) -> None:
    assert error(FULL, command, 0, 0, 1) is None
    assert error(FULL, command, 0, SIZE - 512, 512) is None
    assert error(FULL, command, CommandFlag.FUA, 7, 1000) is None


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (Command.READ, NbdError.EINVAL),
        (Command.WRITE, NbdError.ENOSPC),
        (Command.TRIM, NbdError.EINVAL),
        (Command.CACHE, NbdError.EINVAL),
        (Command.WRITE_ZEROES, NbdError.ENOSPC),
        (Command.BLOCK_STATUS, NbdError.EINVAL),
    ],
)
def test_past_the_end_writes_get_enospc_and_the_others_einval(
    command: Command, expected: NbdError
) -> None:
    assert error(FULL, command, 0, SIZE - 511, 512) is expected
    assert error(FULL, command, 0, SIZE, 1) is expected
    assert error(FULL, command, 0, 2**64 - 1, 2) is expected
    assert error(FULL, command, 0, 2**64 - 512, 512) is expected


@pytest.mark.parametrize("command", [Command.WRITE, Command.TRIM, Command.WRITE_ZEROES])
def test_on_a_read_only_export_changes_get_eperm(command: Command) -> None:
    assert error(READ_ONLY, command, 0, 0, 512) is NbdError.EPERM
    assert error(READ_ONLY, command, 0, SIZE, 512) is NbdError.EPERM
    assert error(READ_ONLY, Command.READ, 0, 0, 512) is None
    assert error(READ_ONLY, Command.FLUSH) is None


@pytest.mark.parametrize("command", [Command.READ, Command.WRITE])
def test_payloads_of_64_mib_are_allowed_and_no_more(command: Command) -> None:
    assert error(FULL, command, 0, 0, 49_865_728) is None
    assert error(FULL, command, 0, 0, 64 << 20) is None
    assert error(FULL, command, 0, 0, (64 << 20) + 1) is NbdError.EINVAL


@pytest.mark.parametrize(
    "command",
    [Command.TRIM, Command.WRITE_ZEROES, Command.CACHE, Command.BLOCK_STATUS],
)
def test_commands_without_payload_may_be_as_large_as_4_gib(command: Command) -> None:
    large = replace(FULL, size=1 << 40)
    assert error(large, command, 0, 0, 2**32 - 1) is None
    assert error(large, command, 0, 1 << 39, 2**32 - 512) is None


@pytest.mark.parametrize("command", RANGED)
def test_a_length_of_zero_is_fine_except_for_block_status(command: Command) -> None:
    expected = NbdError.EINVAL if command is Command.BLOCK_STATUS else None
    assert error(FULL, command, 0, 0, 0) is expected
    assert error(FULL, command, 0, SIZE, 0) is expected


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (Command.WRITE_ZEROES, TransmissionFlag.SEND_WRITE_ZEROES),
        (Command.TRIM, TransmissionFlag.SEND_TRIM),
        (Command.CACHE, TransmissionFlag.SEND_CACHE),
        (Command.FLUSH, TransmissionFlag.SEND_FLUSH),
    ],
)
def test_a_command_that_was_not_advertised_is_einval(
    command: Command, flag: TransmissionFlag
) -> None:
    assert error(FULL, command, 0, 0, 1) is None
    without = replace(FULL, transmission_flags=ALL & ~flag)
    assert error(without, command, 0, 0, 1) is NbdError.EINVAL


@pytest.mark.parametrize("command", [Command.RESIZE, 9, 99, 0xFFFF])
def test_an_unknown_command_is_einval(command: int) -> None:
    assert error(FULL, command, 0, 0, 1) is NbdError.EINVAL


#: Which flags mean something for which command.
OWN_FLAGS = {
    Command.READ: {CommandFlag.DF},
    Command.WRITE: set(),
    Command.FLUSH: set(),
    Command.TRIM: set(),
    Command.CACHE: set(),
    Command.WRITE_ZEROES: {CommandFlag.NO_HOLE, CommandFlag.FAST_ZERO},
    Command.BLOCK_STATUS: {CommandFlag.REQ_ONE},
}


@pytest.mark.parametrize("command", OWN_FLAGS)
def test_a_flag_is_allowed_only_where_it_is_documented(command: Command) -> None:
    for flag in [1 << bit for bit in range(16)]:
        allowed = flag == CommandFlag.FUA or flag in OWN_FLAGS[command]
        assert (error(FULL, command, flag, 0, 1) is None) == allowed, hex(flag)


@pytest.mark.parametrize("command", OWN_FLAGS)
def test_fua_is_allowed_on_any_command_if_advertised_and_only_then(
    command: Command,
) -> None:
    assert error(FULL, command, CommandFlag.FUA, 0, 1) is None
    without = replace(FULL, transmission_flags=ALL & ~TransmissionFlag.SEND_FUA)
    assert error(without, command, CommandFlag.FUA, 0, 1) is NbdError.EINVAL


def test_fast_zero_that_was_not_advertised_is_einval() -> None:
    without = replace(FULL, transmission_flags=ALL & ~TransmissionFlag.SEND_FAST_ZERO)
    fast = CommandFlag.FAST_ZERO
    assert error(without, Command.WRITE_ZEROES, fast, 0, 1) is NbdError.EINVAL
    assert error(without, Command.WRITE_ZEROES, CommandFlag.NO_HOLE, 0, 1) is None


def test_df_needs_structured_replies() -> None:
    simple = replace(FULL, structured=False)
    assert error(simple, Command.READ, CommandFlag.DF, 0, 1) is NbdError.EINVAL
    assert error(simple, Command.READ, 0, 0, 1) is None


def test_block_status_needs_a_meta_context_and_structured_replies() -> None:
    none = replace(FULL, meta_contexts=0)
    simple = replace(FULL, structured=False)
    assert error(none, Command.BLOCK_STATUS, 0, 0, 512) is NbdError.EINVAL
    assert error(simple, Command.BLOCK_STATUS, 0, 0, 512) is NbdError.EINVAL


def test_a_flush_is_taken_whatever_its_range() -> None:
    assert error(FULL, Command.FLUSH) is None
    assert error(FULL, Command.FLUSH, 0, SIZE + 5, 2**32 - 1) is None
    assert error(replace(FULL, minimum_block=512), Command.FLUSH, 0, 1, 1) is None


def test_leaving_is_always_allowed() -> None:
    assert error(READ_ONLY, Command.DISC, 0xFFFF, 2**64 - 1, 2**32 - 1) is None
    assert error(replace(FULL, minimum_block=512), Command.DISC, 0, 1, 1) is None


def test_what_is_not_aligned_to_the_minimum_block_is_einval() -> None:
    blocks = replace(FULL, minimum_block=512)
    assert error(blocks, Command.READ, 0, 512, 1024) is None
    assert error(blocks, Command.READ, 0, 100, 512) is NbdError.EINVAL
    assert error(blocks, Command.WRITE, 0, 512, 100) is NbdError.EINVAL


def test_payload_len_needs_extended_headers() -> None:
    payload = CommandFlag.PAYLOAD_LEN
    extended = replace(FULL, extended=True)
    assert error(FULL, Command.WRITE, payload, 0, 1) is NbdError.EINVAL
    assert error(extended, Command.WRITE, payload, 0, 1) is None
    assert error(extended, Command.READ, payload, 0, 1) is NbdError.EINVAL


@given(
    st.builds(
        ExportFacts,
        st.integers(0, 2**63),
        st.integers(0, 0xFFFF),
        st.booleans(),
        st.integers(0, 2),
        st.sampled_from([1, 512, 4096]),
    ),
    st.one_of(st.integers(0, 9), st.integers(0, 0xFFFF)),
    st.one_of(st.just(0), st.integers(0, 0xFFFF)),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
)
def test_whatever_is_let_pass_lies_within_the_export(
    facts: ExportFacts, command: int, flags: int, offset: int, length: int
) -> None:
    refusal = judge(facts, command, flags, offset, length)
    if refusal is not None:
        assert refusal.error in NbdError
        assert "\n" not in refusal.text
    elif command not in {Command.FLUSH, Command.DISC}:
        assert offset + length <= facts.size
