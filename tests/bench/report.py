"""Medians of all rounds, as a table for people, for the README and for programs."""

import dataclasses
import platform
import statistics
from collections.abc import Sequence

from tests.bench.cells import Cell
from tests.bench.contenders import NBDKIT, NBDSERVE, QEMU
from tests.bench.load import Sample

# Samples by cell name, then by contender name, in the order of the rounds.
Results = dict[str, dict[str, list[Sample]]]

# A table: the head, then a row for each line.
Rows = list[list[str]]

NOTHING = "-"


def median(samples: Sequence[Sample]) -> Sample:
    """The median of each figure on its own; the largest of the peaks."""
    return Sample(
        requests_per_s=statistics.median(s.requests_per_s for s in samples),
        bytes_per_s=statistics.median(s.bytes_per_s for s in samples),
        p99_us=statistics.median(s.p99_us for s in samples),
        cpu_us_per_request=statistics.median(s.cpu_us_per_request for s in samples),
        peak_rss_kib=max(s.peak_rss_kib for s in samples),
    )


def spread(samples: Sequence[Sample]) -> float:
    """How far the rounds lie apart: (best - worst) / median."""
    rates = [sample.requests_per_s for sample in samples]
    return (max(rates) - min(rates)) / statistics.median(rates)


def ratio(results: dict[str, list[Sample]], ours: str, others: Sequence[str]) -> str:
    """Our median rate over the best of `others`."""
    rates = {name: median(samples).requests_per_s for name, samples in results.items()}
    rivals = [rates[name] for name in others if name in rates]
    if ours not in rates or not rivals:
        return NOTHING
    return f"{rates[ours] / max(rivals):.2f}x"


def rate(cell: Cell, sample: Sample) -> str:
    """A rate in the unit that people use for this load."""
    if cell.in_bytes:
        return f"{sample.bytes_per_s / 1e9:.2f} GB/s"
    return f"{sample.requests_per_s / 1e3:.1f}k/s"


def rate_rows(cells: Sequence[Cell], results: Results, names: Sequence[str]) -> Rows:
    """Absolute figures and ratios, one row for each cell."""
    rows = [["cell", *names, "against qemu", "against nbdkit"]]
    for cell in cells:
        found = results.get(cell.name, {})
        figures = [
            rate(cell, median(found[name])) if name in found else NOTHING
            for name in names
        ]
        ratios = [ratio(found, NBDSERVE, QEMU), ratio(found, NBDSERVE, [NBDKIT])]
        rows.append([cell.title, *figures, *ratios])
    return rows


def cost_rows(cells: Sequence[Cell], results: Results, names: Sequence[str]) -> Rows:
    """Server CPU per request, p99 latency and spread for each server."""
    rows = [["CPU us/request · p99 us · spread", *names]]
    for cell in cells:
        found = results.get(cell.name, {})
        row = [cell.title]
        for name in names:
            if name not in found:
                row.append(NOTHING)
                continue
            middle = median(found[name])
            row.append(
                f"{middle.cpu_us_per_request:.1f} · {middle.p99_us:.0f}"
                f" · {spread(found[name]):.0%}"
            )
        rows.append(row)
    return rows


def memory_row(results: Results, names: Sequence[str]) -> Rows:
    """The largest resident set of each server in any cell."""
    peaks = []
    for name in names:
        found = [cell[name] for cell in results.values() if name in cell]
        peak = max((median(samples).peak_rss_kib for samples in found), default=0)
        peaks.append(f"{peak / 1024:.0f} MiB")
    return [["", *names], ["peak memory", *peaks]]


def aligned(rows: Rows) -> str:
    """A table for a terminal."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *rest = (
            cell.rjust(width) for cell, width in zip(row, widths, strict=True)
        )
        lines.append("  ".join([first.strip().ljust(widths[0]), *rest]).rstrip())
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def markdown(rows: Rows) -> str:
    """A table for the README."""
    head, *body = rows
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *body])


def as_json(results: Results) -> dict[str, object]:
    """Every sample, with the machine that gave it."""
    return {
        "machine": {"kernel": platform.release(), "python": platform.python_version()},
        "cells": {
            cell: {
                name: [dataclasses.asdict(sample) for sample in samples]
                for name, samples in found.items()
            }
            for cell, found in results.items()
        },
    }
