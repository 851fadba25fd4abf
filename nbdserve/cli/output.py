"""What to do when nobody reads our output any longer (`nbdserve ... | head`)."""

import os
import sys


def discard_stdout() -> None:
    """Let what is buffered, and all that follows, go nowhere instead of failing."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
