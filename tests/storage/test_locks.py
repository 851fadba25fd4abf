"""Two writers never share an image, whoever they are; readers do."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.errors import ImageInUseError
from nbdserve.storage.file import FileStorage

pytestmark = pytest.mark.interop

FORMATS = ["raw", "qcow2"]


@pytest.fixture(params=FORMATS)
def image_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def create(path: Path, image_format: str) -> None:
    command = ["qemu-img", "create", "-q", "-f", image_format, str(path), "1M"]
    subprocess.run(command, check=True)


@pytest.fixture
def image(tmp_path: Path, image_format: str) -> Path:
    path = tmp_path / "disk.img"
    create(path, image_format)
    return path


def qemu_io(path: Path, image_format: str, *, read_only: bool) -> str:
    """Return what a try to read or write says on stderr."""
    arguments = ["-r", "-c", "read 0 512"] if read_only else ["-c", "write 0 512"]
    result = subprocess.run(
        ["qemu-io", "-f", image_format, *arguments, path],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    return result.stderr


def qemu_info(path: Path, *options: str) -> str:
    result = subprocess.run(
        ["qemu-img", "info", *options, path],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    return result.stderr


@pytest.fixture
def served(
    image: Path, image_format: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Path]:
    """The image while qemu-nbd serves it (writable unless the test says otherwise)."""
    options: list[str] = getattr(request, "param", [])
    pid_file = tmp_path / "pid"
    command = ["qemu-nbd", "-t", "-f", image_format, *options, "--fork"]
    places = ["--pid-file", str(pid_file), "-k", str(tmp_path / "nbd.sock")]
    # --fork returns once clients can connect.
    subprocess.run([*command, *places, str(image)], check=True, timeout=20)
    yield image
    # SIGTERM is ignored until its main loop runs.
    os.kill(int(pid_file.read_text()), signal.SIGKILL)


async def test_our_writer_excludes_qemu_writers(image: Path, image_format: str) -> None:
    storage = FileStorage(image)
    assert "lock" in qemu_io(image, image_format, read_only=False)
    await storage.close()
    assert qemu_io(image, image_format, read_only=False) == ""


async def test_our_writer_is_seen_by_qemu_img_info(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, "qcow2")
    storage = FileStorage(path)
    assert 'Failed to get shared "write" lock' in qemu_info(path)
    assert qemu_info(path, "-U") == ""
    await storage.close()
    assert qemu_info(path) == ""


async def test_our_reader_shares_with_qemu_readers_only(
    image: Path, image_format: str
) -> None:
    storage = FileStorage(image, read_only=True)
    assert qemu_io(image, image_format, read_only=True) == ""
    assert "lock" in qemu_io(image, image_format, read_only=False)
    await storage.close()


def test_qemu_writer_excludes_all_of_ours(served: Path) -> None:
    for read_only in (True, False):
        with pytest.raises(ImageInUseError, match=r"disk\.img: in use by another"):
            FileStorage(served, read_only=read_only)


async def test_without_locks_a_served_image_can_be_looked_at(served: Path) -> None:
    storage = FileStorage(served, read_only=True, lock=False)
    assert storage.try_read(0, memoryview(bytearray(4)))
    await storage.close()


@pytest.mark.parametrize("served", [["-r"]], indirect=True)
async def test_qemu_reader_shares_with_our_readers(
    served: Path, image_format: str
) -> None:
    storage = FileStorage(served, read_only=True)
    await storage.close()
    if image_format == "qcow2":
        # A raw reader of qemu lets others write; one of a format does not.
        with pytest.raises(ImageInUseError):
            FileStorage(served)


async def test_ours_among_themselves(image: Path) -> None:
    one = FileStorage(image, read_only=True)
    two = FileStorage(image, read_only=True)
    with pytest.raises(ImageInUseError, match="in use by another process"):
        FileStorage(image)
    await one.close()
    await two.close()
    writer = FileStorage(image)
    for read_only in (True, False):
        with pytest.raises(ImageInUseError, match="in use by another process"):
            FileStorage(image, read_only=read_only)
    await writer.close()
    await FileStorage(image).close()
