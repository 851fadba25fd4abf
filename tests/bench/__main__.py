"""Run the benchmark: servers in turn, several rounds, medians.

The servers take turns within a round, so that whatever else the machine does
falls on all of them.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from tests.bench import attack, report
from tests.bench.attackers import ATTACKS
from tests.bench.cells import CELLS, Cell
from tests.bench.contenders import CONTENDERS, NBDSERVE, Contender, installed_version
from tests.bench.disks import Disks
from tests.bench.load import Sample, measure, missing_tools


def main() -> int:
    """Parse, run, print."""
    arguments = parse()
    if arguments.list:
        lines = [f"{cell.name:20} {cell.title}" for cell in CELLS]
        lines += [contender.name for contender in CONTENDERS]
        sys.stdout.write("\n".join(lines) + "\n")
        return 0
    missing = missing_tools()
    if missing:
        sys.stderr.write(f"missing: {', '.join(missing)}; see tests/run\n")
        return 1
    sys.stderr.write(installed_version() + "\n")
    if arguments.attack is not None:
        return attacks(arguments)
    cells = [cell for cell in CELLS if chosen(cell.name, arguments.cells)]
    contenders = [c for c in CONTENDERS if chosen(c.name, arguments.servers)]
    if not cells or not contenders:
        sys.stderr.write("no such cell or server; --list names them\n")
        return 1
    results: report.Results = {}
    with tempfile.TemporaryDirectory(dir=arguments.dir, prefix="bench-") as scratch:
        bench = Bench(Path(scratch), arguments.runtime, pin=arguments.pin)
        for number in range(arguments.rounds):
            for cell in cells:
                # Each round another server begins.
                turn = number % len(contenders)
                for contender in contenders[turn:] + contenders[:turn]:
                    if not contender.takes(cell):
                        continue
                    sample = bench.run(cell, contender)
                    found = results.setdefault(cell.name, {})
                    found.setdefault(contender.name, []).append(sample)
                    progress(number, cell, contender, sample)
    names = [contender.name for contender in contenders]
    show(cells, results, names, as_markdown=arguments.markdown)
    if arguments.json is not None:
        text = json.dumps(report.as_json(results), indent=1)
        arguments.json.write_text(f"{text}\n")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument(
        "--runtime", type=float, default=2.0, help="seconds of a timed run; default: 2"
    )
    parser.add_argument(
        "--cells", nargs="*", metavar="NAME", help="only these; * stands for any text"
    )
    parser.add_argument(
        "--servers", nargs="*", metavar="NAME", help="only these, likewise"
    )
    parser.add_argument(
        "--attack",
        nargs="*",
        choices=ATTACKS,
        metavar="NAME",
        help="instead: what clients that mean harm do to others, all of them or these:"
        f" {', '.join(ATTACKS)}",
    )
    parser.add_argument("--dir", type=Path, help="where the images are made")
    parser.add_argument(
        "--pin", action="store_true", help="fio on the last processor alone"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample")
    parser.add_argument(
        "--markdown", action="store_true", help="print the table of the README"
    )
    parser.add_argument(
        "--list", action="store_true", help="name the cells and servers, and leave"
    )
    return parser.parse_args()


def attacks(arguments: argparse.Namespace) -> int:
    """Measure what attacks do to others, for each chosen server on its own."""
    wanted = arguments.servers or [NBDSERVE]
    for contender in CONTENDERS:
        if not chosen(contender.name, wanted):
            continue
        with tempfile.TemporaryDirectory(dir=arguments.dir, prefix="bench-") as scratch:
            outcomes = attack.run_attacks(
                Path(scratch),
                contender,
                attack.names_of(arguments.attack),
                rounds=arguments.rounds,
                runtime_s=arguments.runtime,
                cpu=fio_cpu(pin=arguments.pin),
            )
        layout = report.markdown if arguments.markdown else report.aligned
        sys.stdout.write(f"{contender.name}\n{layout(attack.rows(outcomes))}\n")
    return 0


def fio_cpu(*, pin: bool) -> str | None:
    """The processor that fio runs on, if it is to be one."""
    return str(max(os.sched_getaffinity(0))) if pin else None


def chosen(name: str, patterns: Sequence[str] | None) -> bool:
    """Whether any of the patterns is the name; no patterns choose everything."""
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


class Bench:
    """Runs one cell on one server after another in a scratch folder."""

    def __init__(self, scratch: Path, runtime_s: float, *, pin: bool) -> None:
        self._scratch = scratch
        self._runtime_s = runtime_s
        self._fio_cpu = fio_cpu(pin=pin)
        self._disks = Disks(scratch)

    def run(self, cell: Cell, contender: Contender) -> Sample:
        """A fresh server, one load, one sample."""
        image = self._disks.prepare(cell.disk, contender.image_format)
        with (
            self._disks.settled(cell.disk, image, cold=cell.cold),
            contender.start(image, self._scratch / "server") as server,
        ):
            sample = measure(cell, server, runtime_s=self._runtime_s, cpu=self._fio_cpu)
        self._disks.discard(cell.disk, image)
        return sample


def progress(number: int, cell: Cell, contender: Contender, sample: Sample) -> None:
    """A line for who watches."""
    sys.stderr.write(
        f"round {number + 1}  {cell.name:20} {contender.name:14}"
        f" {report.rate(cell, sample):>12}"
        f" {sample.cpu_us_per_request:8.1f} us {sample.peak_rss_kib // 1024:5} MiB\n"
    )


def show(
    cells: Sequence[Cell],
    results: report.Results,
    names: Sequence[str],
    *,
    as_markdown: bool,
) -> None:
    """Print the tables."""
    layout = report.markdown if as_markdown else report.aligned
    tables = (
        report.rate_rows(cells, results, names),
        report.cost_rows(cells, results, names),
        report.memory_row(results, names),
    )
    sys.stdout.write("\n\n".join(layout(rows) for rows in tables) + "\n")


if __name__ == "__main__":
    sys.exit(main())
