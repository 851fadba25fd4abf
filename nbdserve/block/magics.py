"""The beginnings of image formats, in the first sector of a file."""

from typing import Final

SECTOR: Final = 512

#: Format, and what qemu knows it by: where in the first sector, and the bytes.
MAGICS: Final = (
    ("qcow2", 0, b"QFI\xfb"),
    ("qed", 0, b"QED\0"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vdi", 64, b"\x7f\x10\xda\xbe"),
    ("vpc", 0, b"conectix"),
    ("vhdx", 0, b"vhdxfile"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("luks", 0, b"LUKS\xba\xbe"),
    ("bochs", 0, b"Bochs Virtual HD Image"),
    ("cloop", 0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop"),
)


def looks_like(sector: bytes | bytearray | memoryview) -> str | None:
    """Return the name of the format that a file with this first sector has, if any."""
    for name, where, magic in MAGICS:
        if sector[where : where + len(magic)] == magic:
            return name
    return None
