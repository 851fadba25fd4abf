"""NBD servers as real processes, started as a person would and stopped with SIGTERM.

The tests of real clients and the benchmark share this file, so that what is
measured is what is tested. The servers of other projects are here for two
reasons: the benchmark compares with them, and a test of a client is proven by
running it against a server that is known to be right
(``NBDSERVE_TEST_PEER=qemu-nbd``).
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parents[2]

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
POLL_INTERVAL_S = 0.01

_TCP_URI = re.compile(r"nbds?://127\.0\.0\.1:(\d+)")
_COMPLAINTS = ("Traceback", "Exception ignored", "never awaited")


#: The package of the checkout, with this interpreter; warnings become complaints.
NBDSERVE = (sys.executable, "-W", "error", "-m", "nbdserve")


class ServerError(Exception):
    """A server did not start, or did not end as it should."""


@dataclass
class Server:
    """One running server process.

    Attributes:
        argv: Its command line.
        directory: Where its stdout and stderr are kept.
        export: The name of the export that the URIs lead to.
        unix: The Unix socket it listens on, if any.
        port: The TCP port on 127.0.0.1, if any; 0 until the server says which.
    """

    argv: Sequence[str]
    directory: Path
    export: str
    unix: Path | None = None
    port: int | None = None
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        if self._process is None:
            raise ServerError("the server is not running")
        return self._process.pid

    @property
    def stdout(self) -> str:
        """What the server has printed so far."""
        return (self.directory / "stdout").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """What the server has logged so far."""
        return (self.directory / "stderr").read_text(errors="replace")

    def uri(self, transport: str, export: str | None = None) -> str:
        """The URI of `export` (this server's own by default) over "tcp" or "unix"."""
        name = urllib.parse.quote(self.export if export is None else export)
        if transport == "unix":
            return f"nbd+unix:///{name}?socket={self.unix}"
        return f"nbd://127.0.0.1:{self.port}/{name}"

    def start(self) -> Self:
        """Start the process and wait until a client could connect."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (
            (self.directory / "stdout").open("wb") as stdout,
            (self.directory / "stderr").open("wb") as stderr,
        ):
            self._process = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                cwd=ROOT,
            )
        try:
            self._wait_until_connectable()
        except BaseException:
            self.kill()
            raise
        return self

    def stop(self) -> None:
        """End with SIGTERM; raise unless it leaves cleanly, with nothing to hide."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise ServerError(
                f"still there {STOP_TIMEOUT_S} s after SIGTERM:\n{self.stderr}"
            ) from None
        if code != 0:
            raise ServerError(f"exit code {code} after SIGTERM:\n{self.stderr}")
        if any(complaint in self.stderr for complaint in _COMPLAINTS):
            raise ServerError(f"stderr is not clean:\n{self.stderr}")

    def kill(self) -> None:
        """End with SIGKILL, as a crash would."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.wait()

    def __enter__(self) -> Self:
        """Start."""
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Stop, and show what the server logged if the test failed meanwhile."""
        if kind is None:
            self.stop()
            return
        sys.stderr.write(self.stderr)
        with contextlib.suppress(ServerError):  # the first failure is the story
            self.stop()

    def _wait_until_connectable(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._connectable():
            if self._process is not None and self._process.poll() is not None:
                raise ServerError(f"{' '.join(self.argv)} ended:\n{self.stderr}")
            if time.monotonic() > deadline:
                raise ServerError(f"{' '.join(self.argv)} is not up:\n{self.stderr}")
            time.sleep(POLL_INTERVAL_S)

    def _connectable(self) -> bool:
        if self.port == 0:
            printed = _TCP_URI.search(self.stdout)
            if printed is None:
                return False
            self.port = int(printed[1])
        try:
            if self.unix is not None:
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.connect(str(self.unix))
            if self.port is not None:
                socket.create_connection(("127.0.0.1", self.port)).close()
        except OSError:
            return False
        return True


def nbdserve(
    image: Path,
    directory: Path,
    *,
    image_format: str = "auto",
    export: str = "disk",
    transports: Sequence[str] = ("tcp", "unix"),
    options: Sequence[str] = (),
    command: Sequence[str] = NBDSERVE,
) -> Server:
    """nbdserve on one image."""
    unix = directory / "nbd.sock" if "unix" in transports else None
    argv = [*command, "serve", f"{export}={image}", "--format", image_format]
    if unix is not None:
        argv += ["--unix", str(unix)]
    if "tcp" in transports:
        argv += ["--listen", "127.0.0.1:0"]
    port = 0 if "tcp" in transports else None
    return Server([*argv, *options], directory, export, unix, port)


def qemu_nbd(
    image: Path,
    directory: Path,
    *,
    image_format: str,
    export: str = "disk",
    transport: str = "unix",
    options: Sequence[str] = (),
) -> Server:
    """qemu-nbd on one image; it listens on one address only."""
    argv = ["qemu-nbd", "--persistent", "--shared=16", "--discard=unmap"]
    argv += ["--cache=writeback", "-f", image_format, "-x", export]
    unix, port = None, None
    if transport == "unix":
        unix = directory / "nbd.sock"
        argv += ["-k", str(unix)]
    else:
        port = _free_port()
        argv += ["-b", "127.0.0.1", "-p", str(port)]
    return Server([*argv, *options, str(image)], directory, export, unix, port)


def nbdkit_file(
    image: Path,
    directory: Path,
    *,
    export: str = "disk",
    transport: str = "unix",
    options: Sequence[str] = (),
) -> Server:
    """nbdkit's file plugin on a raw image; it listens on one address only."""
    unix, port = None, None
    if transport == "unix":
        unix = directory / "nbd.sock"
        where = ["--unix", str(unix)]
    else:
        port = _free_port()
        where = ["--ipaddr", "127.0.0.1", "--port", str(port)]
    argv = ["nbdkit", "--foreground", *where, *options]
    return Server([*argv, "file", str(image)], directory, export, unix, port)


def server_under_test(
    image: Path,
    directory: Path,
    *,
    image_format: str,
    transport: str,
    options: Sequence[str] = (),
) -> Server:
    """nbdserve, or the peer that NBDSERVE_TEST_PEER names to prove the tests."""
    peer = os.environ.get("NBDSERVE_TEST_PEER", "nbdserve")
    if peer == "qemu-nbd":
        return qemu_nbd(
            image,
            directory,
            image_format=image_format,
            transport=transport,
            options=["--read-only"] if "--read-only" in options else [],
        )
    if peer != "nbdserve":
        raise ServerError(f"NBDSERVE_TEST_PEER={peer}: not nbdserve or qemu-nbd")
    return nbdserve(
        image,
        directory,
        # "auto" finds qcow and qcow2 by their magic, as most people rely on.
        image_format="raw" if image_format == "raw" else "auto",
        transports=[transport],
        options=options,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
