"""A small root file system for guests: busybox, nbd-client, ext4's tools, modules.

Written without cpio, depmod or root: the archive's format is a header and the
bytes ("newc", Documentation/driver-api/early-userspace/buffer-format.rst of
Linux), and a module names its dependencies itself.
"""

import gzip
import lzma
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.helpers.tools import run
from tests.vm.kernel import Kernel

BUSYBOX = "/bin/busybox"
PROGRAMS = ("/usr/sbin/nbd-client", "/sbin/mke2fs", "/sbin/e2fsck")
MODULES = ("virtio_pci", "virtio_net", "virtio_blk", "nbd", "ext4", "crc32c_generic")
#: What all scripts source first.
START = Path(__file__).with_name("start.sh")
FOLDERS = ("proc", "sys", "dev", "mnt", "tmp", "bin", "sbin", "lib/modules")

CONSOLE_DEVICE = (5, 1)

_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")
_LIBRARY = re.compile(r"(?:=> )?(/\S+) \(0x")


class Archive:
    """A cpio archive in the making; folders appear as they are needed."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._names: set[str] = set()

    def folder(self, path: str) -> None:
        """Add a folder and those above it."""
        for parent in [*reversed(Path(path).parents), Path(path)]:
            if parent != Path("."):
                self._entry(str(parent), stat.S_IFDIR | 0o755)

    def file(self, path: str, content: bytes, mode: int = 0o755) -> None:
        """Add a regular file."""
        self.folder(str(Path(path).parent))
        self._entry(path, stat.S_IFREG | mode, content)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self.folder(str(Path(path).parent))
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int) -> None:
        """Add a device node."""
        self.folder(str(Path(path).parent))
        self._entry(path, stat.S_IFCHR | 0o600, device=(major, minor))

    def finish(self) -> bytes:
        """The archive, compressed as the kernel takes it."""
        self._entry("TRAILER!!!", 0)
        return gzip.compress(bytes(self._bytes), compresslevel=1)

    def _entry(
        self,
        path: str,
        mode: int,
        content: bytes = b"",
        device: tuple[int, int] = (0, 0),
    ) -> None:
        if path in self._names:
            return
        self._names.add(path)
        name = path.encode() + b"\0"
        inode = len(self._names)
        # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor
        # namesize check
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name), 0)
        self._bytes += b"070701" + b"".join(b"%08X" % value for value in fields)
        for part in (name, content):
            self._bytes += part
            self._bytes += bytes(-len(self._bytes) % 4)


def build_initramfs(
    kernel: Kernel, init: str, files: Mapping[str, str] | None = None
) -> bytes:
    """The compressed archive of a guest that runs the shell script `init`.

    Args:
        kernel: What the modules are for.
        init: The script.
        files: More files: path without the first slash, and content.
    """
    archive = Archive()
    for folder in FOLDERS:
        archive.folder(folder)
    archive.character_device("dev/console", *CONSOLE_DEVICE)
    archive.file("bin/busybox", Path(BUSYBOX).read_bytes())
    archive.symlink("bin/sh", "busybox")
    for program in PROGRAMS:
        archive.file(f"sbin/{Path(program).name}", Path(program).read_bytes())
        for library in shared_libraries(program):
            archive.file(library.lstrip("/"), Path(library).read_bytes())
    order = load_order(kernel.modules, MODULES)
    for module in order:
        archive.file(f"lib/modules/{module_name(module)}", read_module(module))
    names = "\n".join(module_name(module) for module in order)
    archive.file("lib/modules/order", f"{names}\n".encode())
    archive.file("start.sh", START.read_bytes())
    archive.file("init", init.encode())
    for path, content in (files or {}).items():
        archive.file(path, content.encode())
    return archive.finish()


def shared_libraries(program: str) -> list[str]:
    """What the dynamic linker would load for `program`, itself included."""
    return _LIBRARY.findall(run("ldd", program))


def module_name(module: Path) -> str:
    """A module's name as the kernel prints it."""
    return module.name.partition(".ko")[0].replace("-", "_")


def read_module(module: Path) -> bytes:
    """A module's ELF file, whatever way the package compressed it."""
    content = module.read_bytes()
    return lzma.decompress(content) if module.suffix == ".xz" else content


def load_order(modules: Path, wanted: tuple[str, ...]) -> list[Path]:
    """The files of `wanted` and all that they depend on, dependencies first."""
    files = {module_name(path): path for path in modules.rglob("*.ko*")}
    builtin = {
        module_name(Path(line))
        for line in (modules / "modules.builtin").read_text().splitlines()
    }

    def visit(name: str) -> Iterator[Path]:
        if name in builtin:
            return
        depends = _DEPENDS.search(read_module(files[name]))
        if depends is not None and depends[1]:
            for dependency in depends[1].decode().split(","):
                yield from visit(dependency.replace("-", "_"))
        yield files[name]

    return list(dict.fromkeys(path for name in wanted for path in visit(name)))
