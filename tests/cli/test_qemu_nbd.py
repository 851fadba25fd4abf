"""The same conversations with qemu-nbd and with `nbdserve-qemu-nbd`."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.certificates import make_certificates
from tests.helpers.tools import run

OURS = (
    sys.executable,
    "-c",
    "import sys; from nbdserve.cli.qemu_nbd import main; sys.exit(main())",
)
THEIRS = ("qemu-nbd",)
PROGRAMS = [pytest.param(THEIRS, id="qemu-nbd"), pytest.param(OURS, id="ours")]
TIMEOUT_S = 20.0
MIB = 1 << 20

#: What a client is told that has to be the same. Block sizes are a matter of taste.
SAME = (
    "export-name",
    "description",
    "contexts",
    "is_read_only",
    "can_df",
    "can_fast_zero",
    "can_flush",
    "can_fua",
    "can_multi_conn",
    "can_trim",
    "can_zero",
    "export-size",
)


class Daemon:
    """One of the programs, started with --fork and --pid-file."""

    def __init__(self, program: tuple[str, ...], folder: Path, *words: str) -> None:
        folder.mkdir()
        self.socket = folder / "nbd.sock"
        pid_file = folder / "pid"
        started = subprocess.run(
            [
                *(*program, "--fork", f"--pid-file={pid_file}"),
                *(f"--socket={self.socket}", *words),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        self.code, self.stderr = started.returncode, started.stderr
        # it is there when the command returns, or there is no server
        self.pid = int(pid_file.read_text()) if pid_file.exists() else None

    def uri(self, name: str = "", query: str = "") -> str:
        scheme = "nbds" if query else "nbd"
        return f"{scheme}+unix:///{name}?socket={self.socket}{query}"

    def alive(self) -> bool:
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except FileNotFoundError:
            return False
        return stat.rpartition(")")[2].split()[0] != "Z"

    def wait_until_gone(self) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while self.alive():
            assert time.monotonic() < deadline, "the server does not end"
            time.sleep(0.02)

    def end(self) -> None:
        if self.pid is not None and self.alive():
            os.kill(self.pid, signal.SIGTERM)
            self.wait_until_gone()


class Starter:
    """Starts programs, and ends them with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Daemon] = []

    def __call__(self, program: tuple[str, ...], *words: str | Path) -> Daemon:
        place = self.folder / f"d{len(self.started)}"
        daemon = Daemon(program, place, *map(str, words))
        self.started.append(daemon)
        return daemon


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    starter = Starter(tmp_path)
    yield starter
    for daemon in starter.started:
        daemon.end()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "2M")
    run("qemu-io", "-c", "write -P 1 0 1M", path)
    run("qemu-img", "snapshot", "-c", "one", path)
    run("qemu-io", "-c", "write -P 2 64k 128k", path)
    return path


@pytest.fixture
def image(tmp_path: Path, made: Path) -> Path:
    """Return a qcow2 image with a snapshot "one", whose id is 1, and later changes."""
    return Path(shutil.copy(made, tmp_path))


@pytest.fixture
def raw(tmp_path: Path, image: Path) -> Path:
    path = tmp_path / "disk.raw"
    run("qemu-img", "convert", "-O", "raw", image, path)
    return path


def facts(uri: str) -> dict[str, Any]:
    """Return what a client is told of an export."""
    export: dict[str, Any] = json.loads(run("nbdinfo", "--json", uri))["exports"][0]
    return {name: export.get(name) for name in SAME}


def content(uri: str) -> bytes:
    copied = subprocess.run(
        ["nbdcopy", "--connections=1", uri, "-"],
        capture_output=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    return copied.stdout


TLS = "--object tls-creds-x509,id=t,dir=/,endpoint=server"
#: Words, separated by spaces.
CONVERSATIONS = {
    "plain": "-f qcow2 {image}",
    "shared": "-e 4 -f qcow2 {image}",
    "unlimited": "--shared=0 -f qcow2 {image}",
    "named": "-x name -D text -fqcow2 {image}",
    "read-only": "-r --format=qcow2 {image}",
    "depth": "-A -f qcow2 {image}",
    "snapshot": "-l one -f qcow2 {image}",
    "snapshot.name": "-l snapshot.name=one -f qcow2 {image}",
    "snapshot.id": "--load-snapshot=snapshot.id=1 -f qcow2 {image}",
    "caches": "--cache=writethrough --aio=threads --discard=unmap"
    " --detect-zeroes=off -f qcow2 {image}",
    "nocache": "-n --aio threads -f qcow2 {image}",
    "raw": "-f raw {raw}",
    "offset": "-f raw -o 65536 {raw}",
    "offset in qcow2": "-f qcow2 --offset=65536 {image}",
    "options": "--image-opts driver=qcow2,file.driver=file,file.filename={image}",
    "raw options": "--image-opts driver=raw,offset=65536,file.filename={raw}",
    "json": 'json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{image}"}}}}',
    "json dots": 'json:{{"driver":"qcow2","file.filename":"{image}"}}',
    "json raw": '-r json:{{"driver":"raw","offset":65536,"read-only":true,"file":'
    '{{"driver":"file","filename":"{raw}"}}}}',
    "a file": "--image-opts driver=file,filename={raw}",
}


@pytest.mark.parametrize("words", CONVERSATIONS.values(), ids=list(CONVERSATIONS))
def test_clients_see_the_same(
    start: Starter, image: Path, raw: Path, words: str
) -> None:
    filled = words.format(image=image, raw=raw).split()
    name = "name" if "-x" in filled else ""
    seen = []
    for program in (THEIRS, OURS):
        daemon = start(program, "-t", *filled)
        assert daemon.code == 0, daemon.stderr
        seen.append((facts(daemon.uri(name)), content(daemon.uri(name))))
        daemon.end()
        assert not daemon.socket.exists()
    assert seen[0] == seen[1]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("words", ["-f qcow2 {image}", "-f raw {raw}", "-s {image}"])
def test_a_snapshot_leaves_the_image_alone(
    start: Starter, image: Path, raw: Path, program: tuple[str, ...], words: str
) -> None:
    before = image.read_bytes(), raw.read_bytes()
    filled = words.format(image=image, raw=raw).split()
    daemon = start(program, "-t", "-s", *filled)
    assert daemon.code == 0, daemon.stderr
    run("qemu-io", "-f", "raw", "-c", "write -P 9 64k 64k", daemon.uri())
    commands = ("-c", "read -P 1 0 64k", "-c", "read -P 9 64k 64k")
    run("qemu-io", "-f", "raw", *commands, daemon.uri())
    daemon.end()
    assert (image.read_bytes(), raw.read_bytes()) == before


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_format_that_is_guessed_stays(
    start: Starter, raw: Path, program: tuple[str, ...]
) -> None:
    daemon = start(program, "-t", raw)
    # with --fork, a warning is a failure for qemu-nbd, which serves none the less
    assert daemon.code == (0 if program is OURS else 1), daemon.stderr
    assert "guess" in daemon.stderr

    header = b"QFI\xfb\0\0\0\3" + bytes(504)
    (raw.parent / "header").write_bytes(header)

    def write(what: str, offset: int) -> str:
        command = f"write {what} {offset} 512"
        return run("qemu-io", "-f", "raw", "-c", command, daemon.uri(), expect=(0, 1))

    assert "wrote" in write("-P 120", 0)
    assert "wrote" not in write(f"-s {raw.parent}/header", 0)
    assert "wrote" in write(f"-s {raw.parent}/header", 512)
    assert "wrote" in write("-P 121", 0)
    daemon.end()
    assert raw.read_bytes()[:1024] == b"y" * 512 + header


@pytest.mark.parametrize("program", PROGRAMS)
def test_backing_files_may_be_anywhere(
    start: Starter, tmp_path: Path, image: Path, program: tuple[str, ...]
) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    overlay = folder / "overlay.qcow2"
    argv = ("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", image)
    run(*argv, overlay)
    daemon = start(program, "-f", "qcow2", overlay)
    assert daemon.code == 0, daemon.stderr
    run("qemu-io", "-f", "raw", "-c", "read -P 2 64k 128k", daemon.uri())


def test_backing_files_can_be_kept_to_folders(
    start: Starter, tmp_path: Path, image: Path
) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    overlay = folder / "overlay.qcow2"
    argv = ("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", image)
    run(*argv, overlay)
    words = ("-t", "-f", "qcow2", f"--allow-backing={folder}", overlay)
    daemon = start(OURS, *words)
    assert daemon.code == 1
    assert "lies outside the image's folder" in daemon.stderr
    assert start(OURS, f"--allow-backing={tmp_path}", *words).code == 0


@pytest.mark.parametrize("program", PROGRAMS)
def test_it_ends_after_the_first_client(
    start: Starter, image: Path, program: tuple[str, ...]
) -> None:
    daemon = start(program, "-f", "qcow2", image)
    assert daemon.stderr == ""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(daemon.socket))  # chooses no export: does not count
        assert probe.recv(8) == b"NBDMAGIC"
    run("qemu-io", "-f", "raw", "-c", "write -P 3 0 64k", daemon.uri())
    daemon.wait_until_gone()
    assert not daemon.socket.exists()
    run("qemu-io", "-r", "-c", "read -P 3 0 64k", image)
    run("qemu-img", "check", image)


@pytest.mark.parametrize("program", PROGRAMS)
def test_it_stays_if_told_so(
    start: Starter, image: Path, program: tuple[str, ...]
) -> None:
    daemon = start(program, "--persistent", "-f", "qcow2", image)
    for _ in range(2):
        run("qemu-io", "-f", "raw", "-c", "read -P 2 64k 128k", daemon.uri())
    assert daemon.alive()


@pytest.mark.parametrize("program", PROGRAMS)
def test_who_is_too_many_waits(
    start: Starter, image: Path, program: tuple[str, ...]
) -> None:
    daemon = start(program, "-t", "-f", "qcow2", image)
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as late:
        first.connect(str(daemon.socket))
        assert first.recv(8) == b"NBDMAGIC"
        late.connect(str(daemon.socket))
        assert select.select([late], [], [], 0.3)[0] == []
        first.close()
        late.settimeout(TIMEOUT_S)
        assert late.recv(8) == b"NBDMAGIC"


def test_trims_can_be_ignored(start: Starter, raw: Path) -> None:
    before = raw.stat().st_blocks
    daemon = start(OURS, "-f", "raw", "--discard=ignore", raw)
    commands = ("-c", "discard 0 1M", "-c", "write -zu 1M 64k", "-c", "flush")
    run("qemu-io", "-f", "raw", *commands, daemon.uri())
    daemon.wait_until_gone()
    assert raw.stat().st_blocks >= before
    run("qemu-io", "-r", "-f", "raw", "-c", "read -P 1 0 64k", raw)


@pytest.mark.parametrize("program", PROGRAMS)
def test_tls(
    start: Starter, tmp_path: Path, image: Path, program: tuple[str, ...]
) -> None:
    certificates = make_certificates(tmp_path)
    alice, bob = certificates.clients["alice"], certificates.clients["bob"]
    subject = run(
        *("openssl", "x509", "-in", alice / "client-cert.pem", "-noout"),
        *("-subject", "-nameopt", "RFC2253"),
    )
    # qemu-nbd wants it as it stands in the certificate: O, OU, CN
    parts = subject.strip().removeprefix("subject=").split(",")
    identity = ",,".join(reversed(parts))
    credentials = f"tls-creds-x509,id=tls0,dir={certificates.server},endpoint=server"
    objects = ["--object", f"{credentials},verify-peer=yes", "--tls-creds", "tls0"]
    authz = ["--object", f"authz-simple,id=auth0,identity={identity}"]
    daemon = start(
        program, "-t", *objects, *authz, "--tls-authz=auth0", "-f", "qcow2", image
    )
    assert daemon.code == 0, daemon.stderr

    def ask(folder: Path) -> str:
        query = f"&tls-certificates={folder}&tls-hostname=localhost"
        return run("nbdinfo", "--size", daemon.uri(query=query), expect=(0, 1))

    assert ask(alice) == f"{2 * MIB}\n"
    assert ask(bob) == ""
    assert run("nbdinfo", "--size", daemon.uri(), expect=(1,)) == ""


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    "words",
    [
        ["{image}.missing"],
        ["-f", "nonsense", "{image}"],
        ["-l", "nonsense", "{image}"],
        ["--cache=nonsense", "{image}"],
        ["-e", "x", "{image}"],
        ["-o", "3M", "{image}"],
        ["--tls-creds", "none", "{image}"],
        ["--nonsense", "{image}"],
        ["-B", "nonsense", "{image}"],
        ["-k", "relative.sock", "{image}"],
        [],
        ["{image}", "{image}"],
    ],
    ids=lambda words: " ".join(words) or "nothing",
)
def test_failures(
    start: Starter, image: Path, program: tuple[str, ...], words: list[str]
) -> None:
    daemon = start(program, *(word.format(image=image) for word in words))
    assert daemon.code == 1
    assert daemon.pid is None
    assert daemon.stderr.startswith(("qemu-nbd: ", "nbdserve-qemu-nbd: "))
    if program is OURS:  # qemu-nbd leaves a dead socket behind
        assert not daemon.socket.exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("-c /dev/sda {image}", "/dev/sda"),
        ("-d", "--disconnect"),
        ("-d /dev/sda", "/dev/sda"),
        (f"-c /dev/nbd0 {TLS} --tls-creds t {{image}}", "--connect"),
        ("-T x {image}", "--trace"),
        ("--selinux-label=x {image}", "--selinux-label"),
        ("--detect-zeroes=on {image}", "--detect-zeroes=on"),
        ("--object secret,id=a,data=b {image}", "secret: data="),
        ("--object secret,id=a,file=b,format=base64 {image}", "only format=raw"),
        ("--image-opts file.filename={image},encrypt.key-secret=a", "no secret with"),
        ("--object tls-creds-x509,id=a,priority=b {image}", "priority"),
        ("--image-opts driver=vmdk,file.filename={image}", "vmdk"),
        ("--image-opts driver=qcow2,file.filename={image},lazy-refcounts=on", "lazy"),
        ("--image-opts driver=qcow2,file.driver=nbd,file.filename=x", "nbd"),
        ("nbd://localhost/", "nbd"),
        ("-k rel {image}", "--socket: 'rel' is not an absolute path"),
        ("-o abc {image}", "-o/--offset: 'abc' is not a size"),
        ("{image} other", "'other' is one too many"),
        ("-t", "required: FILE"),
        ("-L --tls-creds a", "--tls-creds"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    start: Starter, image: Path, words: str, named: str
) -> None:
    daemon = start(OURS, *words.format(image=image).split())
    assert daemon.code == 1
    assert daemon.stderr.count("\n") == 1
    assert named in daemon.stderr


@pytest.mark.parametrize("server", PROGRAMS)
def test_listings_are_the_same(
    start: Starter, image: Path, server: tuple[str, ...]
) -> None:
    daemon = start(server, "-tr", "-x", "disk", "-D", "text", "-A", "-fqcow2", image)
    listings = [run(*each, "-L", "-k", daemon.socket) for each in (THEIRS, OURS)]
    assert f"  size:  {2 * MIB}\n" in listings[0]
    assert listings[0] == listings[1]
