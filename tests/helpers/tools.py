"""Running the Debian tools that tests compare us with: qemu-img, fio and the like.

A tool that is missing, hangs or complains fails the test with its own words.
"""

import subprocess
from collections.abc import Sequence
from pathlib import Path

TOOL_TIMEOUT_S = 50.0

# qemu-img check prints a line for each cluster; the first ones tell the story.
SHOWN_CHARACTERS = 4000


def run(
    *argv: str | Path,
    expect: Sequence[int] = (0,),
    environment: dict[str, str] | None = None,
) -> str:
    """Run a command to its end and return its stdout.

    Args:
        argv: The command, found in PATH.
        expect: The exit codes that are right.
        environment: Instead of this process's.

    Raises:
        AssertionError: Another exit code; the text has stdout and stderr.
    """
    words = [str(word) for word in argv]
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TOOL_TIMEOUT_S,
        env=environment,
        check=False,
    )
    if done.returncode not in expect:
        raise AssertionError(
            f"{' '.join(words)}: exit code {done.returncode}\n"
            f"{done.stdout[:SHOWN_CHARACTERS]}\n{done.stderr[:SHOWN_CHARACTERS]}"
        )
    return done.stdout
