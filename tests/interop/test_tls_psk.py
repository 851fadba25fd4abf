"""TLS with pre-shared keys, with libnbd and qemu; where there is a Python for it."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.psk import python_with_psk
from tests.helpers.servers import ROOT
from tests.helpers.tools import run

CONFIG = """
listen = ["127.0.0.1:0"]
[tls]
psk = "keys.psk"
[[export]]
path = "a.img"
read-only = true
[[export]]
path = "b.img"
read-only = true
[[export.access]]
psk-user = "bob"
allow = "read-only"
"""


class PskServer:
    """A server in another Python."""

    def __init__(self, folder: Path) -> None:
        python = python_with_psk()
        assert python is not None
        self.folder = folder
        with (folder / "out").open("w") as out, (folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [
                    python,
                    "-W",
                    "error",
                    "-m",
                    "nbdserve",
                    "serve",
                    "--config",
                    "c.toml",
                ],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=out,
                stderr=log,
            )
        deadline = time.monotonic() + 30
        while "nbdcopy" not in (folder / "out").read_text():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        words = (folder / "out").read_text().split()
        uri = next(word for word in words if word.startswith("nbds://"))
        self.port = uri.rpartition(":")[2].partition("/")[0]

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def uri(self, user: str, keys: str = "keys.psk", export: str = "a") -> str:
        file = self.folder / keys
        return f"nbds://{user}@127.0.0.1:{self.port}/{export}?tls-psk-file={file}"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PskServer]:
    keys = {name: os.urandom(32).hex() for name in ("alice", "bob", "eve")}
    lines = "".join(f"{name}:{keys[name]}\n" for name in ("alice", "bob"))
    (tmp_path / "keys.psk").write_text(lines)
    (tmp_path / "wrong.psk").write_text(f"alice:{keys['eve']}\neve:{keys['eve']}\n")
    for name in ("a.img", "b.img"):
        (tmp_path / name).write_bytes(os.urandom(1 << 20))
    (tmp_path / "c.toml").write_text(CONFIG)
    server = PskServer(tmp_path)
    yield server
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0, server.log()
    assert "Traceback" not in server.log()


def test_users_are_known_by_their_keys(server: PskServer) -> None:
    run("nbdcopy", server.uri("alice"), server.folder / "copy.img")
    copied = (server.folder / "copy.img").read_bytes()
    assert copied == (server.folder / "a.img").read_bytes()
    assert "psk_user=alice" in server.log()
    run("nbdinfo", server.uri("bob", export="b"))
    run("nbdinfo", server.uri("alice", export="b"), expect=(1,))
    objects = f"tls-creds-psk,id=t,dir={server.folder},username=alice,endpoint=client"
    image = f"driver=nbd,host=127.0.0.1,port={server.port},export=a,tls-creds=t"
    said = run("qemu-img", "info", "--object", objects, "--image-opts", image)
    assert "1048576 bytes" in said


def test_wrong_keys_and_users_are_refused_with_one_line(server: PskServer) -> None:
    run("nbdinfo", server.uri("alice", "wrong.psk"), expect=(1,))
    run("nbdinfo", server.uri("eve", "wrong.psk"), expect=(1,))
    deadline = time.monotonic() + 30
    while server.log().count("handshake failed") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "the client has a wrong pre-shared key" in server.log()
    assert len(server.log().splitlines()) == 2


PROGRAM = "import sys; from nbdserve.cli.qemu_nbd import main; sys.exit(main())"


@pytest.mark.parametrize("program", ["qemu-nbd", "ours"])
def test_objects_of_qemu_nbd(tmp_path: Path, program: str) -> None:
    python = python_with_psk()
    assert python is not None
    argv = ["qemu-nbd"] if program == "qemu-nbd" else [python, "-c", PROGRAM]
    keys = {name: os.urandom(32).hex() for name in ("alice", "bob", "eve")}
    lines = "".join(f"{name}:{keys[name]}\n" for name in ("alice", "bob"))
    (tmp_path / "keys.psk").write_text(lines)
    (tmp_path / "wrong.psk").write_text(f"alice:{keys['eve']}\n")
    (tmp_path / "disk.raw").write_bytes(os.urandom(1 << 20))
    words = ["--object", f"tls-creds-psk,id=t,dir={tmp_path},endpoint=server"]
    words += ["--tls-creds", "t", "-t", "-r", "-f", "raw", "-k", str(tmp_path / "s")]
    words += ["--object", "authz-simple,id=a,identity=alice"]
    if program == "ours":  # qemu-nbd 7.2 asks nobody about users of keys
        words += ["--tls-authz", "a"]
    started = subprocess.run(
        [
            *argv,
            "--fork",
            "--pid-file",
            tmp_path / "pid",
            *words,
            tmp_path / "disk.raw",
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert started.returncode == 0, started.stderr

    def ask(user: str, keys: str) -> str:
        uri = f"nbds+unix://{user}@/?socket={tmp_path}/s&tls-psk-file={tmp_path}/{keys}"
        return run("nbdinfo", "--size", uri, expect=(0, 1))

    try:
        assert ask("alice", "keys.psk") == "1048576\n"
        assert ask("alice", "wrong.psk") == ""
        assert ask("bob", "keys.psk") == ("" if program == "ours" else "1048576\n")
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)


def test_new_keys_are_read_with_a_hangup(server: PskServer) -> None:
    (server.folder / "keys.psk").write_text((server.folder / "wrong.psk").read_text())
    server.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 30
    while "reloaded" not in server.log():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run("nbdinfo", server.uri("eve"))
    run("nbdinfo", server.uri("bob"), expect=(1,))
