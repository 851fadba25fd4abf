"""`nbdserve serve` from the outside: what it prints, refuses, and how it ends."""

import json
import os
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.servers import run, serving

ANY_PORT = ("--listen", "127.0.0.1:0")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """An empty raw image in an otherwise empty folder."""
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, 1 << 20)
    return path


def nbdinfo(uri: str, *, cwd: Path) -> dict[str, object]:
    """Return what libnbd sees at `uri`."""
    output = subprocess.run(
        ["nbdinfo", "--json", uri],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout
    export = json.loads(output)["exports"][0]
    assert isinstance(export, dict)
    return export


def test_it_prints_the_uri_and_the_commands_that_reach_it(
    raw: Path, tmp_path: Path
) -> None:
    with serving("disk.img", "--format", "raw", *ANY_PORT, cwd=tmp_path) as server:
        (uri,) = server.uris
        found = re.fullmatch(r"nbd://127\.0\.0\.1:(\d+)/disk", uri)
        assert found
        port = found[1]
        assert server.announcement.splitlines() == [
            "disk.img, 1 MiB, read-write:",
            f"  {uri}",
            "",
            f"qemu-system-x86_64 -drive file={uri},format=raw,if=virtio",
            f"nbd-client 127.0.0.1 {port} /dev/nbd0 -N disk",
            f"nbdcopy {uri} copy.img",
        ]
        subprocess.run(
            shlex.split(server.announcement.splitlines()[-1]),
            cwd=tmp_path,
            timeout=30,
            check=True,
        )
        assert (tmp_path / "copy.img").read_bytes() == raw.read_bytes()


def test_several_images_at_several_places(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "b.img").write_bytes(bytes(1000))
    places = (*ANY_PORT, *ANY_PORT, "--unix", "one.sock", "--unix", "a b.sock")
    with serving(
        "disk.img", "odd name=b.img", "--read-only", *places, cwd=tmp_path
    ) as server:
        assert len(server.uris) == 2 * 4
        assert len(set(server.uris)) == 2 * 4
        sizes = [nbdinfo(uri, cwd=tmp_path)["export-size"] for uri in server.uris]
        assert sizes == [1 << 20] * 4 + [1000] * 4
        assert (tmp_path / "a b.sock").is_socket()
        assert server.end() == 0
    assert not (tmp_path / "a b.sock").exists()


def test_the_only_export_is_the_default_export_too(raw: Path, tmp_path: Path) -> None:
    with serving("disk.img", "--read-only", *ANY_PORT, cwd=tmp_path) as server:
        uri = server.uris[0].removesuffix("disk")
        assert nbdinfo(uri, cwd=tmp_path)["export-size"] == 1 << 20


def test_the_default_address_is_not_opened_beside_a_unix_socket(
    raw: Path, tmp_path: Path
) -> None:
    with serving("disk.img", "--read-only", "--unix", "s", cwd=tmp_path) as server:
        assert server.uris == [f"nbd+unix:///disk?socket={tmp_path}/s"]
        listening = Path(f"/proc/{server.pid}/net/tcp").read_text()
        inodes = {
            os.readlink(f"/proc/{server.pid}/fd/{fd}")
            for fd in os.listdir(f"/proc/{server.pid}/fd")
        }
        sockets = [line.split()[9] for line in listening.splitlines()[1:]]
        assert not {f"socket:[{inode}]" for inode in sockets} & inodes


def test_a_description_is_what_clients_see(raw: Path, tmp_path: Path) -> None:
    words = ("disk.img", "--read-only", "--description", "Öl & more", *ANY_PORT)
    with serving(*words, cwd=tmp_path) as server:
        assert nbdinfo(server.uris[0], cwd=tmp_path)["description"] == "Öl & more"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_exit_code_0(
    number: signal.Signals, raw: Path, tmp_path: Path
) -> None:
    with serving("disk.img", "--read-only", *ANY_PORT, cwd=tmp_path) as server:
        assert server.end(number) == 0
        assert "Traceback" not in server.log()


def test_a_hangup_flushes_and_goes_on(raw: Path, tmp_path: Path) -> None:
    with serving("disk.img", "--format=raw", *ANY_PORT, cwd=tmp_path) as server:
        os.kill(server.pid, signal.SIGHUP)
        server.wait_for_log("flushed")
        assert nbdinfo(server.uris[0], cwd=tmp_path)["export-size"] == 1 << 20
        assert server.end() == 0


def test_json_logs_are_objects_that_tell_the_story_of_a_connection(
    raw: Path, tmp_path: Path
) -> None:
    words = ("disk.img", "--read-only", "--log-format", "json", *ANY_PORT)
    with serving(*words, cwd=tmp_path) as server:
        nbdinfo(server.uris[0], cwd=tmp_path)
        server.wait_for_log("connection closed")
        assert server.end() == 0
        events = [json.loads(line) for line in server.log().splitlines()]
    opened, closed = events[0], events[1]
    assert (opened["event"], opened["export"]) == ("connection opened", "disk")
    assert {"requests", "bytes_read", "duration_s", "reason"} <= closed.keys()


def test_a_reader_of_stdout_that_left_ends_nothing(raw: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nbdserve", "serve", "disk.img", "--read-only"]
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(
        [*command, "--unix", "s"],
        cwd=tmp_path,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        os.close(writer)
        assert server.stderr is not None
        assert "nobody reads" in server.stderr.readline()
        uri = f"nbd+unix:///disk?socket={tmp_path}/s"
        assert nbdinfo(uri, cwd=tmp_path)["export-size"] == 1 << 20
        server.terminate()
        assert server.wait(30) == 0


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-", "2>&1"])
def test_a_server_whose_log_nobody_reads_goes_on(
    streams: str, raw: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "nbdserve", "serve", "disk.img", "--read-only"]
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(
        ["sh", "-c", f'exec "$@" {streams}', "sh", *command, "--unix", "s"],
        cwd=tmp_path,
        stdout=writer,
    ) as server:
        os.close(writer)
        deadline = time.monotonic() + 30
        while not (tmp_path / "s").exists():
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        uri = f"nbd+unix:///disk?socket={tmp_path}/s"
        for _ in range(2):  # a connection is two lines
            assert nbdinfo(uri, cwd=tmp_path)["export-size"] == 1 << 20
        server.terminate()
        assert server.wait(30) == 0


# Making an image


def test_create_makes_a_missing_qcow2(tmp_path: Path) -> None:
    with serving("new.qcow2", "--create", "10M", *ANY_PORT, cwd=tmp_path) as server:
        assert nbdinfo(server.uris[0], cwd=tmp_path)["export-size"] == 10 << 20
        assert server.end() == 0
    assert (tmp_path / "new.qcow2").read_bytes()[:8] == b"QFI\xfb\0\0\0\3"


def test_create_makes_the_format_that_was_named(tmp_path: Path) -> None:
    words = ("new.img", "--create", "1000", "--format", "raw", *ANY_PORT)
    with serving(*words, cwd=tmp_path) as server:
        assert server.end() == 0
    assert (tmp_path / "new.img").read_bytes() == bytes(1000)


def test_create_leaves_an_existing_image_alone_and_notes_its_size(
    raw: Path, tmp_path: Path
) -> None:
    raw.write_bytes(b"precious")
    words = ("disk.img", "--create", "1M", "--format", "raw", *ANY_PORT)
    with serving(*words, cwd=tmp_path) as server:
        assert server.end() == 0
        assert "another size" in server.log()
    assert raw.read_bytes() == b"precious"


# Refusals: one line that names the thing, and exit code 1


def refusal(*words: str, cwd: Path) -> str:
    """Return the line with which `nbdserve serve` refuses."""
    result = run("serve", *words, cwd=cwd)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("nbdserve: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_a_missing_image(tmp_path: Path) -> None:
    assert "nothing.qcow2: No such file" in refusal("nothing.qcow2", cwd=tmp_path)


def test_a_folder(tmp_path: Path) -> None:
    assert f"{tmp_path}: is a directory, not a file" in refusal(
        f"x={tmp_path}", cwd=tmp_path
    )


def test_a_raw_file_that_a_guest_could_turn_into_a_qcow2(
    raw: Path, tmp_path: Path
) -> None:
    line = refusal("disk.img", cwd=tmp_path)
    assert all(word in line for word in ("disk.img", "--format raw", "--read-only"))


def test_a_file_of_another_format(raw: Path, tmp_path: Path) -> None:
    line = refusal("disk.img", "--format", "qcow2", cwd=tmp_path)
    assert "disk.img: is no qcow2 image" in line


def test_a_busy_port(raw: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        line = refusal("disk.img", "--read-only", "--listen", address, cwd=tmp_path)
    assert f"{address}: in use" in line


def test_a_busy_port_leaves_no_socket_and_no_image_behind(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        words = ("new.qcow2", "--create", "1M", "--unix", "s", "--listen", address)
        refusal(*words, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_unix_socket_of_a_live_server(raw: Path, tmp_path: Path) -> None:
    words = ("disk.img", "--read-only", "--unix", "s")
    with serving(*words, cwd=tmp_path) as server:
        assert "s: in use by another server" in refusal(*words, cwd=tmp_path)
        assert nbdinfo(server.uris[0], cwd=tmp_path)["export-size"] == 1 << 20


def test_an_image_that_another_server_writes(raw: Path, tmp_path: Path) -> None:
    words = ("disk.img", "--format", "raw", *ANY_PORT)
    with serving(*words, cwd=tmp_path):
        assert "disk.img: in use by another process" in refusal(*words, cwd=tmp_path)


def test_one_image_under_two_names(raw: Path, tmp_path: Path) -> None:
    words = ("a=disk.img", "b=disk.img", "--format", "raw", *ANY_PORT)
    told = refusal(*words, cwd=tmp_path)
    assert "disk.img is the same file as disk.img, served as 'a'" in told
    with serving(*words, "--read-only", cwd=tmp_path) as server:
        assert len(server.uris) == 2


def test_a_second_image_that_cannot_be_opened_leaves_nothing_running(
    raw: Path, tmp_path: Path
) -> None:
    words = ("disk.img", "missing.img", "--format", "raw", "--unix", "s")
    assert "missing.img" in refusal(*words, cwd=tmp_path)
    assert not (tmp_path / "s").exists()


def test_a_state_dir_that_is_none(raw: Path, tmp_path: Path) -> None:
    words = ("disk.img", "--read-only", "--state-dir", "disk.img")
    assert "--state-dir disk.img: is not a folder" in refusal(*words, cwd=tmp_path)


def test_no_permission(raw: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:  # to whom no file is closed: an immutable one is
        path = Path("/proc/version")
    else:
        path = raw
        path.chmod(0)
    assert str(path) in refusal(f"x={path}", "--format", "raw", cwd=tmp_path)


# Socket activation


def test_activated_sockets_are_the_places_and_stdout_is_the_activators(
    raw: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "nbdserve", "serve", "disk.img", "--read-only"]
    result = subprocess.run(
        ["nbdinfo", "--size", "--", "[", *command, "]"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.stdout == f"{1 << 20}\n", result.stderr
    assert "nbd+unix:///disk?socket=" in result.stderr


def test_an_explicit_address_beside_activated_sockets_is_an_error(
    raw: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as activated:
        code = (
            "import os, sys\n"
            "os.dup2(int(sys.argv[1]), 3)\n"
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1')\n"
            "os.execv(sys.executable, [sys.executable, '-m', 'nbdserve', 'serve',"
            " 'disk.img', '--read-only', '--unix', 's'])\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", code, str(activated.fileno())],
            cwd=tmp_path,
            pass_fds=[activated.fileno()],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert result.returncode == 1
    assert "--listen" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_second_signal_ends_it_at_once(raw: Path, tmp_path: Path) -> None:
    os.truncate(raw, 64 << 20)
    words = ("disk.img", "--read-only", "--unix", "s")
    with (
        serving(*words, cwd=tmp_path) as server,
        socket.socket(socket.AF_UNIX) as client,
    ):
        client.settimeout(30)
        client.connect(str(tmp_path / "s"))
        client.recv(18, socket.MSG_WAITALL)
        # client flags; NBD_OPT_EXPORT_NAME ""; a READ whose reply is never read
        client.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0))
        client.recv(10, socket.MSG_WAITALL)
        client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 64 << 20))
        client.recv(16, socket.MSG_WAITALL)
        os.kill(server.pid, signal.SIGTERM)
        while (tmp_path / "s").exists():  # until the shutdown has begun
            time.sleep(0.01)
        assert server.end(signal.SIGTERM) == -signal.SIGTERM
