"""`nbdserve list`, of our server and of others."""

import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdserve.cli.main import main
from tests.cli.servers import serving


@pytest.fixture
def disks(tmp_path: Path) -> Path:
    """A folder with two raw images."""
    (tmp_path / "a.img").write_bytes(bytes(1000))
    (tmp_path / "b.img").write_bytes(bytes(2 << 20))
    return tmp_path


def test_it_shows_every_export(disks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("a.img", "=b.img", "--read-only", "--description", "two\x1b[2Jdisks")
    with serving(*words, "--unix", "s", cwd=disks):
        uri = f"nbd+unix:///?socket={disks}/s"
        assert main(["list", uri]) == 0
        text = capsys.readouterr().out
        assert '"a": two\\x1b[2Jdisks\n' in text
        assert f"nbd+unix:///a?socket={disks}/s\n  1000 bytes, read-only" in text
        assert '""' in text
        assert "2 MiB (2097152 bytes), read-only" in text
        assert "base:allocation" in text
        assert main(["list", f"nbd+unix:///a?socket={disks}/s"]) == 0
        assert '""' not in capsys.readouterr().out


def test_json_says_what_nbdinfo_says(
    disks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving("a.img", "--format=raw", "--listen=127.0.0.1:0", cwd=disks) as server:
        assert main(["list", server.uris[0], "--json"]) == 0
        (ours,) = json.loads(capsys.readouterr().out)["exports"]
        output = subprocess.run(
            ["nbdinfo", "--json", server.uris[0]],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
    (theirs,) = json.loads(output)["exports"]
    same = ours.keys() & theirs.keys() - {"uri"}
    assert len(same) > 12
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}


def test_it_shows_the_exports_of_qemu_nbd(
    disks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["qemu-nbd", "-f", "raw", "-r", "-x", "theirs", "-D", "of qemu", "-t"]
    command = [*words, "-k", str(disks / "q"), str(disks / "b.img")]
    with subprocess.Popen(command) as server:
        try:
            while not (disks / "q").exists():
                time.sleep(0.01)
            assert main(["list", f"nbd+unix:///?socket={disks}/q"]) == 0
        finally:
            server.kill()
    assert '"theirs": of qemu' in capsys.readouterr().out


@contextmanager
def peer(*answers: bytes) -> Iterator[str]:
    """A server that says `answers`, whatever it hears, and closes."""

    def serve(listener: socket.socket) -> None:
        client, _ = listener.accept()
        with client:
            for answer in answers:
                client.sendall(answer)
                client.recv(65536)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield f"nbd://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            thread.join(30)


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([b"SSH-2.0-OpenSSH_9.2\r\n"], "this is no NBD server"),
        ([b"NBDMAGICIHAVEOPT\0\3"], "the server closed the connection"),
        ([b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0"], "newstyle"),
    ],
)
def test_a_peer_that_is_no_server_is_one_line(
    answers: list[bytes], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with peer(*answers) as uri:
        assert main(["list", uri]) == 1
    output = capsys.readouterr()
    assert output.err.startswith(f"nbdserve: {uri}")
    assert says in output.err
    assert output.err.count("\n") == 1


def test_nobody_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", f"nbd+unix:///?socket={tmp_path}/none"]) == 1
    assert "No such file or directory" in capsys.readouterr().err


def test_an_unknown_export_is_one_line(
    disks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving("a.img", "--read-only", "--unix", "s", cwd=disks):
        assert main(["list", f"nbd+unix:///zzz?socket={disks}/s"]) == 1
    assert "NBD_REP_ERR_UNKNOWN" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--tls-ca", "--tls-cert", "--tls-key"])
def test_tls_options_are_for_uris_that_encrypt(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", "nbd://localhost:1", option, "file.pem"]) != 0
    told = f"nbdserve: {option} needs a URI that encrypts: nbds://\n"
    assert capsys.readouterr().err == told
