"""Cases that the fuzzer has found, each with what went wrong then: tried again each time."""

#: The image (see `specimens.py`) and its mutations.
FOUND: list[tuple[str, list[tuple[str, int, int]]]] = [
    # An L1 table over what is no table: L2 tables past the end of the file were read as
    # the zeros that are there, each again on every walk. Key material is all noise.
    ("v3 luks", [("any", 7, 250_000)]),
    ("v3 2M", [("any", 7, 530_000)]),
    # the bitmap directory at 2^63: an OverflowError
    ("v3 bitmaps", [("edge", 23, 36)]),
]
