"""Debian's cloud kernel for the guests of these tests, unpacked but not installed.

The package is fetched with apt on first use and kept in the user's cache, so that
a second run needs no network. By hand: ``python3 -m tests.vm.kernel``.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# A metapackage; the kernel itself is the package that it depends on.
METAPACKAGE = "linux-image-cloud-amd64"
FETCH_TIMEOUT_S = 120.0


class KernelMissingError(Exception):
    """There is no kernel to boot; the text is one line that says what to run."""


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel package.

    Attributes:
        image: The compressed kernel that QEMU boots.
        modules: The folder that depmod would work on.
    """

    image: Path
    modules: Path


def cache_directory() -> Path:
    """Where the unpacked package lives between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nbdserve-tests" / "kernel"


def find_kernel() -> Kernel:
    """The kernel in the cache, fetched if it is not there yet.

    Raises:
        KernelMissingError: It is not there and could not be fetched.
    """
    root = cache_directory()
    kernel = _unpacked(root)
    if kernel is None:
        try:
            _fetch(root)
        except (OSError, subprocess.SubprocessError) as error:
            raise KernelMissingError(
                f"no kernel in {root} and apt could not fetch it ({error}); run: "
                f"apt-get update && python3 -m tests.vm.kernel"
            ) from None
        kernel = _unpacked(root)
    if kernel is None:
        raise KernelMissingError(
            f"{root} has no kernel; run: rm -r {root} && python3 -m tests.vm.kernel"
        )
    return kernel


def _unpacked(root: Path) -> Kernel | None:
    images = sorted(root.glob("boot/vmlinuz-*"))
    modules = sorted(root.glob("lib/modules/*")) + sorted(
        root.glob("usr/lib/modules/*")
    )
    return Kernel(images[-1], modules[-1]) if images and modules else None


def _fetch(root: Path) -> None:
    """Download the package that METAPACKAGE depends on and unpack it to `root`."""
    listed = _run("apt-cache", "depends", "--important", METAPACKAGE)
    packages = [
        line.split()[1]
        for line in listed.splitlines()
        if line.split()[0] == "Depends:" and "linux-image" in line
    ]
    if not packages:
        raise FileNotFoundError(f"apt knows no dependency of {METAPACKAGE}")
    root.parent.mkdir(parents=True, exist_ok=True)
    # Unpacked beside its place and renamed: two runs at once do no harm.
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        _run("apt-get", "download", packages[0], cwd=Path(scratch))
        (package,) = Path(scratch).glob("*.deb")
        unpacked = Path(scratch) / "unpacked"
        _run("dpkg-deb", "-x", str(package), str(unpacked))
        try:
            unpacked.rename(root)
        except OSError:
            if _unpacked(root) is None:
                raise


def _run(*argv: str, cwd: Path | None = None) -> str:
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=FETCH_TIMEOUT_S,
        cwd=cwd,
        check=True,
    )
    return done.stdout


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{find_kernel().image}\n")
    except KernelMissingError as error:
        sys.exit(str(error))
