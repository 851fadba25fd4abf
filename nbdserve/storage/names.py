"""How a file is called in messages.

Names come from images too, and may hold anything: a newline would forge a second
line of log, a lone surrogate would make printing the message fail.
"""

import os


def shown(path: str | bytes | os.PathLike[str]) -> str:
    r"""Return `path` as one line of printable text.

    Anything unprintable is written as a backslash escape; bytes that are not UTF-8
    as ``\xNN``.
    """
    text = os.fsdecode(path)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that was not UTF-8 (PEP 383)
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
