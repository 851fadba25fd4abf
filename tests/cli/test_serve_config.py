"""`nbdserve serve --config`, TLS and other transports, with real clients."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trustme

from nbdserve.cli.main import main
from tests.cli.servers import ServeProcess, run, serving
from tests.helpers.certificates import (
    Certificates,
    make_certificates,
    make_wrong_files,
    renew,
)

FILE = """
unix = ["s"]
{top}

[[export]]
path = "a.img"
format = "raw"
description = "{description}"

{more}
"""


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two raw images."""
    for name in ("a.img", "b.img"):
        (tmp_path / name).write_bytes(os.urandom(1 << 20))
    return tmp_path


def configure(folder: Path, *, top: str = "", more: str = "", text: str = "") -> None:
    content = text or FILE.format(top=top, more=more, description="one")
    (folder / "nbdserve.toml").write_text(content)


def client(*words: str, expect: int = 0) -> str:
    """Run a client; return what it says."""
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def exports(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Return names and descriptions of what a server exports."""
    capsys.readouterr()
    assert main(["list", "--json", f"nbd+unix:///?socket={folder}/s"]) == 0
    listed = json.loads(capsys.readouterr().out)["exports"]
    return {export["export-name"]: export["description"] for export in listed}


def test_a_file_and_the_command_line_add_up(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(folder, top='unix-mode = "0600"')
    words = ("--config", "nbdserve.toml", "extra=b.img", "--read-only", "--unix", "t")
    with serving(*words, "--description", "two", cwd=folder) as server:
        assert exports(folder, capsys) == {"a": "one", "extra": "two"}
        assert "a.img, 1 MiB, read-write" in server.announcement
        assert "b.img, 1 MiB, read-only" in server.announcement
        assert (folder / "t").stat().st_mode & 0o777 == 0o600
        assert server.end() == 0


def test_a_file_without_exports_gets_them_later(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(folder, text='unix = ["s"]')
    with ServeProcess("--config", "nbdserve.toml", cwd=folder) as server:
        server.wait_for_announcement("no exports yet")
        assert exports(folder, capsys) == {}
        configure(folder)
        os.kill(server.pid, signal.SIGHUP)
        server.wait_for_log("reloaded")
        assert exports(folder, capsys) == {"a": "one"}
        assert server.end() == 0


def test_a_mistake_in_the_file_is_one_line(folder: Path) -> None:
    configure(folder, more="colour = 1")
    result = run("serve", "--config", "nbdserve.toml", cwd=folder)
    assert result.returncode == 1
    assert result.stderr.startswith("nbdserve: nbdserve.toml, line 10: unknown key")


def test_a_hangup_adds_changes_and_removes_exports(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = '[[export]]\npath = "b.img"\nread-only = true\nname = "{}"'
    configure(folder, more=second.format("old"))
    reader = "import nbd, sys; h = nbd.NBD(); h.connect_uri(sys.argv[1])\n"
    reader += "for line in sys.stdin: h.pread(512, 0); print('read', flush=True)\n"

    def attach(name: str) -> subprocess.Popen[str]:
        uri = f"nbd+unix:///{name}?socket={folder}/s"
        return subprocess.Popen(
            ["/usr/bin/python3", "-c", reader, uri],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def reads(process: subprocess.Popen[str]) -> bool:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        return process.stdout.readline() == "read\n"

    with (
        serving("--config", "nbdserve.toml", cwd=folder) as server,
        attach("a") as unchanged,
        attach("old") as removed,
    ):
        assert reads(unchanged)
        assert reads(removed)
        configure(folder, text="nonsense = 1")
        os.kill(server.pid, signal.SIGHUP)
        server.wait_for_log("nothing is changed")
        assert "line 1: unknown key 'nonsense'" in server.log()
        assert exports(folder, capsys) == {"a": "one", "old": ""}
        twice = '[[export]]\nname = "twice"\npath = "a.img"\nread-only = true'
        configure(folder, more=twice)
        os.kill(server.pid, signal.SIGHUP)
        server.wait_for_log("a.img is the same file as a.img, served as 'a'")
        text = FILE.format(top="", more=second.format("new"), description="changed")
        configure(folder, text=text)
        os.kill(server.pid, signal.SIGHUP)
        server.wait_for_log("reloaded")
        assert exports(folder, capsys) == {"a": "changed", "new": ""}
        assert reads(unchanged)
        assert not reads(removed)
        configure(folder, more='[[export]]\npath = "missing.img"')
        os.kill(server.pid, signal.SIGHUP)
        server.wait_for_log("could not open an image")
        assert exports(folder, capsys) == {"a": "one"}
        assert reads(unchanged)
        for process in (unchanged, removed):
            assert process.stdin is not None
            process.kill()
        assert server.end() == 0


def test_rules_for_users_of_this_machine(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, other = os.getuid(), os.getuid() + 1
    rules = '[[export.access]]\nuser = {}\nallow = "read-only"\n'
    configure(folder, more=rules.format(mine))
    with serving("--config", "nbdserve.toml", cwd=folder) as server:
        uri = f"nbd+unix:///a?socket={folder}/s"
        assert json.loads(client("nbdinfo", "--json", uri))["exports"][0][
            "is_read_only"
        ]
        configure(folder, more=rules.format(other))
        os.kill(server.pid, signal.SIGHUP)
        server.wait_for_log("reloaded")
        assert exports(folder, capsys) == {}
        hidden = client("nbdinfo", uri, expect=1)
        missing = client("nbdinfo", uri.replace("/a?", "/z?"), expect=1)
        assert hidden == missing.replace("export: z", "export: a").replace("/z?", "/a?")


# TLS


def test_encrypted_with_libnbd_qemu_and_our_own(
    folder: Path, pki: Certificates, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["a.img", "--format=raw", "--tls-certificates", str(pki.server)]
    words += ["--tls-verify-client", "--listen", "127.0.0.1:0"]
    with serving(*words, cwd=folder) as server:
        (uri,) = server.uris
        assert uri.startswith("nbds://127.0.0.1:")
        port = uri.rpartition(":")[2].partition("/")[0]
        alice = pki.clients["alice"]
        with_files = f"{uri}?tls-certificates={alice}"
        assert "1048576" in client("nbdinfo", "--size", with_files)
        client("nbdcopy", with_files, str(folder / "copy.img"))
        assert (folder / "copy.img").read_bytes() == (folder / "a.img").read_bytes()
        shutil.copy(folder / "b.img", folder / "new.img")
        client("nbdcopy", str(folder / "new.img"), with_files)
        objects = f"tls-creds-x509,id=tls,dir={alice},endpoint=client"
        image = f"driver=nbd,host=127.0.0.1,port={port},export=a,tls-creds=tls"
        command = ["qemu-img", "convert", "--object", objects, "--image-opts"]
        client(*command, "-O", "raw", image, str(folder / "qemu.img"))
        assert (folder / "qemu.img").read_bytes() == (folder / "b.img").read_bytes()
        files = ["--tls-ca", str(alice / "ca-cert.pem")]
        files += ["--tls-cert", str(alice / "client-cert.pem")]
        files += ["--tls-key", str(alice / "client-key.pem")]
        assert main(["list", uri, *files]) == 0
        assert "1 MiB (1048576 bytes)" in capsys.readouterr().out
        stranger = str(pki.clients["stranger"] / "ca-cert.pem")
        assert main(["list", uri, "--tls-ca", stranger]) == 1
        assert f"{stranger} has not signed it" in capsys.readouterr().err
        assert main(["list", uri]) == 1
        told = capsys.readouterr().err
        assert "self-signed certificate" in told
        assert "add --tls-ca with the authority's certificate" in told
        plain = uri.replace("nbds", "nbd")
        assert main(["list", plain]) == 1
        assert "NBD_REP_ERR_TLS_REQD" in capsys.readouterr().err
        client("nbdinfo", plain, expect=1)
        for name, reason in [
            ("expired", "certificate has expired"),
            ("foreign", "unable to get local issuer certificate"),
            ("nobody", "the client has no certificate"),
        ]:
            client("nbdinfo", f"{uri}?tls-certificates={pki.clients[name]}", expect=1)
            server.wait_for_log(reason)
        assert server.log().count("handshake failed") == 5
        assert server.end() == 0


@pytest.mark.parametrize(
    "command",
    ["serve a.img --read-only --unix s", "list nbds+unix:///?socket=s"],
    ids=["serve", "list"],
)
def test_files_that_are_no_credentials_are_told_apart(
    command: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    cases = make_wrong_files(folder)
    for what, (certificate, key, says) in cases.items():
        words = [*command.split(), "--tls-cert", certificate, "--tls-key", key]
        assert main(words) == 1, what
        told = capsys.readouterr().err
        assert told.startswith(f"nbdserve: TLS: {says}"), what
        assert told.count("\n") == 1
    words = ["--tls-cert", "a.pem", "--tls-key", "a.key", "--tls-ca", "text"]
    assert main([*command.split(), *words]) == 1
    assert "TLS: text is not PEM with a certificate" in capsys.readouterr().err


def test_a_hangup_reads_certificates_again(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "pki"
    mine.mkdir()
    pki = make_certificates(mine)
    words = ["a.img", "--format=raw", "--tls-certificates", str(pki.server)]
    with serving(*words, "--listen", "127.0.0.1:0", cwd=folder) as server:
        uri = f"{server.uris[0]}?tls-certificates={pki.clients['nobody']}"
        client("nbdinfo", uri)
        authority = trustme.CA()
        renew(pki, authority)
        os.kill(server.pid, signal.SIGHUP)
        server.wait_for_log("reloaded")
        client("nbdinfo", uri, expect=1)
        authority.cert_pem.write_to_path(str(pki.clients["nobody"] / "ca-cert.pem"))
        client("nbdinfo", uri)
        assert server.end() == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tls", "require"], "--tls require needs --tls-cert"),
        (["--tls-cert", "x"], "a certificate needs its key"),
        (["--tls-cert", "x", "--tls-key", "y"], "TLS: x: No such file"),
        (["--tls-certificates", "x", "--tls-psk", "y"], "exclude each other"),
        (["--stdio", "--unix", "s"], "listens nowhere"),
        (["--stdio"], "stdin is not a connected socket"),
        (["--unix-mode", "rw"], "--unix-mode: 'rw' are no permissions"),
        (["--unix-mode", "0660"], "--unix-mode is for Unix sockets"),
        (["--vsock", "x"], "--vsock: 'x' is not PORT or CID:PORT"),
    ],
)
def test_refusals(folder: Path, words: list[str], says: str) -> None:
    command = [sys.executable, "-m", "nbdserve", "serve", "a.img", "--read-only"]
    done = subprocess.run(
        [*command, *words],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


# Other transports


def test_one_client_on_stdin(folder: Path) -> None:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "nbdserve", "serve", "--stdio", "a.img"]
    with (
        ours,
        subprocess.Popen(
            [*command, "--read-only"],
            cwd=folder,
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=subprocess.PIPE,
        ) as server,
    ):
        theirs.close()
        ours.settimeout(30)
        assert ours.recv(18, socket.MSG_WAITALL).startswith(b"NBDMAGICIHAVEOPT")
        ours.sendall(b"\0\0\0\3IHAVEOPT\0\0\0\1\0\0\0\1a")
        assert ours.recv(10, socket.MSG_WAITALL)[:8] == (1 << 20).to_bytes(8, "big")
        ours.sendall(b"\x25\x60\x95\x13\0\0\0\2" + bytes(20))  # NBD_CMD_DISC
        assert ours.recv(1) == b""
        assert server.wait(30) == 0


def test_virtual_machines_of_this_host(folder: Path) -> None:
    port = 10000 + os.getpid() % 50000
    words = ("a.img", "--read-only", "--vsock", str(port))
    with ServeProcess(*words, cwd=folder) as server:
        try:
            socket.socket(socket.AF_VSOCK).close()
        except OSError:
            assert server.end() == 1
            assert "cannot listen" in server.log()
        else:
            server.wait_until_ready()
            assert server.uris == [f"nbd+vsock://2:{port}/a"]
            assert server.end() == 0
