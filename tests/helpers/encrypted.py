"""Encrypted images, and qemu's tools with their passphrase."""

import time
from pathlib import Path

from nbdserve.formats.create import create_image
from nbdserve.formats.crypto.new_luks import NewLuks, new_luks
from nbdserve.formats.crypto.secret import Secret
from tests.helpers.tools import run

PASSPHRASE = b"correct horse"
#: How long a tool may find others using the processor.
PATIENCE_S = 30.0


def quick_luks(cipher: str = "aes-256", passphrase: bytes = PASSPHRASE) -> NewLuks:
    """A LUKS header that opens at once."""
    return new_luks(Secret(passphrase), cipher=cipher, iter_time_ms=1)


def create_luks(
    path: Path,
    size: int,
    *,
    compat: int = 3,
    cluster_size: int = 65536,
    extended_l2: bool = False,
) -> None:
    """Make a LUKS image, ours."""
    create_image(
        path,
        size,
        cluster_size=cluster_size,
        compat=compat,
        extended_l2=extended_l2,
        encryption=quick_luks(),
    )


def secret_file(folder: Path, passphrase: bytes = PASSPHRASE) -> Path:
    path = folder / f"secret-{passphrase.hex()}"
    path.write_bytes(passphrase)
    return path


def patiently(*words: str | Path) -> str:
    """Run a tool that times its key derivation, and gives up where others use the processor."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            return run(*words)
        except AssertionError as error:
            late = time.monotonic() > deadline_s
            if "accurate CPU usage" not in str(error) or late:
                raise
        time.sleep(0.2)


class Qemu:
    """qemu's tools for one encrypted image."""

    def __init__(
        self, path: Path, *, image_format: str = "qcow2", passphrase: bytes = PASSPHRASE
    ) -> None:
        self.path = path
        self.format = image_format
        self._secret = secret_file(path.parent, passphrase)

    @property
    def object(self) -> list[str]:
        return ["--object", f"secret,id=s,file={self._secret}"]

    @property
    def options(self) -> str:
        return f"driver={self.format},file.filename={self.path},encrypt.key-secret=s"

    def create(self, size: int, encryption: str, options: str = "") -> None:
        """Make it, in place of what failed before."""
        words = ["qemu-img", "create", "-q", "-f", self.format, *self.object, "-o"]
        chosen = f"encrypt.format={encryption},encrypt.key-secret=s"
        if encryption == "luks":
            chosen += ",encrypt.iter-time=10"
        chosen += f",{options}" if options else ""
        self.path.unlink(missing_ok=True)
        patiently(*words, chosen, self.path, str(size))

    def amend(self, *options: str) -> None:
        """Change key slots."""
        words = ["qemu-img", "amend", *self.object]
        patiently(*words, *options, "--image-opts", self.options)

    def io(self, *commands: str) -> str:
        """Run commands of qemu-io."""
        words = [word for command in commands for word in ("-c", command)]
        return run("qemu-io", *self.object, *words, "--image-opts", self.options)

    def check(self) -> None:
        """Neither corruptions nor leaks."""
        run("qemu-img", "check", *self.object, "--image-opts", self.options)

    def content(self) -> bytes:
        """All of the disk."""
        raw = self.path.with_suffix(".content")
        source = ["--image-opts", self.options]
        run("qemu-img", "convert", *self.object, *source, "-O", "raw", raw)
        data = raw.read_bytes()
        raw.unlink()
        return data
