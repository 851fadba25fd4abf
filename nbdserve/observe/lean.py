"""Importing what serving needs, and no more.

A server is started for every test of somebody's script, and by systemd when its first
client waits: half of its start is imports.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lean_imports() -> Iterator[None]:
    """Import without what only costs time; to be done before structlog is imported.

    - structlog imports rich, if there is one, for a kind of tracebacks that our logs
      don't use: 60 of 280 ms.
    - Modules, functions and classes are never garbage. Looking for some among them
      costs 20 ms while they are made, and again with each later search.
    """
    hidden = "rich" not in sys.modules and "structlog" not in sys.modules
    if hidden:
        sys.modules["rich"] = None  # type: ignore[assignment]  # "there is none"
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        if hidden:
            del sys.modules["rich"]
    gc.freeze()
