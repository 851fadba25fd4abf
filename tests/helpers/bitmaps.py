"""What the persistent bitmaps of an image say, as others see them."""

import json
from pathlib import Path
from typing import Any

from tests.helpers.servers import Server, qemu_nbd
from tests.helpers.tools import run

#: Offset and length in bytes.
Ranges = list[tuple[int, int]]


def qemu_bitmaps(path: Path) -> dict[str, dict[str, Any]]:
    """Return what qemu-img info says of each bitmap, by name."""
    info = json.loads(run("qemu-img", "info", "-U", "--output=json", path))
    listed = info["format-specific"]["data"].get("bitmaps", [])
    return {each["name"]: each for each in listed}


def served(server: Server, name: str) -> Ranges:
    """Return the dirty ranges of a bitmap that a server exports."""
    context = f"--map=qemu:dirty-bitmap:{name}"
    result: Ranges = []
    for each in json.loads(run("nbdinfo", context, "--json", server.uri("unix"))):
        offset, length = each["offset"], each["length"]
        if each["type"] == 0:
            continue
        if result and sum(result[-1]) == offset:
            offset, length = result[-1][0], result.pop()[1] + length
        result.append((offset, length))
    return result


def seen_by_qemu(path: Path, name: str, folder: Path) -> Ranges:
    """Return the dirty ranges of a bitmap as qemu-nbd exports it."""
    with qemu_nbd(
        path, folder, image_format="qcow2", options=["-B", name, "--read-only"]
    ) as server:
        return served(server, name)
