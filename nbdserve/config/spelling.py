"""What somebody may have meant who wrote a word that nobody knows."""

from collections.abc import Collection
from typing import Final

#: How much of two words is the same (`difflib`): as much as in `serv` and `serve`, and not
#: as little as in `--cluster-size` and `--iter-time` (0.64), or `3` and `32` (0.67).
_NEAR: Final = 0.75


def did_you_mean(word: str, known: Collection[str]) -> str:
    """Return `: did you mean X?` if one of `known` is close to `word`, else ``."""
    from difflib import get_close_matches  # noqa: PLC0415 -- for mistakes only

    near = get_close_matches(word, known, n=1, cutoff=_NEAR)
    return f": did you mean {near[0]}?" if near else ""
