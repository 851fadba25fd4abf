"""Boots a guest in QEMU and reads what its init script says on the console.

Software emulation always: it works wherever the tests run, and a boot takes
about three seconds.
"""

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

GUEST_TIMEOUT_S = 150.0
MEMORY_MIB = 256

_SAID = re.compile(r"@@ (\S+) ?(.*)")

COMMAND_LINE = (
    "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on tsc=reliable"
)


@dataclass(frozen=True)
class Guest:
    """What a guest did until it powered off.

    Attributes:
        console: Everything on its serial console.
        said: The "@@ KEY VALUE" lines of its init script.
    """

    console: str
    said: dict[str, str] = field(default_factory=dict)

    def assert_passed(self) -> None:
        """Fail with the guest's console unless its script came to its end."""
        assert "PASS" in self.said, self.console


def boot(
    kernel: Path,
    initramfs: Path,
    *,
    append: str = "",
    drive: str | None = None,
    timeout_s: float = GUEST_TIMEOUT_S,
) -> Guest:
    """Run a guest to its end.

    Args:
        kernel: The compressed kernel.
        initramfs: The compressed archive with the init script.
        append: More words for the kernel's command line.
        drive: The -drive option of its own disk, if it has one.
        timeout_s: When to give up.
    """
    argv = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max"]
    argv += ["-m", str(MEMORY_MIB), "-nodefaults", "-no-user-config", "-no-reboot"]
    argv += ["-display", "none", "-serial", "stdio"]
    argv += ["-kernel", str(kernel), "-initrd", str(initramfs)]
    argv += ["-append", f"{COMMAND_LINE} {append}"]
    argv += ["-netdev", "user,id=net0"]
    argv += ["-device", "virtio-net-pci,netdev=net0,romfile="]
    if drive is not None:
        argv += ["-drive", drive]
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
        output = done.stdout
    except subprocess.TimeoutExpired as expired:
        output = (expired.stdout or b"") + b"\n(the guest did not end in time)"
    console = output.decode(errors="replace").replace("\r", "")
    return Guest(console, dict(_SAID.findall(console)))
