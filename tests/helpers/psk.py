"""A Python whose ssl knows pre-shared keys: 3.13 and newer."""

import os
import ssl
import sys
from pathlib import Path


def python_with_psk() -> str | None:
    """Return this one, or the one that `tests/run` has found; None if there is none."""
    if getattr(ssl, "HAS_PSK", False):
        return sys.executable
    beside = Path(sys.prefix) / "psk/bin/python"
    named = os.environ.get("NBDSERVE_PSK_PYTHON", str(beside))
    return named if os.access(named, os.X_OK) else None
