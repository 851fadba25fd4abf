"""Sizes as people write and read them: 64K, 10G, 1.5 GiB."""

import re

from nbdserve.errors import ConfigError

_SUFFIXES = "KMGT"
#: 2^63 has 19 digits; Python itself refuses to read numbers of thousands.
_SIZE = re.compile(r"(\d{1,20})(?:\.(\d{1,20}))?([KMGT]?)", re.IGNORECASE | re.ASCII)

#: The wire and the formats carry sizes in signed 64 bits somewhere (off_t).
MAX_SIZE = 2**63 - 1


def parse_size(text: str) -> int:
    """Read a size: a number of bytes, or one with K, M, G or T (powers of 1024).

    Raises:
        ConfigError: It is no such number, or more than 2^63 - 1 bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"{text!r} is not a size: write a number of bytes, or one with K, M, G"
            " or T, such as 10G"
        )
    whole, fraction, suffix = match.groups(default="")
    unit = 1 << 10 * (_SUFFIXES.index(suffix.upper()) + 1) if suffix else 1
    scale = int("1" + "0" * len(fraction))
    size, rest = divmod(int(whole + fraction) * unit, scale)
    if rest:
        raise ConfigError(f"{text!r} is not a whole number of bytes")
    if size > MAX_SIZE:
        raise ConfigError(f"{text!r} is too large: at most 2^63 - 1 bytes")
    return size


def format_size(size: int) -> str:
    """Write `size` bytes for people: `10 GiB`, `1.5 MiB`, `1000 bytes`."""
    for power in range(len(_SUFFIXES), 0, -1):
        unit = 1 << 10 * power
        if size >= unit:
            number = f"{size / unit:.2f}".rstrip("0").rstrip(".")
            return f"{number} {_SUFFIXES[power - 1]}iB"
    return f"{size} byte" if size == 1 else f"{size} bytes"
