"""Cases that the fuzzer has found, each with what went wrong then: tried again each time."""

#: The image (see `specimens.py`) and its mutations.
FOUND: list[tuple[str, list[tuple[str, int, int]]]] = []
