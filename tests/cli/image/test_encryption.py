"""Encrypted images from the command line, held against qemu-img."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nbdserve.cli.main import main
from nbdserve.formats.crypto import keys
from tests.cli.servers import serving
from tests.helpers.encrypted import (
    PASSPHRASE,
    Qemu,
    create_luks,
    patiently,
    secret_file,
)
from tests.helpers.tools import run

MIB = 1 << 20
#: nbdsh runs under Debian's own Python.
DEBIAN = {"PATH": "/usr/bin:/bin"}
OTHER = b"something else"


@pytest.fixture
def secret(tmp_path: Path) -> str:
    return str(secret_file(tmp_path))


@pytest.fixture
def other(tmp_path: Path) -> str:
    return str(secret_file(tmp_path, OTHER))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(
        bytes(100_000)
        + random.Random(1).randbytes(300_000)
        + bytes(MIB - 400_000 + 512)
    )
    return path


def image(*words: str | Path, expect: int = 0) -> None:
    assert main(["image", *map(str, words)]) == expect


def shown(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_create(
    tmp_path: Path, secret: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "disk.qcow2"
    encrypted = ["--encryption", "luks", "--secret-file", secret, "--iter-time", "1"]
    image("create", path, "1M", *encrypted, "--cipher", "aes-128")
    qemu = Qemu(path)
    qemu.io("write -P 7 0 64k")
    qemu.check()
    image("check", path)
    capsys.readouterr()
    image("info", path, "--json")
    found = shown(capsys)
    told = json.loads(run("qemu-img", "info", "--output=json", path))
    assert {name: found[name] for name in told} == told
    assert found["format-specific"]["data"]["encrypt"]["cipher-alg"] == "aes-128"
    image("map", path, "--json", "--secret-file", secret)
    theirs = ["qemu-img", "map", "--output=json", *qemu.object, "--image-opts"]
    # no offsets, and qemu 7.2 says nothing of compression
    ours = [{**entry, "compressed": 0} for entry in shown(capsys)]
    told = json.loads(run(*theirs, qemu.options))
    assert ours == [{**entry, "compressed": 0} for entry in told]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--encryption luks", "needs one --secret-file"),
        ("--encryption aes --secret-file {s}", "legacy AES is not written"),
        ("--encryption rot13 --secret-file {s}", "must be luks"),
        ("--cipher aes-128", "--cipher needs --encryption"),
        ("--iter-time 10", "--iter-time needs --encryption"),
        ("--secret-file {s}", "--secret-file needs --encryption luks"),
        ("--encryption luks --secret-file {s} --iter-time 0", "1 to 60000 milli"),
        ("--encryption luks --secret-file {s} --iter-time x", "not a whole number"),
        ("--encryption luks --secret-file {s} --format raw", "for qcow2 only"),
        ("--encryption luks --secret-file {s} --preallocation falloc", "read as noise"),
        ("--encryption luks --secret-file missing", "missing: No such file"),
    ],
)
def test_create_refuses(
    tmp_path: Path,
    secret: str,
    words: str,
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "disk.qcow2"
    argv = [word.format(s=secret) for word in words.split()]
    if "--iter-time" not in argv:
        argv += ["--iter-time", "1"] if "--encryption" in argv else []
    image("create", path, "1M", *argv, expect=1)
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert not path.exists()


@pytest.mark.parametrize(
    "words",
    [
        "create new 1M --format raw --secret-file {s}",
        "create new 1M --cluster-size 100 --secret-file {s}",
        "create new 9P --cluster-size 512 --secret-file {s}",
        "create taken 1M --secret-file {s}",
        "create nodir/new 1M --secret-file {s}",
        "convert disk.raw new --compress zlib --target-secret-file {s}",
        "convert missing new --target-secret-file {s}",
    ],
)
def test_a_mistake_is_told_before_a_key_is_made(
    words: str, raw: Path, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes as long as trying the passphrase later: seconds."""
    monkeypatch.chdir(raw.parent)
    Path("taken").touch()
    monkeypatch.setattr(keys, "new_header", lambda *_: pytest.fail("made a key"))
    image(*words.format(s=secret).split(), "--encryption", "luks", expect=1)
    assert not Path("new").exists()


@pytest.mark.parametrize("options", ["", "--compat 2", "--cluster-size 2M"])
def test_convert_there_and_back(
    tmp_path: Path, raw: Path, secret: str, other: str, options: str
) -> None:
    path, back = tmp_path / "disk.qcow2", tmp_path / "back.raw"
    new = ["--encryption", "luks", "--target-secret-file", other, "--iter-time", "1"]
    image("convert", raw, path, *new, *options.split())
    qemu = Qemu(path, passphrase=OTHER)
    assert qemu.content() == raw.read_bytes()
    qemu.check()
    image("check", path)
    image("compare", raw, path, "--secret-file", other)
    image("convert", path, back, "--format", "raw", "--secret-file", other)
    assert back.read_bytes() == raw.read_bytes()
    # from one passphrase to another
    again = tmp_path / "again.qcow2"
    new = ["--encryption", "luks", "--target-secret-file", secret, "--iter-time", "1"]
    image("convert", path, again, "--secret-file", other, *new)
    assert Qemu(again).content() == raw.read_bytes()
    for refused in ("--compress zlib", "--preallocation falloc"):
        words = refused.split()
        image("convert", raw, tmp_path / "no.qcow2", *new, *words, expect=1)


def test_convert_leaves_nothing_in_the_clear_by_accident(
    tmp_path: Path, raw: Path, secret: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plain.qcow2"
    image("convert", raw, path, "--target-secret-file", secret, expect=1)
    assert "--target-secret-file needs --encryption luks" in capsys.readouterr().err
    assert not path.exists()


def test_convert_over_a_backing_file(
    tmp_path: Path, raw: Path, secret: str, other: str
) -> None:
    base, changed = tmp_path / "base.qcow2", tmp_path / "changed.raw"
    new = ["--encryption", "luks", "--iter-time", "1", "--target-secret-file"]
    image("convert", raw, base, *new, other)
    data = bytearray(raw.read_bytes())
    data[70_000:70_010] = b"0123456789"
    data[200_000:330_000] = bytes(130_000)
    changed.write_bytes(data)
    both = ["--secret-file", secret, "--secret-file", other]
    top = tmp_path / "top3.qcow2"
    for compat in ("2", "3"):
        top = tmp_path / f"top{compat}.qcow2"
        words = ["--backing", "base.qcow2", "--backing-format", "qcow2"]
        words += ["--compat", compat, "--secret-file", other]
        image("convert", changed, top, *words, *new, secret)
        image("compare", changed, top, *both)
        image("check", top)
    # changes go down, and stay encrypted there
    image("commit", top, *both)
    assert Qemu(base, passphrase=OTHER).content() == data
    image("rebase", top, "--backing", "", *both)
    assert Qemu(top).content() == data


def test_passphrases_are_added_and_removed(
    tmp_path: Path, secret: str, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "disk.qcow2"
    create_luks(path, MIB)
    amend = ["amend", str(path), "--secret-file", secret]
    image(*amend, "--add-secret-file", other, "--iter-time", "1", "--slot", "3")
    Qemu(path, passphrase=OTHER).check()
    image(*amend, "--remove-secret-file", secret, "--lazy-refcounts", "on", expect=1)
    assert "none of its 1 key slots" in capsys.readouterr().err
    image("amend", path, "--secret-file", other, "--remove-slot", "3", expect=1)
    assert "no key slot would be left" in capsys.readouterr().err
    image("amend", path, "--secret-file", other, "--slot", "1", expect=1)
    assert "for a passphrase that is added" in capsys.readouterr().err
    image("snapshot", "create", path, "one", "--secret-file", other)
    image("resize", path, "2M", "--secret-file", other)
    assert len(Qemu(path, passphrase=OTHER).content()) == 2 * MIB


@pytest.mark.parametrize("options", ["", "--cipher aes-128 --cluster-size 4K"])
def test_measure(
    tmp_path: Path, raw: Path, options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--encryption", "luks", *options.split(), "--json"]
    image("measure", "--size", "1G", *words)
    found = shown(capsys)
    chosen = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    if options:
        chosen += ",encrypt.cipher-alg=aes-128,cluster_size=4k"
    theirs = ["qemu-img", "measure", "--output=json", *Qemu(tmp_path / "x").object]
    argv = [*theirs, "-O", "qcow2", "-o", chosen, "--size", "1G"]
    assert found == json.loads(patiently(*argv))
    image("measure", raw, *words)
    argv = [*theirs, "-O", "qcow2", "-o", chosen, "-f", "raw", str(raw)]
    assert shown(capsys) == json.loads(patiently(*argv))


def test_serve(tmp_path: Path, secret: str, other: str) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    create_luks(base, MIB)
    Qemu(base).io("write -P 7 0 1M")
    new = ["--encryption", "luks", "--secret-file", other, "--iter-time", "1"]
    words = ["--backing", "base.qcow2", "--backing-format", "qcow2"]
    image("create", top, "1M", *words, *new)
    given = ["--secret-file", secret, "--secret-file", other]
    with serving(str(top), "--unix", "s", *given, cwd=tmp_path) as server:
        uri = server.uris[0]
        found = json.loads(run("nbdinfo", "--json", uri))["exports"][0]
        assert found["block_size_minimum"] == 512
        # smaller than that, from a client that does not ask
        script = "h.set_strict_mode(0); h.pwrite(b'across', 66000 - 3); h.flush(); print(h.pread(6, 65997))"
        assert "across" in run("nbdsh", "-u", uri, "-c", script, environment=DEBIAN)
        run("nbdcopy", uri, str(tmp_path / "copy.raw"))
    copy = (tmp_path / "copy.raw").read_bytes()
    assert copy[65990:66010] == b"\7" * 7 + b"across" + b"\7" * 7
    config = tmp_path / "nbdserve.toml"
    config.write_text(
        f'unix = ["t"]\n[[export]]\npath = "{top}"\nread-only = true\n'
        f'secret-file = ["{secret}", "{other}"]\n'
    )
    with serving("--config", str(config), cwd=tmp_path) as server:
        run("nbdcopy", server.uris[0], str(tmp_path / "again.raw"))
        assert PASSPHRASE.decode() not in server.log()
    assert (tmp_path / "again.raw").read_bytes() == copy


def test_serve_refuses(
    tmp_path: Path, secret: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "disk.qcow2"
    words = ["serve", str(path), "--unix", str(tmp_path / "s")]
    assert main([*words, "--create", "1M", "--secret-file", secret]) == 1
    assert "would make an image that is not encrypted" in capsys.readouterr().err
    assert not path.exists()
    create_luks(path, MIB)
    assert main(words) == 1
    assert "--secret-file FILE" in capsys.readouterr().err
    os.chmod(secret, 0)
    if os.getuid():
        assert main([*words, "--secret-file", secret]) == 1


@pytest.mark.parametrize("program", ["qemu-nbd", "nbdserve-qemu-nbd"])
def test_qemu_nbd(tmp_path: Path, program: str) -> None:
    """The same words open the same image, for both programs."""
    path = tmp_path / "disk.qcow2"
    create_luks(path, MIB)
    qemu = Qemu(path)
    qemu.io("write -P 7 0 64k")
    own = Path(sys.executable).parent / "nbdserve-qemu-nbd"
    words = [str(own) if program == "nbdserve-qemu-nbd" else program]
    options = f"{qemu.options},encrypt.format=luks"
    words += ["-r", *qemu.object, "--image-opts", options, "-k", str(tmp_path / "s")]
    with subprocess.Popen(words) as server:
        try:
            deadline_s = time.monotonic() + 30
            while not (tmp_path / "s").exists():
                assert time.monotonic() < deadline_s
                time.sleep(0.01)
            uri = f"nbd+unix:///?socket={tmp_path / 's'}"
            run("nbdcopy", uri, tmp_path / "copy.raw")
        finally:
            server.kill()
    assert (tmp_path / "copy.raw").read_bytes() == qemu.content()
