"""One run: a server, fio's nbd engine against it, and what both cost."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench.cells import Cell
from tests.bench.disks import SIZES
from tests.helpers.servers import Server
from tests.helpers.tools import run

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Sample:
    """What one run gave.

    Attributes:
        requests_per_s: As the client counted.
        bytes_per_s: The same in bytes.
        p99_us: The latency that one request in a hundred exceeds.
        cpu_us_per_request: Server time, user and kernel, of all its threads.
        peak_rss_kib: The server's largest resident set, all its processes together.
    """

    requests_per_s: float
    bytes_per_s: float
    p99_us: float
    cpu_us_per_request: float
    peak_rss_kib: int


def measure(
    cell: Cell,
    server: Server,
    *,
    runtime_s: float,
    cpu: str | None,
    urgent: bool = False,
) -> Sample:
    """Load a running server.

    Args:
        cell: The load.
        server: Already serving the cell's disk on a Unix socket.
        runtime_s: How long, where the cell does not say how much.
        cpu: The processors for fio, in taskset's words; None for any.
        urgent: Whether fio has a real-time priority, so that it does not wait for a
            processor that others use. That takes root, and is left out without.
    """
    before = cpu_seconds(server.pid)
    urgency = ["chrt", "--fifo", "1"] if urgent and os.geteuid() == 0 else []
    # Not from stdout: the nbd engine greets there.
    report = server.directory / "fio.json"
    uri = server.uri("unix")
    run(*urgency, *fio_command(cell, uri, report, runtime_s=runtime_s, cpu=cpu))
    spent = cpu_seconds(server.pid) - before
    rate, bytes_per_s, p99_us, requests = sample_of(report)
    return Sample(
        requests_per_s=rate,
        bytes_per_s=bytes_per_s,
        p99_us=p99_us,
        cpu_us_per_request=spent * 1e6 / requests,
        peak_rss_kib=rss_kib(server.pid),
    )


def sample_of(report: Path) -> tuple[float, float, float, int]:
    """Read fio's report: requests and bytes a second, p99 in us, requests."""
    (job,) = json.loads(report.read_text())["jobs"]
    sides = [job[side] for side in ("read", "write") if job[side]["total_ios"]]
    requests = sum(side["total_ios"] for side in sides)
    seconds = max(side["runtime"] for side in sides) / 1000
    return (
        requests / seconds,
        sum(side["io_bytes"] for side in sides) / seconds,
        max(side["clat_ns"]["percentile"]["99.000000"] for side in sides) / 1e3,
        requests,
    )


def rss_kib(pid: int) -> int:
    """The largest resident set of a process and its children so far, together."""
    return sum(_peak_rss_kib(process) for process in _processes(pid))


def cpu_seconds(pid: int) -> float:
    """User and kernel time of a process and its children, all threads."""
    total = 0
    for process in _processes(pid):
        # The name in parentheses may have spaces: count from its end (proc(5)).
        stat = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        total += int(stat[11]) + int(stat[12])
    return total / _TICKS_PER_S


def fio_command(
    cell: Cell, uri: str, report: Path, *, runtime_s: float, cpu: str | None
) -> list[str]:
    """The command that loads `uri` and writes `report`."""
    argv = ["taskset", "-c", cpu] if cpu is not None else []
    argv += ["fio", "--name=bench", "--ioengine=nbd", f"--uri={uri}"]
    argv += [f"--rw={cell.pattern}", f"--bs={cell.block_size}"]
    argv += [f"--iodepth={cell.depth}", f"--size={SIZES[cell.disk]}", "--randseed=1"]
    argv += ["--output-format=json", f"--output={report}", *cell.options]
    if cell.work is None:
        argv += ["--time_based", f"--runtime={runtime_s}"]
    else:
        argv.append(f"--io_size={cell.work}")
    return argv


def _processes(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            children = (task / "children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # a thread that ended meanwhile, as those of a closed connection
        for child in children:
            yield from _processes(int(child))


def _peak_rss_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return 0


def missing_tools() -> list[str]:
    """The programs that a benchmark needs and this machine does not have."""
    needed = ("fio", "qemu-img", "qemu-nbd", "nbdkit", "taskset")
    return [tool for tool in needed if shutil.which(tool) is None]
