"""Long work: a bar on a terminal, and an end in good order when it is interrupted."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED = 130
TERMINATED = 143

#: Columns of a terminal: for the label and the percentage, and for everything.
_BESIDE_BAR = 24
_ALL = 80


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how far some work is, if stderr is a terminal.

    Args:
        label: What is being done.
        total: Bytes.

    Yields:
        What to tell how many bytes are done.
    """
    if not total:
        yield _ignore
        return
    with growing_bar(label) as progress:
        yield lambda done: progress(done, total)


@contextmanager
def growing_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show how far some work is whose size is found out on the way.

    In one line: what does not fit a narrow terminal is left out, and a terminal that can't
    go back in a line is shown nothing.

    Args:
        label: What is being done.

    Yields:
        What to tell how many bytes are done, and how many there are in all.
    """
    if not sys.stderr.isatty() or os.environ.get("TERM") in {"dumb", "unknown"}:
        yield _ignore
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    details = (DownloadColumn(binary_units=True), TimeRemainingColumn())
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(min(40, max(console.width - _BESIDE_BAR, 1))),
        TaskProgressColumn(),
        *(details if console.width >= _ALL else ()),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _ignore(done: int, total: int = 0) -> None:
    """Show nothing: nobody is looking."""


def run_interruptibly(work: Coroutine[Any, Any, int], *, state: str) -> int:
    """Run `work`; SIGINT and SIGTERM cancel it, and it cleans up.

    Args:
        work: Returns the exit code.
        state: What an interruption leaves behind, for the person who caused it.

    Returns:
        The exit code, 130 after SIGINT and 143 after SIGTERM.
    """
    try:
        return asyncio.run(_terminable(work))
    except KeyboardInterrupt:
        code = INTERRUPTED
    except asyncio.CancelledError:
        code = TERMINATED
    print(f"nbdserve: interrupted: {state}", file=sys.stderr)
    return code


async def _terminable(work: Coroutine[Any, Any, int]) -> int:
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
