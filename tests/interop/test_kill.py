"""SIGKILL of a server under load: every write that was acknowledged is still there.

The page cache survives such a death, so nothing may be kept in the process: a
client that reconnects does not repeat what was acknowledged.
"""

import os
import random
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.images import IMAGE_SIZE, Image
from tests.helpers.servers import Server, server_under_test
from tests.helpers.tools import run

pytestmark = pytest.mark.interop

FLAVOURS_TO_KILL = [
    "raw",
    "qcow-empty",
    "qcow-compressed",
    "qcow2-empty",
    "qcow2-v2",
    "qcow2-zlib",
    "qcow2-snapshot",
    "qcow2-over-qcow2",
    "qcow2-cluster-4k",
]

# Writes until the server is gone; one line for each acknowledged write.
LOAD = """
import random
generator = random.Random({seed})
for number in range({count}):
    offset = generator.randrange({size} // 512) * 512
    length = min(generator.randrange(1, 200) * 512, {size} - offset)
    h.pwrite(bytes([number % 255 + 1]) * length, offset)
    print(number, flush=True)
"""
SEED, COUNT = 7, 20_000


@dataclass(frozen=True)
class Write:
    """One write of the load."""

    offset: int
    data: bytes


def planned_writes(count: int) -> list[Write]:
    """The first `count` writes that LOAD sends, from the same seed."""
    generator = random.Random(SEED)
    writes = []
    for number in range(count):
        offset = generator.randrange(IMAGE_SIZE // 512) * 512
        length = min(generator.randrange(1, 200) * 512, IMAGE_SIZE - offset)
        writes.append(Write(offset, bytes([number % 255 + 1]) * length))
    return writes


def load_until_killed(server: Server, uri: str, *, kill_after: int) -> int:
    """Kill the server once `kill_after` writes were acknowledged; return how many were."""
    script = LOAD.format(seed=SEED, count=COUNT, size=IMAGE_SIZE)
    client = subprocess.Popen(
        ["nbdsh", "-u", uri, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PATH": "/usr/bin:/bin"},
    )
    watchdog = threading.Timer(30, client.kill)
    watchdog.start()
    acknowledged = 0
    with client:
        assert client.stdout is not None
        for line in client.stdout:
            acknowledged = int(line) + 1
            if acknowledged == kill_after:
                server.kill()
    watchdog.cancel()
    assert acknowledged >= kill_after
    return acknowledged


@pytest.mark.parametrize("image", FLAVOURS_TO_KILL, indirect=True)
@pytest.mark.parametrize("transport", ["unix"], indirect=True)
def test_acknowledged_writes_survive_sigkill(
    image: Image, server: Server, uri: str, tmp_path: Path
) -> None:
    """The reopened image has each acknowledged write and nothing but the one in flight."""
    acknowledged = load_until_killed(server, uri, kill_after=250)
    *writes, in_flight = planned_writes(acknowledged + 1)
    content = bytearray(image.mirror.read_bytes())
    for write in writes:
        content[write.offset : write.offset + len(write.data)] = write.data

    # Whatever the crash left, a check finds leaked clusters at worst.
    if image.format == "qcow2":
        run("qemu-img", "check", image.path, expect=[0, 3])
    again = server_under_test(
        image.path,
        tmp_path / "again",
        image_format=image.format,
        transport="unix",
    )
    with again:
        seen = tmp_path / "seen.raw"
        run("nbdcopy", again.uri("unix"), seen)
    found = seen.read_bytes()
    for offset in range(0, IMAGE_SIZE, 512):
        sector = found[offset : offset + 512]
        allowed = [content[offset : offset + 512]]
        position = offset - in_flight.offset
        if 0 <= position < len(in_flight.data):
            allowed.append(bytearray(in_flight.data[position : position + 512]))
        assert sector in allowed, f"sector at {offset}"
    image.assert_snapshot_untouched()
    run("qemu-img", "compare", "-f", image.format, "-F", "raw", image.path, seen)
    if image.format == "qcow2":
        run("qemu-img", "check", image.path, expect=[0, 3])
