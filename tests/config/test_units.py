"""Sizes are what an operator meant, or refused."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.config.units import MAX_SIZE, format_size, parse_size
from nbdserve.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("64K", 64 << 10),
        ("64k", 64 << 10),
        ("3M", 3 << 20),
        ("10G", 10 << 30),
        ("2T", 2 << 40),
        ("1.5G", 3 << 29),
        ("0.5K", 512),
        (str(MAX_SIZE), MAX_SIZE),
    ],
)
def test_a_size_is_a_number_of_bytes_with_an_optional_suffix(
    text: str, size: int
) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "G", "-1", "+1", "10X", "10GG", "1e9", "0x10", "1.G", "٣", "10 G", "9" * 5000],
)
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


def test_part_of_a_byte_is_refused() -> None:
    with pytest.raises(ConfigError, match="whole number of bytes"):
        parse_size("0.3K")


@pytest.mark.parametrize("text", [str(MAX_SIZE + 1), "8388608T"])
def test_a_size_beyond_off_t_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="too large"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1000, "1000 bytes"),
        (1024, "1 KiB"),
        (3 << 29, "1.5 GiB"),
        (10 << 30, "10 GiB"),
        (1000 << 20, "1000 MiB"),
        (5 << 50, "5120 TiB"),
    ],
)
def test_people_read_short_sizes(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, MAX_SIZE))
def test_every_number_of_bytes_reads_as_itself(size: int) -> None:
    assert parse_size(str(size)) == size


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_config_error(text: str) -> None:
    with suppress(ConfigError):
        assert 0 <= parse_size(text) <= MAX_SIZE
