"""What clients that mean harm do to the others: p99 latency and memory.

For each attack a fresh server; the victim reads 4 KiB at a time from the page cache, in
turn alone and while the attack goes on, so that whatever else the machine does falls on
both.
"""

import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.attackers import ATTACKS
from tests.bench.cells import KIB, Cell, Disk
from tests.bench.contenders import Contender
from tests.bench.disks import Disks
from tests.bench.load import Sample, cpu_seconds, measure
from tests.helpers.servers import ROOT, Server

VICTIM = Cell(
    "victim",
    "4 KiB random read, depth 1",
    Disk.ALLOCATED,
    "randread",
    4 * KIB,
    1,
    options=("--size=64M",),
)
READY_TIMEOUT_S = 60.0


@dataclass
class Outcome:
    """What one attack did.

    Attributes:
        idle: Samples of the victim alone, one for each round.
        attacked: Samples with the attack going on.
        rss_kib: The server's largest resident set before the attack and with it.
    """

    idle: list[Sample] = field(default_factory=list)
    attacked: list[Sample] = field(default_factory=list)
    rss_kib: tuple[int, int] = (0, 0)


@contextmanager
def attacking(name: str, server: Server) -> Iterator[None]:
    """Have an attack going on."""
    argv = [sys.executable, "-m", "tests.bench.attackers", name]
    argv += [str(server.unix), server.export]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError(f"the attack {name} failed")
            yield
        finally:
            process.kill()


def run_attacks(
    scratch: Path,
    contender: Contender,
    names: Sequence[str],
    *,
    rounds: int,
    runtime_s: float,
    cpu: str | None,
) -> dict[str, Outcome]:
    """Try each attack in each round.

    Args:
        scratch: A folder for the image and the server's files.
        contender: The server.
        names: Of `attackers.ATTACKS`.
        rounds: How often.
        runtime_s: How long each measurement takes.
        cpu: The processors for fio, in taskset's words; None for any.
    """
    disks = Disks(scratch)
    image = disks.prepare(VICTIM.disk, contender.image_format)
    outcomes = {name: Outcome() for name in names}
    for number in range(rounds):
        for name, outcome in outcomes.items():
            with (
                disks.settled(VICTIM.disk, image, cold=False, kept=True),
                contender.start(image, scratch / "server") as server,
            ):
                idle = measure(VICTIM, server, runtime_s=runtime_s, cpu=cpu)
                spent = cpu_seconds(server.pid)
                with attacking(name, server):
                    hit = measure(VICTIM, server, runtime_s=runtime_s, cpu=cpu)
                    spent = cpu_seconds(server.pid) - spent
            outcome.idle.append(idle)
            outcome.attacked.append(hit)
            outcome.rss_kib = (
                max(outcome.rss_kib[0], idle.peak_rss_kib),
                max(outcome.rss_kib[1], hit.peak_rss_kib),
            )
            sys.stderr.write(
                f"round {number + 1}  {name:14} p99 {idle.p99_us:6.0f} us,"
                f" attacked {hit.p99_us:6.0f} us; {hit.peak_rss_kib // 1024} MiB,"
                f" {spent:.1f} s of CPU\n"
            )
    return outcomes


def rows(outcomes: dict[str, Outcome]) -> list[list[str]]:
    """The table: medians of p99, their ratio, memory."""
    head = ["attack", "p99 idle us", "p99 attacked us", "ratio", "rate kept"]
    table = [[*head, "peak MiB before", "peak MiB"]]
    for name, outcome in outcomes.items():
        idle, hit = _median_p99(outcome.idle), _median_p99(outcome.attacked)
        kept = statistics.median(
            attacked.requests_per_s / alone.requests_per_s
            for alone, attacked in zip(outcome.idle, outcome.attacked, strict=True)
        )
        table.append(
            [
                *(name, f"{idle:.0f}", f"{hit:.0f}", f"{hit / idle:.2f}x"),
                *(f"{kept:.0%}", *(f"{kib // 1024}" for kib in outcome.rss_kib)),
            ]
        )
    return table


def _median_p99(samples: Sequence[Sample]) -> float:
    return statistics.median(sample.p99_us for sample in samples)


def names_of(patterns: Sequence[str]) -> list[str]:
    """The attacks that are meant; none are all."""
    return [name for name in ATTACKS if not patterns or name in patterns]
