"""How figures grow: with connections, exports, tables and the size of the disk."""

import random
import statistics
import subprocess
import time
from pathlib import Path

from tests.bench.cells import GIB, MIB
from tests.bench.contenders import INSTALLED, state_options
from tests.bench.load import cpu_seconds, rss_kib
from tests.bench.probe import Probe
from tests.bench.report import Rows
from tests.helpers.servers import ROOT, Server, nbdserve
from tests.helpers.tools import run

TIB = 1 << 40

#: Bytes of the disk that an L2 table of 64 KiB describes.
TABLE_SPAN = 512 * MIB


def start(scratch: Path, rounds: int) -> Rows:
    """From the command to the first client that is served; and to the help."""
    image = scratch / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "10G")
    served: list[float] = []
    helped: list[float] = []
    for _ in range(rounds + 1):
        began_s = time.perf_counter()
        # no test interpreter options: as an operator starts it
        argv = [*INSTALLED, "serve", f"disk={image}"]
        argv += ["--unix", str(scratch / "s"), *state_options()]
        with subprocess.Popen(
            argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            while True:
                try:
                    Probe(scratch / "s", "disk").close()
                    break
                except (FileNotFoundError, ConnectionRefusedError):
                    time.sleep(0.001)
            served.append(time.perf_counter() - began_s)
            process.terminate()
        began_s = time.perf_counter()
        run(*INSTALLED, "--help")
        helped.append(time.perf_counter() - began_s)
    del served[0], helped[0]  # these wrote the bytecode
    return [
        ["start-up", "ms, median", "ms, best", "target"],
        ["first client", *_ms(served), "250"],
        ["nbdserve --help", *_ms(helped), "120"],
    ]


def _ms(seconds: list[float]) -> list[str]:
    return [f"{statistics.median(seconds) * 1e3:.0f}", f"{min(seconds) * 1e3:.0f}"]


def connections(scratch: Path, _rounds: int) -> Rows:
    """1,000 connections on 100 exports, each with a read a second."""
    exports, clients, seconds = 100, 1000, 10
    names = [f"disk{number}" for number in range(exports)]
    for name in names:
        image = scratch / f"{name}.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", image, "1G")
    with _serving(
        scratch, [f"{name}={scratch}/{name}.qcow2" for name in names]
    ) as server:
        before_kib = rss_kib(server.pid)
        path = scratch / "server" / "nbd.sock"
        probes = [Probe(path, names[number % exports]) for number in range(clients)]
        for probe in probes:
            probe.read([0])
        connected_kib = rss_kib(server.pid)
        spent_s = cpu_seconds(server.pid)
        latencies = []
        began_s = time.perf_counter()
        for turn in range(seconds):
            for number, probe in enumerate(probes):
                at_s = time.perf_counter()
                probe.read([turn * 4096])
                latencies.append(time.perf_counter() - at_s)
                due_s = began_s + turn + number / clients
                time.sleep(max(0.0, due_s - time.perf_counter()))
        spent_s = cpu_seconds(server.pid) - spent_s
        for probe in probes:
            probe.close()
    p99_us = statistics.quantiles(latencies, n=100)[98] * 1e6
    each_kib = (connected_kib - before_kib) / clients
    return [
        [f"{clients} connections, {exports} exports, a read a second each", "figure"],
        ["memory of a connection", f"{each_kib:.1f} KiB"],
        ["server CPU of a request", f"{spent_s / (clients * seconds) * 1e6:.0f} us"],
        ["server CPU of a connection", f"{spent_s / clients / seconds * 100:.4f} %"],
        ["p99", f"{p99_us:.0f} us"],
        ["server memory", f"{connected_kib // 1024} MiB"],
    ]


def exports(scratch: Path, rounds: int) -> Rows:
    """10,000 exports in a file, opened when they are used."""
    count = 10_000
    image = scratch / "disk.qcow2"
    run(
        "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", image, "64M"
    )
    content = image.read_bytes()
    entries = []
    for number in range(count):
        (scratch / f"d{number}").write_bytes(content)
        entries.append(f'[[export]]\npath="{scratch}/d{number}"\nformat="qcow2"\n')
    config = scratch / "nbdserve.toml"
    config.write_text('open = "use"\n' + "".join(entries))
    times, peaks, firsts = [], [], []
    for _ in range(rounds):
        began_s = time.perf_counter()
        with _serving(scratch, [], "--config", str(config)) as server:
            times.append(time.perf_counter() - began_s)
            peaks.append(rss_kib(server.pid))
            path = scratch / "server" / "nbd.sock"
            began_s = time.perf_counter()
            with Probe(path, f"d{count // 2}") as probe:
                probe.read([0])
            firsts.append(time.perf_counter() - began_s)
    return [
        [f"{count} exports", "median", "target"],
        ["until clients can connect", f"{statistics.median(times):.2f} s", "2 s"],
        ["memory", f"{max(peaks) // 1024} MiB", "200 MiB"],
        ["first use of one", f"{statistics.median(firsts) * 1e3:.1f} ms", ""],
    ]


def tables(scratch: Path, _rounds: int) -> Rows:
    """A disk of 1 TiB with every cluster mapped, each L2 table used."""
    image = scratch / "disk.qcow2"
    options = "preallocation=metadata"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, str(TIB))
    with _serving(scratch, [f"disk={image}"]) as server:
        path = scratch / "server" / "nbd.sock"
        with Probe(path, "disk") as probe:
            probe.read([0])
            before_kib = rss_kib(server.pid)
            began_s = time.perf_counter()
            for offset in range(0, TIB, TABLE_SPAN):
                probe.read([offset])
            cold_us = (time.perf_counter() - began_s) / (TIB // TABLE_SPAN) * 1e6
            warm_kib = rss_kib(server.pid)
            began_s = time.perf_counter()
            for offset in range(0, TIB, TABLE_SPAN):
                probe.read([offset])
            warm_us = (time.perf_counter() - began_s) / (TIB // TABLE_SPAN) * 1e6
    return [
        ["1 TiB, all clusters mapped, 2048 tables", "figure"],
        ["memory before", f"{before_kib // 1024} MiB"],
        ["memory with every table used", f"{warm_kib // 1024} MiB"],
        ["first read of a table's range", f"{cold_us:.0f} us"],
        ["second round", f"{warm_us:.0f} us"],
    ]


def sizes(scratch: Path, rounds: int) -> Rows:
    """CPU of a hot 4 KiB read on disks of 1 GiB to 16 TiB, data all over them."""
    found: dict[int, list[float]] = {}
    spots = 64
    for size in (GIB, 16 * GIB, 256 * GIB, 4 * TIB, 16 * TIB):
        image = scratch / f"disk{size}.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", image, str(size))
        writes = []
        for spot in range(spots):
            writes += ["-c", f"write -P {spot + 1} {size // spots * spot} 1M"]
        run("qemu-io", *writes, image)
        found[size] = []
    generator = random.Random(0)
    for _ in range(rounds):
        for size, costs in found.items():
            with (
                _serving(scratch, [f"disk={scratch}/disk{size}.qcow2"]) as server,
                Probe(scratch / "server" / "nbd.sock", "disk") as probe,
            ):
                batches = [
                    [
                        size // spots * generator.randrange(spots)
                        + generator.randrange(256) * 4096
                        for _ in range(32)
                    ]
                    for _ in range(1500)
                ]
                for spot in range(spots):
                    probe.read([size // spots * spot + n * 4096 for n in range(256)])
                spent_s = cpu_seconds(server.pid)
                for offsets in batches:
                    probe.read(offsets)
                spent_s = cpu_seconds(server.pid) - spent_s
            costs.append(spent_s / (1500 * 32) * 1e6)
    middles = {size: statistics.median(costs) for size, costs in found.items()}
    rows = [["virtual size", "CPU us of a hot 4 KiB read", "against 1 GiB"]]
    for size, middle in middles.items():
        ratio = f"{middle / middles[GIB]:.2f}x"
        rows.append([f"{size // GIB} GiB", f"{middle:.1f}", ratio])
    return rows


def _serving(scratch: Path, images: list[str], *options: str) -> Server:
    """A server of several images on a Unix socket."""
    where = scratch / "server"
    first, *others = images or [""]
    server = nbdserve(
        Path(first.partition("=")[2]),
        where,
        image_format="auto",
        export=first.partition("=")[0],
        transports=["unix"],
        options=[*others, *state_options(), *options],
        command=INSTALLED,
    )
    if not images:  # those of the configuration file alone
        server.argv = [word for word in server.argv if word != "=."]
    return server
