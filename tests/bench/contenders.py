"""The servers that are compared, each started the way its manual recommends."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bench.cells import Cell
from tests.helpers.servers import Server, nbdkit_file, nbdserve, qemu_nbd
from tests.helpers.tools import run


@dataclass(frozen=True)
class Contender:
    """One server on one image format.

    Attributes:
        name: What --servers selects and the table says.
        image_format: "qcow2" or "raw".
        start: Makes the server for an image, with a folder for its socket and logs.
    """

    name: str
    image_format: str
    start: Callable[[Path, Path], Server]

    def takes(self, cell: Cell) -> bool:
        """Whether the cell makes sense for it: a raw file translates nothing."""
        return self.image_format == "qcow2" or cell.raw_peer


def _qemu(aio: str) -> Callable[[Path, Path], Server]:
    def start(image: Path, directory: Path) -> Server:
        options = [f"--aio={aio}"]
        return qemu_nbd(image, directory, image_format="qcow2", options=options)

    return start


#: As it is installed for this interpreter: compiled, if that is a wheel, whatever the
#: current folder has.
INSTALLED = (sys.executable, "-P", "-m", "nbdserve")


def installed_version() -> str:
    """Say which one that is."""
    return run(*INSTALLED, "--version").strip()


#: On tmpfs, as the systemd unit's /run/nbdserve is.
STATE_DIR = Path("/dev/shm/nbdserve-bench")


def state_options() -> list[str]:
    """Options of nbdserve for its folder there."""
    STATE_DIR.mkdir(mode=0o700, exist_ok=True)
    return ["--state-dir", str(STATE_DIR)]


def _nbdserve(image_format: str) -> Callable[[Path, Path], Server]:
    def start(image: Path, directory: Path) -> Server:
        return nbdserve(
            image,
            directory,
            image_format=image_format,
            transports=["unix"],
            options=state_options(),
            command=INSTALLED,
        )

    return start


QEMU = ("qemu threads", "qemu io_uring")
NBDKIT = "nbdkit raw"
NBDSERVE = "nbdserve"

CONTENDERS = (
    Contender(QEMU[0], "qcow2", _qemu("threads")),
    Contender(QEMU[1], "qcow2", _qemu("io_uring")),
    Contender(NBDKIT, "raw", nbdkit_file),
    Contender(NBDSERVE, "qcow2", _nbdserve("qcow2")),
    Contender("nbdserve raw", "raw", _nbdserve("raw")),
)
