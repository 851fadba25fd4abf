"""The control socket: a real server, `nbdserve ctl`, curl and real clients."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.servers import ServeProcess, run, serving
from tests.helpers.nbd_client import NbdClient, NbdRequestFailed
from tests.helpers.tools import run as tool

MIB = 1 << 20
CHANGED = "qemu:dirty-bitmap:changed"


def content(size: int) -> bytes:
    """Return bytes without holes."""
    return bytes(range(256)) * (size // 256)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an image of 8 MiB of data and a raw one."""
    raw = tmp_path / "b.img"
    raw.write_bytes(content(8 * MIB))
    tool("qemu-img", "convert", "-O", "qcow2", raw, tmp_path / "a.qcow2")
    os.truncate(raw, MIB)
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[ServeProcess]:
    words = ["a.qcow2", "--unix", "s", "--control", "c", "--bitmap", "changed"]
    with serving(*words, cwd=folder) as process:
        yield process


def ctl(folder: Path, *words: str, expect: int = 0) -> str:
    """Run `nbdserve ctl`; return what it says, which is one line if it fails."""
    done = run("ctl", "--control", "c", *words, cwd=folder)
    assert done.returncode == expect, done.stdout + done.stderr
    if expect:
        assert done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("nbdserve: ")
    return done.stdout if not expect else done.stderr


def curl(folder: Path, method: str, path: str, body: str = "") -> tuple[int, Any]:
    """Ask the socket with curl; return the status and the JSON."""
    argv = ["curl", "-s", "-X", method, "--unix-socket", str(folder / "c")]
    argv += ["-w", "%{http_code}", "--path-as-is", f"http://localhost{path}"]
    if body:
        argv += ["-d", body]
    text = tool(*argv)
    return int(text[-3:]), json.loads(text[:-3])


# -- the socket


def test_who_may_use_the_socket(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(folder / "c"))
    with serving("a.qcow2", "--unix", "s", "--control", "c", cwd=folder) as server:
        status = (folder / "c").stat()
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o600
        words = ["serve", "b.img", "--read-only", "--unix", "t", "--control", "c"]
        second = run(*words, cwd=folder)
        assert second.returncode == 1
        problem = (
            "c: in use by another server; stop that one, or choose another address"
        )
        assert second.stderr == f"nbdserve: {problem}\n"
        assert "a.qcow2" in ctl(folder, "list")
        assert server.end() == 0
    assert not (folder / "c").exists()


def test_nobody_is_there(folder: Path) -> None:
    assert "no server is there" in ctl(folder, "list", expect=1)
    (folder / "c").write_text("no socket")
    assert "no server is there" in ctl(folder, "list", expect=1)


def test_a_key_of_the_configuration_file(folder: Path) -> None:
    (folder / "n.toml").write_text(
        'unix = ["s"]\ncontrol = "c"\n[[export]]\npath = "a.qcow2"\nname = "x/ y"\n'
    )
    with serving("--config", "n.toml", cwd=folder) as server:
        assert '"x/ y"' not in ctl(folder, "list")
        listed = json.loads(ctl(folder, "list", "--json"))["exports"]
        assert [each["name"] for each in listed] == ["x/ y"]
        ctl(folder, "flush", "x/ y")
        assert curl(folder, "GET", "/v1/exports/x%2F%20y")[0] == 200
        # an export that is gone after a reload can't be used any more
        (folder / "n.toml").write_text('unix = ["s"]\ncontrol = "c"\n')
        os.kill(server.pid, signal.SIGHUP)
        server.wait_for_log("reloaded")
        assert "no export" in ctl(folder, "flush", "x/ y", expect=1)
        assert ctl(folder, "list").count("\n") == 1


def test_the_import_costs_only_who_wants_it() -> None:
    code = "import sys, nbdserve.app; sys.exit('aiohttp' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


# -- answers


@pytest.mark.usefixtures("server")
def test_errors_have_a_status_and_one_line(folder: Path) -> None:
    for method, path, body, status, text in (
        ("GET", "/v1/exports/nope", "", 404, "there is no export 'nope'"),
        ("GET", "/v1/exports/", "", 404, "there is no export ''"),
        ("GET", "/", "", 404, "Not Found"),
        ("PUT", "/v1/exports", "", 405, "Method Not Allowed"),
        ("PATCH", "/v1/exports/a", "{", 400, "not understood"),
        ("PATCH", "/v1/exports/a", '{"sizes": 1}', 400, "sizes"),
        ("PATCH", "/v1/exports/a", '{"size": "1Q"}', 400, "is not a size"),
        ("PATCH", "/v1/exports/a", '{"size": 1024}', 400, "shrink"),
        ("PATCH", "/v1/exports/a", '{"size": "' + "1" * 70000 + '"}', 413, "Large"),
        ("POST", "/v1/exports/a/snapshots", '{"name": ""}', 400, "name"),
        ("DELETE", "/v1/exports/a/snapshots/nope", "", 400, "no snapshot"),
        ("DELETE", "/v1/exports/nope/compaction", "", 404, "no export"),
    ):
        found, answer = curl(folder, method, path, body)
        assert (found, list(answer)) == (status, ["error"]), answer
        assert text in answer["error"]
        assert "\n" not in answer["error"]


@pytest.mark.usefixtures("server")
def test_words_that_make_no_sense(folder: Path) -> None:
    for words, text in (
        (["list", "a"], "one word too many"),
        (["resize", "a"], "SIZE is missing"),
        (["resize", "a", "much"], "is not a size"),
        (["resize", "nope", "1G"], "there is no export 'nope', only: 'a'"),
        (["snapshot", "apply", "a", "x"], "is not one of list, create, delete"),
        (["snapshot", "create", "a"], "NAME is missing"),
        (["compacted", "a"], "is not one of"),
        (["flush", "a", "--shrink"], "--shrink is for resize"),
    ):
        assert text in ctl(folder, *words, expect=1)


def test_a_server_that_ends_before_it_answers(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "c"))
        listener.listen()

        def hang_up() -> None:
            listener.accept()[0].close()

        asker = threading.Thread(target=hang_up)
        asker.start()
        try:
            assert "may be done or not" in ctl(folder, "flush", "a", expect=1)
        finally:
            asker.join(10)


def test_what_is_not_http_costs_one_line(folder: Path, server: ServeProcess) -> None:
    for garbage in (b"\0" * 1000, b"GET / HTTP/1.1\r\nA: " + b"x" * 20_000):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(10)
            peer.connect(str(folder / "c"))
            peer.sendall(garbage)
            assert b" 400 " in peer.recv(100)
    assert "read-write" in ctl(folder, "list")
    assert "Traceback" not in server.log()
    assert "control request not understood" in server.log()


# -- sizes


@pytest.mark.usefixtures("server")
async def test_connected_clients_keep_the_size_they_saw(folder: Path) -> None:
    async with await NbdClient.connect_unix(folder / "s") as old:
        await old.go("a")
        text = ctl(folder, "resize", "a", "+1M")
        assert text.startswith("a: 8 MiB -> 9 MiB, longest pause of writers ")
        assert old.details.size == 8 * MIB
        with pytest.raises(NbdRequestFailed):
            await old.read(8 * MIB, 512)
        await old.write(8 * MIB - 512, b"o" * 512)
        async with await NbdClient.connect_unix(folder / "s") as new:
            await new.go("a", contexts=["base:allocation", CHANGED])
            assert new.details.size == 9 * MIB
            await new.write(9 * MIB - 512, b"n" * 512)
            assert await new.read(8 * MIB - 512, 1024) == b"o" * 512 + bytes(512)
            dirty = await new.block_statuses(0, 9 * MIB)
            assert sum(run for run, flag in dirty[CHANGED] if flag) == 128 << 10
        refused = ctl(folder, "resize", "a", "4M", "--shrink", expect=1)
        assert "clients of 'a' may use what lies behind" in refused
    uri = f"nbd+unix:///a?socket={folder / 's'}"
    assert tool("nbdinfo", "--size", uri).strip() == str(9 * MIB)
    deadline = time.monotonic() + 10
    while json.loads(ctl(folder, "list", "--json"))["exports"][0]["clients"]:
        assert time.monotonic() < deadline
    status, answer = curl(
        folder, "PATCH", "/v1/exports/a", '{"size": 4194304, "shrink": true}'
    )
    assert (status, answer["size"], answer["previous-size"]) == (200, 4 * MIB, 9 * MIB)
    assert tool("nbdinfo", "--size", uri).strip() == str(4 * MIB)


def test_raw_images_grow_too(folder: Path) -> None:
    words = ["b.img", "--format", "raw", "--unix", "s", "--control", "c"]
    with serving(*words, cwd=folder) as server:
        assert json.loads(ctl(folder, "resize", "b", "3M", "--json"))["size"] == 3 * MIB
        assert "only qcow2" in ctl(folder, "compact", "b", expect=1)
        assert "only qcow2" in ctl(folder, "snapshot", "list", "b", expect=1)
        assert server.end() == 0
    assert (folder / "b.img").stat().st_size == 3 * MIB


# -- snapshots


async def test_snapshots_while_a_client_writes(
    folder: Path, server: ServeProcess
) -> None:
    async with await NbdClient.connect_unix(folder / "s") as client:
        await client.go("a")
        await client.write(0, b"1" * MIB)
        text = ctl(folder, "snapshot", "create", "a", "first")
        assert text.startswith("a: snapshot first created, longest pause of writers ")
        await client.write(0, b"2" * MIB)
        status, answer = curl(
            folder, "POST", "/v1/exports/a/snapshots", '{"name": "second"}'
        )
        assert status == 201
        assert answer["longest-pause-s"] > 0
        await client.write(0, b"3" * MIB)
        assert "first" in ctl(folder, "snapshot", "list", "a")
        listed = json.loads(ctl(folder, "snapshot", "list", "a", "--json"))
        assert [each["name"] for each in listed["snapshots"]] == ["first", "second"]
        assert "there is a snapshot" in ctl(
            folder, "snapshot", "create", "a", "first", expect=1
        )
        ctl(folder, "snapshot", "delete", "a", "second")
        assert await client.read(0, MIB) == b"3" * MIB
    assert server.end() == 0
    image = folder / "a.qcow2"
    tool("qemu-img", "check", image)
    assert "second" not in tool("qemu-img", "snapshot", "-l", image)
    tool("qemu-img", "snapshot", "-a", "first", image)
    tool("qemu-io", "-c", "read -P 0x31 0 1M", image)


# -- compaction


async def test_compaction_while_clients_write(folder: Path) -> None:
    image, raw, size = folder / "large.qcow2", folder / "raw", 32 * MIB
    model = bytearray(content(size))
    raw.write_bytes(model)
    tool("qemu-img", "convert", "-O", "qcow2", raw, image)
    tool("qemu-io", "-c", "discard 0 16M", image)
    model[: 16 * MIB] = bytes(16 * MIB)
    before = image.stat().st_size
    words = ["large.qcow2", "--unix", "s", "--control", "c"]
    with serving(*words, cwd=folder) as server:
        async with await NbdClient.connect_unix(folder / "s") as client:
            await client.go("large")
            status, answer = curl(folder, "POST", "/v1/exports/large/compaction")
            assert (status, answer["state"]) == (202, "running")
            number = 0
            while answer["state"] == "running":
                number += 1
                for place in range(0, size, MIB):
                    data = bytes([number % 255 + 1]) * 4096
                    await client.write(place, data)
                    model[place : place + 4096] = data
                await client.flush()
                status, answer = curl(folder, "GET", "/v1/exports/large/compaction")
            assert answer["state"] == "done", answer
            assert answer["moved-bytes"] > 8 * MIB
            assert answer["size-after"] < before - 8 * MIB
            assert await client.read(0, size) == model
            # and once more through the command, with nobody writing
            assert " moved, longest pause of writers " in ctl(
                folder, "compact", "large"
            )
            assert await client.read(0, size) == model
        assert server.end() == 0
    tool("qemu-img", "check", image)
    raw.write_bytes(model)
    tool("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, raw)
    assert image.stat().st_size < before - 8 * MIB


async def test_a_compaction_can_be_stopped(folder: Path, server: ServeProcess) -> None:
    image = folder / "a.qcow2"
    assert curl(folder, "GET", "/v1/exports/a/compaction")[1]["state"] == "none"
    async with await NbdClient.connect_unix(folder / "s") as client:
        await client.go("a")
        await client.trim(0, 4 * MIB)
    curl(folder, "POST", "/v1/exports/a/compaction")
    status, answer = curl(folder, "DELETE", "/v1/exports/a/compaction")
    assert (status, answer["state"]) in ((200, "stopped"), (200, "done"))
    curl(folder, "POST", "/v1/exports/a/compaction")
    assert server.end() == 0, "the end of the server stops it too"
    tool("qemu-img", "check", image)
    tool("qemu-io", "-c", "read -P 0 0 4M", image)


# -- reopen


@pytest.mark.parametrize("bitmap", [(), ("--bitmap", "changed")])
@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
async def test_what_lies_past_a_smaller_disk_is_an_error_for_each_request(
    folder: Path, fmt: str, bitmap: tuple[str, ...]
) -> None:
    for name, size in (("disk", "8M"), ("smaller", "1M")):
        tool("qemu-img", "create", "-q", "-f", fmt, folder / name, size)
    words = ["disk", "--format", fmt, "--unix", "s", "--control", "c"]
    with serving(*words, *bitmap, cwd=folder) as process:
        async with await NbdClient.connect_unix(folder / "s") as client:
            await client.go("disk", contexts=["base:allocation"])
            (folder / "smaller").rename(folder / "disk")
            ctl(folder, "reopen", "disk")
            await client.write(0, b"secret" * 10_000)
            before = (folder / "disk").stat().st_size
            for length in (512, 32_000, 65536, 300_000, 3 * MIB):
                for offset in (MIB - 256, 4 * MIB):
                    place = offset, length
                    await client.cache(*place)  # a hint
                    for request in (
                        client.read(*place),
                        client.write(offset, bytes(length)),
                        client.trim(*place),
                        client.write_zeroes(*place),
                        client.block_status(*place),
                    ):
                        with pytest.raises(NbdRequestFailed, match=r"^error (22|28): "):
                            await request
            assert await client.read(0, 60_000) == b"secret" * 10_000
            assert (folder / "disk").stat().st_size == before
        assert process.end() == 0


async def test_reopen_keeps_clients(folder: Path, server: ServeProcess) -> None:
    async with await NbdClient.connect_unix(folder / "s") as client:
        await client.go("a", contexts=["base:allocation", CHANGED])
        await client.write(0, b"b" * 4096)
        assert ctl(folder, "reopen", "a") == "a: reopened, 1 client stayed\n"
        assert await client.read(0, 4096) == b"b" * 4096
        await client.write(4096, b"c" * 4096)
        await client.flush()
        # what was recorded is not forgotten
        statuses = await client.block_statuses(0, MIB)
        assert statuses[CHANGED][0] == (64 << 10, 1)
        assert ctl(folder, "flush", "a") == ""
        (folder / "a.qcow2").rename(folder / "gone")
        assert "a.qcow2" in ctl(folder, "reopen", "a", expect=1)
        with pytest.raises(NbdRequestFailed):
            await client.read(0, 512)
        assert "reopen it: could not be opened anew" in ctl(folder, "list")
        (folder / "gone").rename(folder / "a.qcow2")
        ctl(folder, "reopen", "a")
        assert await client.read(0, 8192) == b"b" * 4096 + b"c" * 4096
    assert server.end() == 0
    tool("qemu-img", "check", folder / "a.qcow2")
