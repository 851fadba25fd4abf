"""What one cell can't show: ``python -m tests.bench.trials [NAME...]``.

Each trial prints a table of its own. Servers and settings take turns, and figures are
medians of the rounds.
"""

import argparse
import contextlib
import dataclasses
import os
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench import scale
from tests.bench.cells import KIB, MIB, Cell, Disk
from tests.bench.contenders import INSTALLED, installed_version, state_options
from tests.bench.disks import Disks
from tests.bench.load import cpu_seconds, fio_command, measure, sample_of
from tests.bench.report import Rows, aligned
from tests.helpers.certificates import make_certificates
from tests.helpers.servers import Server, nbdkit_file, nbdserve, qemu_nbd
from tests.helpers.tools import run

HOT = Cell("hot", "", Disk.ALLOCATED, "randread", 4 * KIB, 1, options=("--size=64M",))
BUSY = Cell("busy", "", Disk.ALLOCATED, "randread", 4 * KIB, 32)


@dataclasses.dataclass(frozen=True, slots=True)
class Neighbour:
    """What another client does while hot reads are timed, as fio says it.

    Attributes:
        throttled: Bytes per second and direction that the disk gives the server, None for
            all it has.
    """

    pattern: str
    block_size: int
    depth: int
    throttled: int | None = None


NEIGHBOURS = {
    "cold 4 KiB reads, depth 32": Neighbour("randread", 4 * KIB, 32),
    "cold 1 MiB reads, depth 8": Neighbour("randread", MIB, 8),
    "1 MiB writes, depth 8, each 8 flushed": Neighbour("randwrite", MIB, 8),
    "cold 4 KiB reads, 4 MiB/s": Neighbour("randread", 4 * KIB, 32, 4 * MIB),
    "4 KiB writes, 4 MiB/s": Neighbour("randwrite", 4 * KIB, 32, 4 * MIB),
}

#: More than is read while the other client is timed: it must stay cold.
_SLOW_BYTES = 4 << 30

#: Where the kernel throttles disks for groups of processes.
_BLKIO = Path("/sys/fs/cgroup/blkio")


def tls(scratch: Path, rounds: int) -> Rows:
    """1 GiB by nbdcopy over one encrypted connection."""
    disks = Disks(scratch)
    images = {kind: disks.prepare(Disk.ALLOCATED, kind) for kind in ("qcow2", "raw")}
    folder = scratch / "pki"
    folder.mkdir()
    pki = make_certificates(folder)
    ours = ["--tls-certificates", str(pki.server), *state_options()]
    credentials = f"tls-creds-x509,id=tls,dir={pki.server},endpoint=server"
    theirs = ["--object", f"{credentials},verify-peer=no", "--tls-creds", "tls"]

    def start(name: str) -> Server:
        where = scratch / "server"
        if name.startswith("nbdserve"):
            kind = "raw" if name.endswith("raw") else "qcow2"
            more = ["--workers", "2"] if "workers" in name else []
            return nbdserve(
                images[kind],
                where,
                image_format=kind,
                transports=["tcp"],
                options=[*ours, *more],
                command=INSTALLED,
            )
        if name.startswith("qemu"):
            aio = name.split()[1]
            return qemu_nbd(
                images["qcow2"],
                where,
                image_format="qcow2",
                transport="tcp",
                options=[*theirs, f"--aio={aio}"],
            )
        options = ["--tls=require", f"--tls-certificates={pki.server}"]
        return nbdkit_file(images["raw"], where, transport="tcp", options=options)

    names = ["qemu threads", "qemu io_uring", "nbdkit raw", "nbdserve"]
    names += ["nbdserve raw", "nbdserve, 2 workers"]
    times: dict[str, list[float]] = {name: [] for name in names}
    spent: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            with contextlib.ExitStack() as held:
                for path in images.values():
                    hot = disks.settled(Disk.ALLOCATED, path, cold=False, kept=True)
                    held.enter_context(hot)
                server = held.enter_context(start(name))
                uri = server.uri("tcp").replace("nbd:", "nbds:", 1)
                uri += f"?tls-certificates={pki.clients['alice']}"
                before = cpu_seconds(server.pid)
                began_s = time.perf_counter()
                run("nbdcopy", "--connections=1", uri, "null:")
                times[name].append(time.perf_counter() - began_s)
                spent[name].append(cpu_seconds(server.pid) - before)
    best_qemu = min(statistics.median(times[name]) for name in names[:2])
    nbdkit = statistics.median(times[names[2]])
    # its AES is twice as fast from one version to another
    title = f"TLS, 1 GiB; {ssl.OPENSSL_VERSION}"
    rows = [[title, "seconds", "server CPU s", "against qemu", "against nbdkit"]]
    for name in names:
        middle = statistics.median(times[name])
        cpu = statistics.median(spent[name])
        rates = [f"{best_qemu / middle:.2f}x", f"{nbdkit / middle:.2f}x"]
        rows.append([name, f"{middle:.2f}", f"{cpu:.2f}", *rates])
    return rows


def fairness(scratch: Path, rounds: int) -> Rows:
    """p99 of hot 4 KiB reads beside a client that has to wait for the disk.

    Three processes share the processors then. Who is timed has a real-time priority: else
    this were about which of the clients gets a processor, which is the kernel's affair. What
    remains of that shows where the neighbour is served by another server. Throttled
    neighbours are measured by who may make a control group (blkio, version 1).
    """
    disks = Disks(scratch)
    hot = disks.prepare(Disk.ALLOCATED, "qcow2")
    slow = scratch / "slow.qcow2"
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=full"]
    run(*argv, slow, str(_SLOW_BYTES))
    can_throttle = os.access(_BLKIO, os.W_OK)
    names = [
        name for name, at in NEIGHBOURS.items() if can_throttle or not at.throttled
    ]
    alone: list[float] = []
    found: dict[tuple[str, bool], list[float]] = {
        (name, same): [] for name in names for same in (True, False)
    }
    for _ in range(rounds):
        for (name, same), p99s in found.items():
            with contextlib.ExitStack() as held:
                held.enter_context(
                    disks.settled(Disk.ALLOCATED, hot, cold=False, kept=True)
                )
                held.enter_context(disks.settled(Disk.ALLOCATED, slow, cold=True))
                one = _serving_disk(hot, scratch / "one", *([slow] if same else []))
                other = held.enter_context(one)
                if not same:
                    other = _serving_disk(slow, scratch / "other")
                    held.enter_context(other)
                alone.append(
                    measure(HOT, one, runtime_s=1.0, cpu=None, urgent=True).p99_us
                )
                uri = other.uri("unix", "slow" if same else "disk")
                with _throttled(other.pid, slow, name), _neighbour(name, uri):
                    p99s.append(
                        measure(HOT, one, runtime_s=1.0, cpu=None, urgent=True).p99_us
                    )
    idle = statistics.median(alone)
    rows = [["hot 4 KiB reads, depth 1: p99", "us", "against alone", "other server us"]]
    rows.append(["alone", f"{idle:.0f}", "1.00x", ""])
    for name in NEIGHBOURS:
        if name not in names:
            rows.append([f"beside {name}", "not measured", "", ""])
            continue
        p99, elsewhere = (
            statistics.median(found[name, same]) for same in (True, False)
        )
        ratio = f"{p99 / idle:.2f}x"
        rows.append([f"beside {name}", f"{p99:.0f}", ratio, f"{elsewhere:.0f}"])
    return rows


def _serving_disk(image: Path, where: Path, *slow: Path) -> Server:
    options = [*(f"slow={path}" for path in slow), *state_options()]
    return nbdserve(
        image,
        where,
        image_format="qcow2",
        transports=["unix"],
        options=options,
        command=INSTALLED,
    )


@contextlib.contextmanager
def _throttled(pid: int, image: Path, name: str) -> Iterator[None]:
    """Have the disk of `image` be as slow for a process as `NEIGHBOURS` says of `name`."""
    rate = NEIGHBOURS[name].throttled
    if rate is None:
        yield
        return
    number = image.stat().st_dev
    disk = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    if (disk / "partition").exists():
        disk = disk.parent
    group = _BLKIO / f"nbdserve-bench-{os.getpid()}"
    group.mkdir()
    try:
        for direction in ("read", "write"):
            limit = f"{(disk / 'dev').read_text().strip()} {rate}"
            (group / f"blkio.throttle.{direction}_bps_device").write_text(limit)
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        (_BLKIO / "cgroup.procs").write_text(str(pid))
        group.rmdir()


@contextlib.contextmanager
def _neighbour(name: str, uri: str) -> Iterator[None]:
    """Have a client of `uri` do what is called `name`."""
    it = NEIGHBOURS[name]
    argv = ["fio", "--name=slow", "--ioengine=nbd", f"--uri={uri}"]
    argv += [f"--rw={it.pattern}", f"--bs={it.block_size}", f"--iodepth={it.depth}"]
    argv += ["--time_based", "--runtime=30", f"--size={_SLOW_BYTES}"]
    argv += ["--fsync=8"] if it.pattern == "randwrite" else []
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as fio:
        try:
            time.sleep(0.5)
            yield
        finally:
            fio.terminate()


def workers(scratch: Path, rounds: int) -> Rows:
    """Two exports read at once, by one process and by two workers."""
    disks = Disks(scratch)
    first = disks.prepare(Disk.ALLOCATED, "qcow2")
    second = scratch / "second.qcow2"
    run("cp", first, second)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for count, found in rates.items():
            options = [f"second={second}", "--workers", str(count), *state_options()]
            with (
                disks.settled(Disk.ALLOCATED, first, cold=False, kept=True),
                disks.settled(Disk.ALLOCATED, second, cold=False, kept=True),
                nbdserve(
                    first,
                    scratch / "server",
                    image_format="qcow2",
                    transports=["unix"],
                    options=options,
                    command=INSTALLED,
                ) as server,
            ):
                loads = []
                for export in ("disk", "second"):
                    report = server.directory / f"{export}.json"
                    uri = server.uri("unix", export)
                    argv = fio_command(BUSY, uri, report, runtime_s=2.0, cpu=None)
                    fio = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
                    loads.append((fio, report))
                for fio, _ in loads:
                    fio.wait()
                total = sum(sample_of(report)[0] for _, report in loads)
            found.append(total)
    middles = {count: statistics.median(found) for count, found in rates.items()}
    rows = [["4 KiB random reads, depth 32, of two exports", "k/s", "against one"]]
    for count, middle in middles.items():
        ratio = f"{middle / middles[1]:.2f}x"
        rows.append([f"workers: {count}", f"{middle / 1e3:.1f}", ratio])
    return rows


TRIALS: dict[str, Callable[[Path, int], Rows]] = {
    "tls": tls,
    "fairness": fairness,
    "workers": workers,
    "start": scale.start,
    "connections": scale.connections,
    "exports": scale.exports,
    "tables": scale.tables,
    "sizes": scale.sizes,
}


def main() -> int:
    """Run the trials that are named; none are all."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.trials", description=__doc__
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(TRIALS))
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--dir", type=Path, help="where the images are made")
    arguments = parser.parse_args()
    # a server is installed with its bytecode
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.stdout.write(installed_version() + "\n")
    for name in arguments.names or TRIALS:
        if name not in TRIALS:
            parser.error(f"no trial {name!r}; there are {', '.join(TRIALS)}")
        with tempfile.TemporaryDirectory(dir=arguments.dir, prefix="trial-") as scratch:
            rows = TRIALS[name](Path(scratch), arguments.rounds)
        sys.stdout.write(aligned(rows) + "\n\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
