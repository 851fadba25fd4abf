"""A real `nbdserve serve` process, as a person starts it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

#: Generous: two cores may be busy with everybody's tests.
TIMEOUT_S = 30.0


class ServeProcess:
    """A server, its announcement and, once it ended, its log.

    Attributes:
        announcement: What it printed before it was ready.
        uris: The `nbd` URIs in there, in order.
    """

    def __init__(
        self, *words: str, cwd: Path, flags: Sequence[str] = (), **environment: str
    ) -> None:
        """Start it; `flags` are those of the interpreter."""
        self._log = (cwd / "log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, *flags, "-m", "nbdserve", "serve", *words],
            cwd=cwd,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.announcement = ""
        self.uris: list[str] = []

    def wait_until_ready(self) -> Self:
        """Read the announcement, whose last line is the nbdcopy command."""
        return self.wait_for_announcement("nbdcopy ")

    def wait_for_announcement(self, last: str) -> Self:
        """Read the announcement until a line begins with `last`."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.announcement += line
            if line.startswith(last):
                break
        else:
            raise RuntimeError(f"the server ended: {self.end()}: {self.log()}")
        self.uris = re.findall(r"^  (nbd\S+)$", self.announcement, re.MULTILINE)
        return self

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def log(self) -> str:
        """What it wrote to stderr so far."""
        self._log.flush()
        return Path(self._log.name).read_text()

    def wait_for_log(self, text: str) -> None:
        """Wait until the log has `text`."""
        deadline = time.monotonic() + TIMEOUT_S
        while text not in self.log():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {text!r} in the log: {self.log()}")
            time.sleep(0.01)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal if it still runs, and return the exit code."""
        if self._process.poll() is None:
            self._process.send_signal(number)
        return self._process.wait(TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(TIMEOUT_S)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()


@contextmanager
def serving(*words: str, cwd: Path) -> Iterator[ServeProcess]:
    """Run a server that is ready."""
    with ServeProcess(*words, cwd=cwd) as server:
        yield server.wait_until_ready()


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of nbdserve to its end."""
    return subprocess.run(
        [sys.executable, "-m", "nbdserve", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
