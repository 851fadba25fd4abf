"""`nbdserve-qemu-nbd -c /dev/nbd0` and `-d` inside a guest, beside qemu-nbd's own."""

import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.tools import run
from tests.vm import guest_disk
from tests.vm.guest import boot
from tests.vm.initramfs import build_initramfs
from tests.vm.kernel import find_kernel

#: Python starts four times in an emulated processor: 20 s, on a machine that is free.
TIMEOUT_S = 300
pytestmark = [pytest.mark.interop, pytest.mark.timeout(TIMEOUT_S + 60)]

SIZE = 64 << 20
INIT = Path(__file__).with_name("attach.sh")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attach")
    image = folder / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE))
    return guest_disk.build_disk(folder, image)


@pytest.fixture
def attached(disk: Path, tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Boot a guest that attaches with a command; return what it said."""

    def go(command: str) -> dict[str, str]:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        kernel = find_kernel()
        copy = Path(shutil.copy(disk, folder))
        initramfs = folder / "initramfs.gz"
        initramfs.write_bytes(
            build_initramfs(kernel, INIT.read_text(), {"command": command})
        )
        drive = f"file={copy},format=raw,if=virtio,cache=unsafe"
        guest = boot(kernel.image, initramfs, drive=drive, timeout_s=TIMEOUT_S)
        guest.assert_passed()
        image = guest_disk.image_of(copy, folder / "image.qcow2")
        run("qemu-img", "check", image)
        content = folder / "content.raw"
        run("qemu-img", "convert", "-O", "raw", image, content)
        run("/sbin/e2fsck", "-fn", content)
        return guest.said

    return go


def test_attach_and_detach_as_qemu_nbd_does(
    attached: Callable[[str], dict[str, str]],
) -> None:
    commands = [guest_disk.COMMAND, str(shutil.which("qemu-nbd"))]
    with ThreadPoolExecutor() as pool:
        ours, theirs = pool.map(attached, commands)
    assert ours["size"] == theirs["size"] == str(SIZE)
    assert ours["read_only"] == theirs["read_only"] == "1"
    assert ours["write_cache"] == theirs["write_cache"] == "write back"
    assert int(ours["discard"]) > 0
    assert ours["attached"] == theirs["attached"] == ""
    assert ours["detached"] == theirs["detached"] == "/dev/nbd0 disconnected"
    assert ours["size_then"] == theirs["size_then"] == "0"
    assert ours["size_last"] == "0"
