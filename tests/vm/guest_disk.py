"""A disk for a guest with this Python, this server and qemu-nbd, at the paths they have here.

Only what is really loaded is in there: a server is run once, and says which modules
it has. Written by mke2fs, so no root is needed.
"""

import json
import py_compile
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from tests.helpers.servers import ROOT
from tests.helpers.tools import run
from tests.vm.initramfs import shared_libraries

#: Runs `nbdserve-qemu-nbd`, then says what it has loaded.
_TRACED = """
import json, sys
import nbdserve.server.kernel, nbdserve.server.netlink
from nbdserve.cli.qemu_nbd import main
main(sys.argv[2:])
found = [
    (module.__file__, getattr(module.__spec__, "cached", None))
    for module in list(sys.modules.values())
    if getattr(module, "__file__", None)
]
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
"""
TIMEOUT_S = 60.0
DISK_SIZE = 256 << 20

PYTHON = Path(sys.executable).resolve()
#: How the guest starts it; with the folders in which the modules are.
COMMAND = (
    f"PYTHONPATH={':'.join(path for path in (str(ROOT), *sys.path) if path)}"
    f" {PYTHON} -S -c 'import sys; from nbdserve.cli.qemu_nbd import main;"
    " sys.exit(main())'"
)


def build_disk(folder: Path, image: Path) -> Path:
    """A file system with everything, and a copy of `image` as /image.qcow2.

    Args:
        folder: Empty; the disk is made in there.
        image: What is to be served, and is used for the trial as well.
    """
    root = folder / "root"
    for name in ("proc", "sys", "dev", "tmp", "run", "var/lock"):
        (root / name).mkdir(parents=True)
    shutil.copy(image, root / "image.qcow2")
    files = {str(PYTHON), shutil.which("qemu-nbd") or ""}
    for source, compiled in _loaded(folder, image):
        files.add(source)
        if source.endswith(".py") and compiled is not None:
            # compiling takes a guest seconds; this is valid as long as the file is
            py_compile.compile(source, f"{root}{compiled}", doraise=True)
    binaries = [path for path in files if not path.endswith(".py")]
    for path in files.union(*map(shared_libraries, binaries)):
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    disk = folder / "disk.ext4"
    blocks = f"{DISK_SIZE >> 10}k"
    run("/sbin/mke2fs", "-q", "-t", "ext4", "-d", root, disk, blocks)
    shutil.rmtree(root)
    return disk


def image_of(disk: Path, target: Path) -> Path:
    """What became of /image.qcow2."""
    run("/sbin/debugfs", "-R", f"dump /image.qcow2 {target}", disk)
    return target


def _loaded(folder: Path, image: Path) -> list[tuple[str, str | None]]:
    """Files and compiled files of the modules of a server that has served a client."""
    said, socket = folder / "modules.json", folder / "nbd.sock"
    copy = Path(shutil.copy(image, folder / "trial.qcow2"))
    argv = [sys.executable, "-c", _TRACED, said, "-t", "-k", socket, "-fqcow2"]
    argv += ["--pid-file", folder / "pid", copy]
    with subprocess.Popen([str(word) for word in argv], cwd=ROOT) as server:
        try:
            uri = f"nbd+unix:///?socket={socket}"
            for _ in range(100):
                if socket.exists() or server.poll() is not None:
                    break
                signal.sigtimedwait([], 0.1)
            run("qemu-io", "-f", "raw", "-c", "write 0 1M", "-c", "flush", uri)
            server.send_signal(signal.SIGTERM)
            assert server.wait(TIMEOUT_S) == 0
        finally:
            if server.poll() is None:
                server.kill()
    modules: list[tuple[str, str | None]] = json.loads(said.read_text())
    return modules
