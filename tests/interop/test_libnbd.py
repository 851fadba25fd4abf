"""libnbd's command line tools: nbdinfo and nbdcopy."""

import dataclasses
import filecmp
import json
from pathlib import Path

import pytest

from tests.helpers.images import IMAGE_SIZE, Image, fill_pattern
from tests.helpers.servers import Server, nbdserve, server_under_test
from tests.helpers.tools import run

pytestmark = pytest.mark.interop

SOME = ["raw", "qcow", "qcow2-v3"]
CAPABILITIES = (
    "cache",
    "df",
    "fast-zero",
    "flush",
    "fua",
    "multi-conn",
    "structured-reply",
    "trim",
    "write",
    "zero",
)


def test_nbdcopy_in_and_out(
    image: Image, server: Server, uri: str, tmp_path: Path
) -> None:
    """Four connections upload a disk, four download it; the bytes are the same."""
    new, back = tmp_path / "new.raw", tmp_path / "back.raw"
    fill_pattern(new, IMAGE_SIZE, seed=4)
    several = ["--connections=4", "--requests=16", "--threads=4"]
    run("nbdcopy", *several, "--flush", new, uri)
    run("nbdcopy", *several, uri, back)
    assert filecmp.cmp(new, back, shallow=False)
    server.stop()
    dataclasses.replace(image, mirror=new).assert_all()


@pytest.mark.parametrize("image", SOME, indirect=True)
def test_nbdinfo_describes_the_export(server: Server, uri: str) -> None:
    """Size, flags, block sizes and the meta context, for people and for programs."""
    assert int(run("nbdinfo", "--size", uri)) == IMAGE_SIZE
    assert "export-size" in run("nbdinfo", uri)
    (export,) = json.loads(run("nbdinfo", "--json", uri))["exports"]
    assert export["export-name"] == server.export
    assert export["export-size"] == IMAGE_SIZE
    assert export["is_read_only"] is False
    assert "base:allocation" in export["contexts"]
    assert export["block_size_minimum"] == 1
    assert export["block_size_preferred"] >= 4096
    assert export["block_size_maximum"] >= 32 << 20


@pytest.mark.parametrize("image", SOME, indirect=True)
@pytest.mark.parametrize("transport", ["unix"], indirect=True)
def test_nbdinfo_can(uri: str) -> None:
    """A writable export can everything; nbdinfo's exit code 2 would say no."""
    for capability in CAPABILITIES:
        run("nbdinfo", "--can", capability, uri)


@pytest.mark.parametrize("image", SOME, indirect=True)
def test_read_only_export(image: Image, tmp_path: Path) -> None:
    """--read-only says so, offers no writing, and leaves the file alone."""
    before = image.path.read_bytes()
    server = server_under_test(
        image.path,
        tmp_path / "server",
        image_format=image.format,
        transport="unix",
        options=["--read-only"],
    )
    with server:
        uri = server.uri("unix")
        run("nbdinfo", "--is", "read-only", uri)
        run("nbdinfo", "--can", "write", uri, expect=[2])
        run("nbdinfo", "--can", "zero", uri, expect=[2])
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, image.mirror)
    assert image.path.read_bytes() == before


@pytest.mark.parametrize("image", ["qcow2-v3"], indirect=True)
def test_list_of_several_exports(image: Image, tmp_path: Path) -> None:
    """nbdinfo --list finds each export with its description."""
    server = nbdserve(
        image.path,
        tmp_path / "server",
        export="first",
        transports=["unix", "tcp"],
        options=[f"second disk={image.mirror}", "--read-only", "--description", "lab"],
    )
    with server:
        for transport in ("unix", "tcp"):
            listed = json.loads(
                run("nbdinfo", "--list", "--json", server.uri(transport, ""))
            )
            exports = {export["export-name"]: export for export in listed["exports"]}
            assert set(exports) == {"first", "second disk"}
            assert exports["first"]["description"] == "lab"
            assert exports["second disk"]["export-size"] == IMAGE_SIZE
            run("nbdinfo", "--size", server.uri(transport, "second disk"))
            run("nbdinfo", "--size", server.uri(transport, "third"), expect=[1])


@pytest.mark.parametrize("image", SOME, indirect=True)
def test_transports_show_one_disk(image: Image, tmp_path: Path) -> None:
    """What came in over the Unix socket goes out over TCP, and the reverse."""
    server = nbdserve(
        image.path,
        tmp_path / "server",
        image_format="raw" if image.format == "raw" else "auto",
    )
    with server:
        for writer, reader, byte in (("unix", "tcp", "0x41"), ("tcp", "unix", "0x42")):
            command = f"-P {byte} 1000k 200k"
            for transport, verb in ((writer, "write"), (reader, "read")):
                target = server.uri(transport)
                said = run("qemu-io", "-f", "raw", "-c", f"{verb} {command}", target)
                assert "failed" not in said
        # The only export is the default export too.
        assert int(run("nbdinfo", "--size", server.uri("tcp", ""))) == IMAGE_SIZE
    image.assert_clean()
