"""Ways to break an image: numbers that mean something set to others, and bytes.

A mutation is plain data, so that a case that was found can be kept (`found.py`).
"""

import random
from typing import NamedTuple

from hypothesis import strategies as st

from tests.hostile.specimens import Specimen


class Mutation(NamedTuple):
    """One change.

    Attributes:
        kind: What is done.
        at: Which place or byte, modulo how many there are.
        value: What it becomes; how it is read depends on `kind`.
    """

    kind: str
    at: int
    value: int


#: Numbers at which something ends, wraps or is too large.
_EDGES = [
    *(0, 1, 2, 3, 4, 7, 8, 9, 16, 21, 22, 31, 63, 104, 105, 112, 511, 512, 513),
    *(1023, 1024, 4096, 65535, 65536, 1 << 20, 1 << 24, (1 << 31) - 1, 1 << 31),
    *((1 << 32) - 1, 1 << 40, (1 << 55) - 512, 1 << 55, 1 << 56, 1 << 61, 1 << 62),
    *((1 << 63) - 512, 1 << 63, (1 << 63) | 512, (1 << 64) - 1, (1 << 64) - 512),
]
KINDS = ["edge", "word", "cluster", "bits", "any", "bytes", "flip", "cut", "grow"]

mutations = st.lists(
    st.builds(
        Mutation,
        st.sampled_from(KINDS),
        st.integers(0, (1 << 16) - 1),
        st.integers(0, (1 << 64) - 1),
    ),
    min_size=1,
    max_size=5,
)


def mutated(specimen: Specimen, changes: list[Mutation]) -> bytes:
    """Return the image with all changes made."""
    content = bytearray(specimen.content)
    for change in changes:
        _apply(content, specimen, change)
    return bytes(content)


def _apply(content: bytearray, specimen: Specimen, change: Mutation) -> None:
    kind, at, value = change
    if kind == "cut":
        del content[value % (len(content) + 1) :]
    elif kind == "grow":
        content += bytes(value % 70_000)
    elif kind == "flip":
        if content:
            content[(at * 65_537 + value) % len(content)] ^= 1 << value % 8
    elif kind == "bytes":
        if content:
            start = (at << 4) % len(content)
            noise = random.Random(value).randbytes(1 + value % 64)
            content[start : start + len(noise)] = noise[: len(content) - start]
    else:
        place = specimen.places[at % len(specimen.places)]
        if place.offset + place.width > len(content):
            return
        here = slice(place.offset, place.offset + place.width)
        old = int.from_bytes(content[here], "big")
        new = _number(specimen, kind, value, old) & (1 << 8 * place.width) - 1
        content[here] = new.to_bytes(place.width, "big")


def _number(specimen: Specimen, kind: str, value: int, old: int) -> int:
    if kind == "edge":
        return _EDGES[value % len(_EDGES)]
    if kind == "word":
        return specimen.words[value % len(specimen.words)]
    if kind == "cluster":
        flags = [0, 1 << 63, 1 << 62, 1, 3 << 62, 1 << 63 | 1][value % 6]
        unit = [512, 4096, 65536][value // 6 % 3]
        return value // 18 % (len(specimen.content) // unit + 3) * unit | flags
    if kind == "bits":
        return old ^ 1 << value % 64 ^ (value >> 32) % 2
    return value
