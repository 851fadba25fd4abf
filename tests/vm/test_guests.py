"""The Linux kernel's nbd driver and qemu's block layer, in a real guest, end to end.

A guest makes an ext4 file system on an export, writes, syncs, drops its caches,
reads again, trims and checks: once through /dev/nbd0 with two connections, once
with the export as its own disk.
"""

import json
import os
from pathlib import Path

import pytest

from tests.helpers.servers import Server, server_under_test
from tests.helpers.tools import run
from tests.vm.guest import Guest, boot
from tests.vm.initramfs import build_initramfs
from tests.vm.kernel import Kernel, KernelMissingError, find_kernel

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]

DISK_SIZE = 128 << 20
INIT = Path(__file__).with_name("init.sh")


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    """Debian's cloud kernel."""
    try:
        return find_kernel()
    except KernelMissingError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def initramfs(kernel: Kernel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guests' root file system."""
    path = tmp_path_factory.mktemp("guest") / "initramfs.gz"
    path.write_bytes(build_initramfs(kernel, INIT.read_text()))
    return path


@pytest.fixture(params=["raw", "qcow", "qcow2"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """An empty disk and its format."""
    image_format: str = request.param
    path = tmp_path / f"disk.{image_format}"
    run("qemu-img", "create", "-q", "-f", image_format, path, str(DISK_SIZE))
    return path, image_format


def serve(image: tuple[Path, str], directory: Path) -> Server:
    """The disk on a TCP port."""
    path, image_format = image
    return server_under_test(
        path, directory / "server", image_format=image_format, transport="tcp"
    )


def assert_good(guest: Guest, image: tuple[Path, str], directory: Path) -> None:
    """The guest was content, and so are qemu-img and e2fsck with what it left."""
    guest.assert_passed()
    assert int(guest.said["size"]) == DISK_SIZE
    assert guest.said["write_cache"] == "write back"  # it sends flushes
    assert int(guest.said["discard"]) > 0
    path, image_format = image
    if image_format == "qcow2":
        run("qemu-img", "check", "-f", "qcow2", path)
    content = directory / "content.raw"
    run("qemu-img", "convert", "-f", image_format, "-O", "raw", path, content)
    run("/sbin/e2fsck", "-fn", content)


def test_dev_nbd0_with_two_connections(
    image: tuple[Path, str], kernel: Kernel, initramfs: Path, tmp_path: Path
) -> None:
    """nbd-client in the guest attaches /dev/nbd0 and an ext4 lives on it."""
    with serve(image, tmp_path) as server:
        append = f"nbd_port={server.port} nbd_name={server.export}"
        guest = boot(kernel.image, initramfs, append=append)
    assert_good(guest, image, tmp_path)


def test_guest_disk_is_the_export(
    image: tuple[Path, str], kernel: Kernel, initramfs: Path, tmp_path: Path
) -> None:
    """QEMU connects the guest's own virtio disk to the server."""
    with serve(image, tmp_path) as server:
        drive = (
            f"file={server.uri('tcp')},format=raw,if=virtio,discard=unmap,cache=none"
        )
        guest = boot(kernel.image, initramfs, drive=drive)
    assert_good(guest, image, tmp_path)


def test_trim_reached_the_image(
    kernel: Kernel, initramfs: Path, tmp_path: Path
) -> None:
    """What the guest removed and trimmed takes no space in the image."""
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(DISK_SIZE))
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 1 0 {DISK_SIZE}", path)
    full = os.stat(path).st_blocks * 512
    with serve((path, "qcow2"), tmp_path) as server:
        drive = (
            f"file={server.uri('tcp')},format=raw,if=virtio,discard=unmap,cache=none"
        )
        guest = boot(kernel.image, initramfs, drive=drive)
    assert_good(guest, (path, "qcow2"), tmp_path)
    assert full >= DISK_SIZE
    assert os.stat(path).st_blocks * 512 < DISK_SIZE // 2
    checked = json.loads(run("qemu-img", "check", "--output=json", path))
    assert checked["allocated-clusters"] * 65536 < DISK_SIZE // 2
