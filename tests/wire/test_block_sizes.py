"""Exports that can't take every alignment: NBD_REP_ERR_BLOCK_SIZE_REQD."""

import struct

import pytest

from nbdserve.wire.client_handshake import (
    ClientHandshake,
    OptionRefused,
    info_data,
)
from nbdserve.wire.constants import Info, Option
from nbdserve.wire.handshake import ExportInfo, ServerHandshake

COARSE = ExportInfo("coarse", 1 << 20, 1, minimum_block=4096)
FINE = ExportInfo("fine", 1 << 20, 1)


def asked(export: ExportInfo, option: Option, *infos: int) -> ClientHandshake:
    """A client that has got the reply to an option, and a server that may go on."""
    client, server = ClientHandshake(), ServerHandshake()
    client.feed(server.data_to_send())
    data = b"x" if option is Option.EXPORT_NAME else info_data("x", infos)
    client.ask(option, data)
    server.feed(client.data_to_send())
    assert server.next_ask() is not None
    server.answer_export(export)
    client.feed(server.data_to_send())
    return client


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_who_does_not_ask_for_sizes_is_refused_and_told_them(option: Option) -> None:
    client = asked(COARSE, option, Info.NAME)
    with pytest.raises(OptionRefused, match=r"BLOCK_SIZE_REQD.*4096 bytes"):
        client.outcome()
    assert client._info == {Info.BLOCK_SIZE: struct.pack(">III", 4096, 4096, 64 << 20)}
    assert not client.finished


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
@pytest.mark.parametrize(("export", "infos"), [(COARSE, [Info.BLOCK_SIZE]), (FINE, [])])
def test_who_asks_or_need_not_is_served(
    option: Option, export: ExportInfo, infos: list[int]
) -> None:
    outcome = asked(export, option, *infos).outcome()
    assert outcome is not None
    assert outcome.details is not None
    assert outcome.details.minimum_block == export.minimum_block


def test_export_name_is_served_and_every_request_judged() -> None:
    assert asked(COARSE, Option.EXPORT_NAME).outcome() is not None
