"""`nbdserve serve --workers` and `--open use`: real processes, real clients."""

import asyncio
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path

import pytest

import nbdserve
from tests.cli.servers import TIMEOUT_S, ServeProcess, run
from tests.helpers import tools
from tests.helpers.certificates import make_certificates
from tests.helpers.nbd_client import NbdClient
from tests.helpers.tls_client import TlsClient

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three images."""
    for name in ("a", "b", "c"):
        image = tmp_path / f"{name}.qcow2"
        tools.run("qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
    return tmp_path


@contextmanager
def serving(folder: Path, *words: str) -> Iterator[ServeProcess]:
    """Serve by two workers; stop in the end, and look that nothing is left."""
    process = ServeProcess(*words, "--unix", "s", "--workers", "2", cwd=folder)
    with process:
        process.wait_until_ready()
        pids = workers(process)
        assert len(pids) == 2
        yield process
        assert process.end() == 0
    assert not any(alive(pid) for pid in pids)
    assert "Traceback" not in (folder / "log").read_text()


def workers(process: ServeProcess) -> list[int]:
    """The processes that a server has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in children.split()]


def booting(process: ServeProcess) -> list[int]:
    """Two workers as soon as they are there."""

    def is_one(pid: int) -> bool:  # and no copy of the server any more
        return b"nbdserve.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()

    until(lambda: sum(map(is_one, workers(process))) == 2)
    return workers(process)


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Let processes hang; they end by themselves if a test fails meanwhile."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


def until(it_is_so: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not it_is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def holders(process: ServeProcess, image: Path) -> list[int]:
    """Which processes of a server have an image open."""
    pids = (process.pid, *workers(process))
    return [pid for pid in pids if str(image) in open_files(pid)]


def open_files(pid: int) -> list[str]:
    names = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            names.append(os.readlink(link))
    return names


def qemu_io(folder: Path, export: str, *commands: str) -> str:
    words = [word for command in commands for word in ("-c", command)]
    uri = f"nbd+unix:///{export}?socket={folder}/s"
    return tools.run("qemu-io", "-f", "raw", uri, *words)


def test_each_image_has_one_worker(folder: Path) -> None:
    with serving(folder, "a.qcow2", "b.qcow2") as process:
        for number, name in enumerate("ab", start=1):
            qemu_io(folder, name, f"write -P {number} 1M 1M", "flush")
        owners = [holders(process, folder / f"{name}.qcow2") for name in "ab"]
        assert [len(found) for found in owners] == [1, 1]
        assert owners[0] != owners[1]
        assert process.pid not in owners[0] + owners[1]
        listed = json.loads(
            tools.run("nbdinfo", "--list", "--json", f"nbd+unix://?socket={folder}/s")
        )
        assert [found["export-name"] for found in listed["exports"]] == ["a", "b"]
    log = (folder / "log").read_text()
    assert log.count("connection opened") == log.count("connection closed")
    assert "bytes_written=1048576" in log
    for number, name in enumerate("ab", start=1):
        image = folder / f"{name}.qcow2"
        tools.run("qemu-img", "check", image)
        read = f"read -P {number} 1M 1M"
        assert "verification failed" not in tools.run("qemu-io", "-c", read, image)


def test_a_worker_that_is_killed_is_started_again(folder: Path) -> None:
    with serving(folder, "a.qcow2", "b.qcow2", "--state-dir", ".") as process:
        qemu_io(folder, "a", "write -P 1 0 1M", "flush", "write -P 2 1M 64k")
        (victim,) = holders(process, folder / "a.qcow2")

        async def clients() -> None:
            async with (
                await NbdClient.connect_unix(folder / "s") as cut,
                await NbdClient.connect_unix(folder / "s") as other,
            ):
                await cut.go("a")
                await other.go("b")
                os.kill(victim, signal.SIGKILL)
                with pytest.raises((EOFError, OSError)):
                    await cut.read(0, 512)
                await other.write(0, b"b" * 4096)
                assert await other.read(0, 4096) == b"b" * 4096

        asyncio.run(clients())
        # the next client waits until there is a worker again
        read = qemu_io(folder, "a", "read -P 1 0 1M", "read -P 2 1M 64k")
        assert "verification failed" not in read
        assert victim not in workers(process)
        assert "a worker has ended and is started again" in process.log()
        assert "status=-9" in process.log()
    tools.run("qemu-img", "check", folder / "a.qcow2")


def test_read_only_images_are_served_by_all(folder: Path) -> None:
    with serving(folder, "a.qcow2", "--read-only") as process:

        async def clients() -> None:
            async with (
                await NbdClient.connect_unix(folder / "s") as one,
                await NbdClient.connect_unix(folder / "s") as two,
            ):
                before = [sockets(pid) for pid in workers(process)]
                await one.go("a")
                await two.go("a")
                assert await one.read(0, 512) == await two.read(0, 512) == bytes(512)
                after = [sockets(pid) for pid in workers(process)]
                grown = [now - then for now, then in zip(after, before, strict=True)]
                assert grown == [1, 1]

        asyncio.run(clients())
        assert len(holders(process, folder / "a.qcow2")) == 2


def sockets(pid: int) -> int:
    return sum(name.startswith("socket:") for name in open_files(pid))


def test_what_is_sent_behind_the_handshake_goes_along(folder: Path) -> None:
    request = bytes.fromhex(
        "25609513 0000 0000 0000000000000007 0000000000000000 00000200"
    )
    hello = (
        (3).to_bytes(4, "big")  # NBD_FLAG_C_FIXED_NEWSTYLE, NBD_FLAG_C_NO_ZEROES
        + b"IHAVEOPT\0\0\0\1\0\0\0\1a"  # NBD_OPT_EXPORT_NAME "a"
    )
    with (
        serving(folder, "a.qcow2"),
        socket.socket(socket.AF_UNIX) as sock,
    ):
        sock.settimeout(TIMEOUT_S)
        sock.connect(str(folder / "s"))
        sock.sendall(hello + 40 * request)
        answer = b""
        while len(answer) < 18 + 10 + 40 * (16 + 512):
            received = sock.recv(1 << 16)
            assert received
            answer += received
        assert answer[28:36] == bytes.fromhex("67446698 00000000")


def test_encrypted_clients_come_by_the_first_process(folder: Path) -> None:
    pki = make_certificates(folder)
    tools.run(
        "qemu-io",
        "-c",
        "write -P 7 0 32M",
        "-c",
        "write -P 8 32M 32M",
        folder / "a.qcow2",
    )
    tls = ["--tls-certificates", str(pki.server), "--listen", "127.0.0.1:0"]
    with serving(folder, "a.qcow2", *tls) as process:
        port = next(uri for uri in process.uris if "unix" not in uri).split(":")[2]
        where = f"nbds://127.0.0.1:{port.split('/')[0]}/a"
        uri = f"{where}?tls-certificates={pki.clients['alice']}"
        copy = folder / "copy.img"
        tools.run("nbdcopy", uri, copy)
    read = ["-c", "read -P 7 0 32M", "-c", "read -P 8 32M 32M"]
    assert "verification failed" not in tools.run("qemu-io", "-f", "raw", *read, copy)
    assert "CN=alice" in (folder / "log").read_text()


def test_hangup_changes_what_workers_serve(folder: Path) -> None:
    config = folder / "nbdserve.toml"
    entry = '[[export]]\npath = "{0}.qcow2"\nformat = "qcow2"\n'
    config.write_text("workers = 2\n" + entry.format("a") + entry.format("b"))
    with serving(folder, "--config", "nbdserve.toml") as process:

        async def clients() -> None:
            async with (
                await NbdClient.connect_unix(folder / "s") as stays,
                await NbdClient.connect_unix(folder / "s") as leaves,
            ):
                await stays.go("a")
                await leaves.go("b")
                await stays.write(0, b"x" * 512)
                config.write_text(
                    "workers = 2\n" + entry.format("a") + entry.format("c")
                )
                os.kill(process.pid, signal.SIGHUP)
                await leaves.wait_closed()
                assert await stays.read(0, 512) == b"x" * 512

        asyncio.run(asyncio.wait_for(clients(), TIMEOUT_S))
        process.wait_for_log("reloaded")
        assert holders(process, folder / "b.qcow2") == []
        assert len(holders(process, folder / "c.qcow2")) == 1
        qemu_io(folder, "c", "write 0 64k", "flush")


def test_what_does_not_fit_into_a_message_is_nobody_elses_trouble(
    folder: Path,
) -> None:
    config = folder / "nbdserve.toml"
    networks = [f"10.{n >> 8}.{n & 255}.0/24" for n in range(20_000)]
    config.write_text(
        '[[export]]\npath = "a.qcow2"\n'
        f'[[export.access]]\nallow = "read-only"\nnetwork = {json.dumps(networks)}\n'
        '[[export.access]]\nallow = "read-write"\n'
    )
    folders = [f"/{'x' * 4000}/{n}" for n in range(60)]
    with serving(folder, "--config", "nbdserve.toml") as process:

        async def client() -> None:
            async with await NbdClient.connect_unix(folder / "s") as stays:
                await stays.go("a")
                with config.open("a") as more:
                    for name in ("b", "c"):  # in the same worker, and in the other one
                        more.write(f'[[export]]\npath = "{name}.qcow2"\n')
                        more.write(f"allow-backing = {json.dumps(folders)}\n")
                os.kill(process.pid, signal.SIGHUP)
                await asyncio.to_thread(process.wait_for_log, "reloaded")
                await stays.write(0, b"x" * 512)

        asyncio.run(client())
        assert "the export 'b': what is configured for it does not fit" in process.log()
        assert "a worker has ended" not in process.log()


def test_hangup_while_images_are_opened(folder: Path) -> None:
    words = ["a.qcow2", "--unix", "s", "--workers", "2"]
    with ServeProcess(*words, cwd=folder) as process:
        with stopped(*booting(process)):
            os.kill(process.pid, signal.SIGHUP)
        process.wait_until_ready()
        process.wait_for_log("reloaded")
        assert process.end() == 0


def test_hangups_at_the_end(folder: Path) -> None:
    with serving(folder, "a.qcow2", "b.qcow2", "c.qcow2") as process:
        for _ in range(20):
            os.kill(process.pid, signal.SIGHUP)
        assert process.end() == 0
    assert "error" not in (folder / "log").read_text()


def test_workers_close_their_images_when_the_first_process_is_killed(
    folder: Path,
) -> None:
    process = ServeProcess("a.qcow2", "--unix", "s", "--workers", "2", cwd=folder)
    with process:
        process.wait_until_ready()
        pids = workers(process)
        qemu_io(folder, "a", "write -P 3 0 1M")
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: not any(alive(pid) for pid in pids))
    checked = json.loads(
        tools.run("qemu-img", "check", "--output=json", folder / "a.qcow2")
    )
    assert not checked.get("leaks")  # the reservation was given back: a clean close
    read = tools.run("qemu-io", "-c", "read -P 3 0 1M", folder / "a.qcow2")
    assert "verification failed" not in read


def test_clients_are_let_go_when_it_ends(folder: Path) -> None:
    async def client() -> None:
        async with await NbdClient.connect_unix(folder / "s") as stays:
            await stays.go("a")
            await stays.write(0, b"z" * 4096)
            assert await asyncio.to_thread(process.end) == 0
            await stays.wait_closed()

    with serving(folder, "a.qcow2") as process:
        asyncio.run(asyncio.wait_for(client(), TIMEOUT_S))
    tools.run("qemu-img", "check", folder / "a.qcow2")


@pytest.mark.parametrize("size", ["1", "2"])
def test_images_that_are_opened_when_they_are_used(folder: Path, size: str) -> None:
    words = ["a.qcow2", "missing.qcow2", "b.qcow2", "--open", "use"]
    process = ServeProcess(*words, "--unix", "s", "--workers", size, cwd=folder)
    with process:
        process.wait_until_ready()
        assert "a.qcow2, not open yet" in process.announcement
        pids = [process.pid, *workers(process)]

        def is_open(name: str) -> bool:
            return any(str(folder / name) in open_files(pid) for pid in pids)

        assert not is_open("a.qcow2")
        qemu_io(folder, "a", "write -P 4 0 64k", "flush")
        assert is_open("a.qcow2")
        assert not is_open("b.qcow2")
        uri = f"nbd+unix:///missing?socket={folder}/s"
        tools.run("nbdinfo", uri, expect=(1,))
        tools.run(
            "qemu-img", "create", "-q", "-f", "qcow2", folder / "missing.qcow2", "1M"
        )
        assert "1048576" in tools.run("nbdinfo", "--size", uri)
        os.kill(process.pid, signal.SIGHUP)
        process.wait_for_log("reloaded")  # it has flushed what is open, and no more
        assert not is_open("b.qcow2")
        assert process.end() == 0
    assert "No such file or directory" in (folder / "log").read_text()
    tools.run("qemu-img", "check", folder / "a.qcow2")


def test_an_image_is_open_though_the_first_client_gave_up(folder: Path) -> None:
    words = ["a.qcow2", "--open", "use", "--limit", "handshake-timeout-s=1"]

    async def first() -> None:
        async with await NbdClient.connect_unix(folder / "s") as client:
            with pytest.raises((EOFError, OSError)):
                await client.go("a")

    with serving(folder, *words) as process:
        with stopped(*workers(process)):
            asyncio.run(asyncio.wait_for(first(), TIMEOUT_S))
        until(lambda: holders(process, folder / "a.qcow2"))
        qemu_io(folder, "a", "write 0 64k", "flush")
        assert "could not open" not in process.log()


def test_a_hung_worker_keeps_the_server_no_longer_than_allowed(folder: Path) -> None:
    limits = ["--limit", "close-timeout-s=0.5"]
    words = ["a.qcow2", "b.qcow2", "--unix", "s", "--workers", "2", *limits]
    with ServeProcess(*words, cwd=folder) as process:
        process.wait_until_ready()
        with stopped(*workers(process)):
            assert process.end() == 1
        last = process.log().splitlines()[-1]
        assert last == "nbdserve: the export 'a' was not closed within 0.5 s"


def test_a_hung_worker_keeps_nobody_from_a_reload(folder: Path) -> None:
    limits = ["--limit", "close-timeout-s=0.3"]
    words = ["a.qcow2", "b.qcow2", "--unix", "s", "--workers", "2", *limits]
    with ServeProcess(*words, cwd=folder) as process:
        process.wait_until_ready()
        (hung,) = holders(process, folder / "a.qcow2")
        with stopped(hung):
            os.kill(process.pid, signal.SIGHUP)
            process.wait_for_log("reloaded")
        assert "the export 'a' was not flushed within 0.3 s" in process.log()
        assert "the export 'b'" not in process.log()
        assert process.end() == 0


def test_nor_does_one_that_hangs_at_the_start(folder: Path) -> None:
    words = ["a.qcow2", "--unix", "s", "--workers", "2"]
    process = ServeProcess(*words, "--limit", "close-timeout-s=0.3", cwd=folder)
    with process:
        with stopped(*booting(process)):
            assert process.end() == 0
        assert "gave up on opening" in process.log()
        assert "Traceback" not in process.log()


def test_nor_does_a_reload_that_waits_for_it(folder: Path) -> None:
    config = folder / "nbdserve.toml"
    config.write_text('[[export]]\npath = "a.qcow2"\n')
    words = ["--config", "nbdserve.toml", "--unix", "s", "--workers", "2"]
    process = ServeProcess(*words, "--limit", "close-timeout-s=0.5", cwd=folder)
    with process:
        process.wait_until_ready()
        (owner,) = holders(process, folder / "a.qcow2")
        with config.open("a") as more:
            more.write('[[export]]\npath = "b.qcow2"\n')
        with stopped(*set(workers(process)) - {owner}):
            os.kill(process.pid, signal.SIGHUP)
            process.wait_for_log("flushed")
            assert process.end() == 0
        assert "gave up on a reload" in process.log()
        assert "Traceback" not in process.log()


@pytest.mark.parametrize("size", ["1", "2"])
def test_encrypted_clients_that_do_not_read_are_let_go(folder: Path, size: str) -> None:
    pki = make_certificates(folder)
    words = ["--tls-certificates", str(pki.server), "--limit", "stall-timeout-s=0.5"]
    words += ["a.qcow2", "--unix", "s", "--workers", size]

    async def client() -> None:
        async with await TlsClient.start(folder / "s", pki.clients["alice"]) as deaf:
            await deaf.go("a", structured=False)
            assert deaf._receiver is not None
            deaf._receiver.cancel()
            await asyncio.wait([deaf._receiver])
            for number in range(16):
                deaf.transmission.read(number * MIB, MIB)
            await deaf.send_queued()
            await asyncio.to_thread(process.wait_for_log, "connection closed")

    with ServeProcess(*words, cwd=folder) as process:
        process.wait_until_ready()
        asyncio.run(client())
        assert "no progress for" in process.log()
        assert process.end() == 0


@pytest.mark.parametrize("when", ["start", "use"])
def test_what_others_can_serve_does_not_wait_for_a_hung_worker(
    folder: Path, when: str
) -> None:
    with serving(folder, "a.qcow2", "--read-only", "--open", when) as process:
        with stopped(workers(process)[0]):
            assert asyncio.run(served(folder / "s", 3)) == [True] * 3
        until(lambda: len(holders(process, folder / "a.qcow2")) == 2)


def leave_descriptors(pid: int, count: int) -> None:
    """Let a process open so many more, and let it be."""
    used = {int(link.name) for link in Path(f"/proc/{pid}/fd").iterdir()}
    free = (number for number in itertools.count() if number not in used)
    limit = next(itertools.islice(free, count, None))
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, hard))


async def served(path: Path, clients: int) -> list[bool]:
    """Whether each of several clients, all there at once, is served."""
    async with AsyncExitStack() as stack:
        outcomes = []
        for _ in range(clients):
            client = await stack.enter_async_context(await NbdClient.connect_unix(path))
            try:
                await client.go("a")
                outcomes.append(await client.read(0, 512) == bytes(512))
            except (EOFError, OSError):
                outcomes.append(False)
        return outcomes


def test_a_worker_without_descriptors_lets_clients_go(folder: Path) -> None:
    with serving(folder, "a.qcow2") as process:
        (owner,) = holders(process, folder / "a.qcow2")
        leave_descriptors(owner, 2)
        assert asyncio.run(served(folder / "s", 4)) == [True, True, False, False]
        until(lambda: process.log().count("connection closed") == 4)
        assert "no file descriptor left in the worker" in process.log()
        assert asyncio.run(served(folder / "s", 2)) == [True, True]
    log = (folder / "log").read_text()
    assert log.count("connection opened") == log.count("connection closed") == 6


def test_clients_are_let_go_that_cannot_be_handed_over(folder: Path) -> None:
    pki = make_certificates(folder)
    tls = ["--tls", "require", "--tls-certificates", str(pki.server)]
    with serving(folder, "a.qcow2", "--listen", "127.0.0.1:0", *tls) as process:
        port = next(uri for uri in process.uris if "unix" not in uri).split(":")[2]
        uri = f"nbds://127.0.0.1:{port.split('/')[0]}/a"
        uri = f"{uri}?tls-certificates={pki.clients['alice']}"
        copy = ["nbdcopy", "--connections=1", uri, "null:"]

        def all_gone() -> bool:
            log = process.log()
            return log.count("connection opened") == log.count("connection closed")

        tools.run(*copy)
        # after the client's own one and two of a pair there is none for a duplicate
        for count in (1, 3):
            until(all_gone)
            leave_descriptors(process.pid, count)
            tools.run(*copy, expect=(1,))
        process.wait_for_log("could not hand a client over")
        leave_descriptors(process.pid, 16)
        tools.run(*copy)
    log = (folder / "log").read_text()
    assert log.count("connection opened") == log.count("connection closed")


def test_what_not_every_worker_can_open_is_open_in_none(folder: Path) -> None:
    config = folder / "nbdserve.toml"
    entry = '[[export]]\npath = "{}.qcow2"\nread-only = true\n'
    config.write_text(entry.format("a"))
    with serving(folder, "--config", "nbdserve.toml") as process:
        leave_descriptors(workers(process)[1], 0)
        config.write_text(entry.format("a") + entry.format("b"))
        os.kill(process.pid, signal.SIGHUP)
        process.wait_for_log("could not open an image")
        assert len(holders(process, folder / "a.qcow2")) == 2
        assert holders(process, folder / "b.qcow2") == []


def test_workers_import_nothing_from_the_current_folder(folder: Path) -> None:
    for name in ("resource", "nbdserve", "structlog"):
        (folder / f"{name}.py").write_text('open("imported", "w")\n')
    words = ["a.qcow2", "--unix", "s", "--workers", "2"]
    with ServeProcess(*words, cwd=folder, flags=["-P", "-s", "-B"]) as process:
        process.wait_until_ready()
        for pid in workers(process):
            started = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            assert {b"-P", b"-s", b"-B"} <= set(started)
        assert process.end() == 0
    assert not (folder / "imported").exists()


def test_workers_are_of_the_same_package(folder: Path) -> None:
    # a checkout that is not installed, where perhaps another one is
    package = folder / "nbdserve"
    shutil.copytree(Path(nbdserve.__file__).parent, package)
    with (package / "worker.py").open("a") as module:
        module.write('\nopen("imported", "w")\n')
    with serving(folder, "a.qcow2"):
        assert (folder / "imported").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--workers", "0"], "1 to 1024"),
        (["--workers", "many"], "1 to 1024"),
        (["--workers", "2", "--stdio"], "--stdio serves one client"),
        (["--open", "later"], "later"),
    ],
)
def test_what_makes_no_sense_is_refused(
    folder: Path, words: list[str], complaint: str
) -> None:
    done = run("serve", "a.qcow2", *words, cwd=folder)
    assert done.returncode == 1
    assert complaint in done.stderr
