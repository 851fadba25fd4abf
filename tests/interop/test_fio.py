"""fio's nbd engine: random load from several jobs, each block verified by CRC."""

import dataclasses
from pathlib import Path

import pytest

from tests.helpers.images import Image
from tests.helpers.servers import Server
from tests.helpers.tools import run

pytestmark = pytest.mark.interop


def test_fio_verifies_what_it_wrote(
    image: Image, server: Server, uri: str, tmp_path: Path
) -> None:
    """Three jobs write, flush and verify; qemu then reads the same from the file."""
    run(
        "fio",
        "--name=verify",
        "--ioengine=nbd",
        f"--uri={uri}",
        "--rw=randwrite",
        "--bsrange=4k-96k",
        "--bs_unaligned=1",
        "--numjobs=3",
        "--size=6m",
        "--offset_increment=9m",
        "--iodepth=16",
        "--fsync=50",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--randseed=5",
        "--group_reporting",
    )
    seen = tmp_path / "seen.raw"
    run("nbdcopy", uri, seen)
    server.stop()
    dataclasses.replace(image, mirror=seen).assert_all()
