"""What is known about an image from its header, for `nbdserve image info`.

The fields are those of `qemu-img info --output=json`, under its names. Only the
file itself is read, never its backing file, and no lock is taken: an image that is
being served can be described. Blocking reads, a few kilobytes.
"""

import os
import time
from dataclasses import dataclass, field, replace
from typing import Any

from nbdserve.block.magics import SECTOR
from nbdserve.errors import ImageCorruptError, ImageError, ImageFormatError
from nbdserve.formats.crypto.luks import LENGTH as LUKS_LENGTH
from nbdserve.formats.crypto.luks import KeySlot, parse_luks_header
from nbdserve.formats.header_details import field_text, geometry, header_fields
from nbdserve.formats.probe import format_of
from nbdserve.formats.qcow1 import header as qcow1
from nbdserve.formats.qcow2 import bitmap_directory, extensions
from nbdserve.formats.qcow2 import header as qcow2
from nbdserve.formats.qcow2.snapshot_table import (
    Snapshot,
    most_table_bytes,
    parse_snapshot_table,
)
from nbdserve.storage.descriptors import open_descriptor
from nbdserve.storage.names import shown


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """A description of one image file; sizes are bytes.

    Attributes:
        filename: As the caller gave it.
        format: raw, qcow or qcow2.
        virtual_size: Of the disk.
        actual_size: Storage that the file occupies.
        cluster_size: None for raw.
        dirty: Whether the dirty bit is set.
        encrypted: Whether guest data are encrypted.
        backing_filename: As it is recorded.
        backing_format: As it is recorded.
        snapshots: In the order of the file.
        specific: qemu's "format-specific" data; None where it has none.
        warnings: What could not be read, one line each.
        file_size: Length of the file.
        header: Every field of the header under its name in the specification.
    """

    filename: str
    format: str
    virtual_size: int
    actual_size: int
    cluster_size: int | None = None
    dirty: bool = False
    encrypted: bool = False
    backing_filename: str | None = None
    backing_format: str | None = None
    snapshots: tuple[Snapshot, ...] = ()
    specific: dict[str, Any] | None = None
    warnings: tuple[str, ...] = field(default=())
    file_size: int = 0
    header: dict[str, Any] = field(default_factory=dict)

    @property
    def full_backing_filename(self) -> str | None:
        """The backing name, counted from the image's folder if it is relative."""
        name = self.backing_filename
        if name is None or ":" in name.partition("/")[0]:
            return name
        return os.path.join(os.path.dirname(self.filename), name)

    @property
    def full_data_filename(self) -> str | None:
        """The name of the external data file, counted from the image's folder."""
        name = (self.specific or {}).get("data-file")
        if name is None:
            return None
        return os.path.join(os.path.dirname(self.filename), name)

    def as_json(self) -> dict[str, Any]:
        """Return what `qemu-img info --output=json` prints."""
        shown: dict[str, Any] = {
            "virtual-size": self.virtual_size,
            "filename": self.filename,
            "format": self.format,
            "actual-size": self.actual_size,
            "dirty-flag": self.dirty,
        }
        if self.cluster_size is not None:
            shown["cluster-size"] = self.cluster_size
        if self.encrypted:
            shown["encrypted"] = True
        if self.backing_filename is not None:
            shown["backing-filename"] = self.backing_filename
            shown["full-backing-filename"] = self.full_backing_filename
        if self.backing_format is not None:
            shown["backing-filename-format"] = self.backing_format
        if self.snapshots:
            shown["snapshots"] = self.snapshots_json()
        if self.specific is not None:
            shown["format-specific"] = {"type": self.format, "data": self.specific}
        return shown

    def details_json(self) -> dict[str, Any]:
        """Return what we know beyond what qemu-img prints."""
        return {
            "file-size": self.file_size,
            "geometry": geometry(self.virtual_size)._asdict(),
            "header": self.header,
        }

    def details_text(self) -> str:
        """Return the same for a person, ending in a newline."""
        cylinders, heads, sectors = geometry(self.virtual_size)
        lines = [
            f"file length: {human_size(self.file_size)} ({self.file_size} bytes)",
            f"geometry: {cylinders}/{heads}/{sectors} (cylinders/heads/sectors)",
        ]
        if self.header:
            lines.append("Header:")
        for name, value in self.header.items():
            lines.append(f"    {name}: {field_text(name, value)}".rstrip())
        return "\n".join(lines) + "\n"

    def snapshots_json(self) -> list[dict[str, Any]]:
        """Return what `qemu-img info --output=json` prints of snapshots."""
        return [snapshot_json(each) for each in self.snapshots]

    def snapshots_text(self) -> str:
        """Return what `qemu-img snapshot -l` prints: nothing, if there are none."""
        lines = self._snapshot_lines()
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "".join(f"{line}\n" for line in lines)

    def _snapshot_lines(self) -> list[str]:
        if not self.snapshots:
            return []
        listed = [snapshot_text(each) for each in self.snapshots]
        return ["Snapshot list:", _SNAPSHOT_HEADING, *listed]

    def as_text(self) -> str:
        """Return what `qemu-img info` prints, ending in a newline."""
        lines = [
            f"image: {self.filename}",
            f"file format: {self.format}",
            f"virtual size: {human_size(self.virtual_size)} ({self.virtual_size} bytes)",
            f"disk size: {human_size(self.actual_size)}",
        ]
        if self.encrypted:
            lines.append("encrypted: yes")
        if self.cluster_size is not None:
            lines.append(f"cluster_size: {self.cluster_size}")
        if self.dirty:
            lines.append("cleanly shut down: no")
        if self.backing_filename is not None:
            full = self.full_backing_filename
            actual = "" if full == self.backing_filename else f" (actual path: {full})"
            lines.append(f"backing file: {self.backing_filename}{actual}")
        if self.backing_format is not None:
            lines.append(f"backing file format: {self.backing_format}")
        lines += self._snapshot_lines()
        if self.specific is not None:
            lines.append("Format specific information:")
            lines += _specific_text(self.specific, 1)
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines) + "\n"


def image_info(path: str | os.PathLike[str], *, format: str | None = None) -> ImageInfo:  # noqa: A002 - what everybody calls it
    """Describe an image file.

    Args:
        path: The file, or a block device.
        format: raw, qcow or qcow2; None tells it as `format_of` does.

    Raises:
        ConfigError: There is no such file, or no permission.
        ImageError: The header is broken, or it is not of that format.
        OSError: The file can't be read.
    """
    path = os.fspath(path)
    fd = open_descriptor(path, os.O_RDONLY)
    try:
        status = os.fstat(fd)
        size = os.lseek(fd, 0, os.SEEK_END)
        start = os.pread(fd, SECTOR, 0)
        raw = ImageInfo(
            filename=path,
            format="raw",
            virtual_size=size,
            actual_size=status.st_blocks * 512,
            file_size=size,
        )
        if format == "raw":
            return raw
        found = format_of(start, shown(path))
        if format not in (None, found):
            raise ImageFormatError(f"{path}: is {found}, not {format}")
        if found == "raw":
            return raw
        describe = _qcow1_info if found == "qcow" else _qcow2_info
        try:
            return describe(fd, start, size, raw)
        except ImageError as error:
            raise type(error)(f"{path}: {error}") from error
    finally:
        os.close(fd)


def _qcow1_info(fd: int, start: bytes, size: int, raw: ImageInfo) -> ImageInfo:
    data = _at_least(fd, start, min(size, qcow1.header_bytes_needed(start)))
    header = qcow1.parse_header(data, size)
    return replace(
        raw,
        format="qcow",
        virtual_size=header.disk_size,
        cluster_size=header.cluster_size,
        encrypted=header.crypt_method != qcow1.CRYPT_NONE,
        backing_filename=_text(header.backing_name),
        header=header_fields(header),
    )


def _qcow2_info(fd: int, start: bytes, size: int, raw: ImageInfo) -> ImageInfo:
    data = _at_least(fd, start, min(size, qcow2.header_bytes_needed(start)))
    header = qcow2.parse_header(data, size)
    warnings: list[str] = []
    snapshots: list[Snapshot] = []
    if header.nb_snapshots:
        most = most_table_bytes(header.nb_snapshots)
        length = min(most, size - header.snapshots_offset)
        table = _read(fd, header.snapshots_offset, length)
        try:
            snapshots, _ = parse_snapshot_table(table, header.nb_snapshots)
        except ImageCorruptError as error:
            warnings.append(str(error))
    bitmaps: list[dict[str, Any]] = []
    try:
        bitmaps = _bitmaps(fd, header)
    except ImageCorruptError as error:
        warnings.append(str(error))
    encryption: dict[str, Any] = {}
    try:
        encryption = _encryption(fd, header)
    except ImageError as error:
        warnings.append(str(error))
    return replace(
        raw,
        format="qcow2",
        virtual_size=header.disk_size,
        cluster_size=header.cluster_size,
        dirty=header.dirty,
        encrypted=header.crypt_method != qcow2.CRYPT_NONE,
        backing_filename=_text(header.backing_name),
        header=header_fields(header),
        backing_format=header.backing_format if header.backing_name else None,
        snapshots=tuple(snapshots),
        specific=_specific(header, bitmaps, encryption),
        warnings=tuple(warnings),
    )


def _specific(
    header: qcow2.Header, bitmaps: list[dict[str, Any]], encryption: dict[str, Any]
) -> dict[str, Any]:
    """Return the format-specific data, in qemu's order."""
    zstd = header.compression_type == qcow2.COMPRESSION_ZSTD
    specific: dict[str, Any] = {
        "compat": header.compat,
        "compression-type": "zstd" if zstd else "zlib",
    }
    if header.version > 2:
        specific["lazy-refcounts"] = header.lazy_refcounts
    if bitmaps:
        specific["bitmaps"] = bitmaps
    specific["refcount-bits"] = header.refcount_bits
    if header.crypt_method != qcow2.CRYPT_NONE:
        method = "aes" if header.crypt_method == qcow2.CRYPT_AES else "luks"
        specific["encrypt"] = encryption or {"format": method}
    if header.external_data:
        if header.data_file_name is not None:
            specific["data-file"] = header.data_file_name
        specific["data-file-raw"] = bool(
            header.autoclear_features & qcow2.AUTOCLEAR_DATA_FILE_RAW
        )
    if header.version > 2:
        specific["corrupt"] = header.corrupt
        specific["extended-l2"] = header.extended_l2
    return specific


def _encryption(fd: int, header: qcow2.Header) -> dict[str, Any]:
    """Describe the LUKS header, if there is one, without opening it."""
    if header.luks is None:
        return {}
    host_offset, length = header.luks
    luks = parse_luks_header(_read(fd, host_offset, LUKS_LENGTH), length)
    cipher = luks.cipher
    # what it has no words for, it says nothing about
    details = {
        "ivgen-alg": cipher.iv_generator or "plain64",
        "hash-alg": luks.hash_name,
        "cipher-alg": cipher.algorithm,
        "uuid": luks.uuid,
        "ivgen-hash-alg": cipher.iv_hash,
        "format": "luks",
        "cipher-mode": cipher.mode,
    }
    return {
        **{name: text for name, text in details.items() if text},
        "slots": [_key_slot(slot) for slot in luks.slots],
        "payload-offset": luks.length,
        "master-key-iters": luks.digest_iterations,
    }


def _key_slot(slot: KeySlot) -> dict[str, Any]:
    shown: dict[str, Any] = {"active": slot.active}
    if slot.active:
        shown["iters"] = slot.iterations
    shown["key-offset"] = slot.offset
    if slot.active:
        shown["stripes"] = slot.stripes
    return shown


def _bitmaps(fd: int, header: qcow2.Header) -> list[dict[str, Any]]:
    data = header.extension(extensions.EXTENSION_BITMAPS)
    if data is None or not header.autoclear_features & qcow2.AUTOCLEAR_BITMAPS:
        return []
    where = extensions.parse_bitmaps_extension(data, header.cluster_bits)
    directory = _read(fd, where.directory_offset, where.directory_size)
    flags = {
        bitmap_directory.FLAG_IN_USE: "in-use",
        bitmap_directory.FLAG_AUTO: "auto",
    }
    return [
        {
            "flags": [name for bit, name in flags.items() if bitmap.flags & bit],
            "name": _text(bitmap.name),
            "granularity": 1 << bitmap.granularity_bits,
        }
        for bitmap in bitmap_directory.parse_bitmap_directory(
            directory, where.nb_bitmaps
        )
    ]


def _at_least(fd: int, start: bytes, length: int) -> bytes:
    return start if len(start) >= length else _read(fd, 0, length)


def _read(fd: int, offset: int, length: int) -> bytes:
    parts = []
    while length > 0:
        data = os.pread(fd, length, offset)
        if not data:
            break
        parts.append(data)
        offset += len(data)
        length -= len(data)
    return b"".join(parts)


def _text(name: bytes | None) -> str | None:
    return None if name is None else name.decode("utf-8", "backslashreplace")


def human_size(size: int) -> str:
    """Write a size as qemu-img does: three digits and a unit, `1.95 MiB`."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        # qemu changes units at 1000, so that three digits are enough.
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1024
    return f"{amount:.3g} EiB"


_SNAPSHOT_FORMAT = "{:<9} {:<16} {:>8}{:>20}{:>13}{:>11}"
_SNAPSHOT_HEADING = _SNAPSHOT_FORMAT.format(
    "ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT"
)


def snapshot_json(snapshot: Snapshot) -> dict[str, Any]:
    """Return what `qemu-img info --output=json` prints of a snapshot."""
    seconds, nanoseconds = divmod(snapshot.vm_clock_nsec, 10**9)
    shown: dict[str, Any] = {
        "id": _text(snapshot.id),
        "name": _text(snapshot.name),
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date_sec,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-sec": seconds,
        "vm-clock-nsec": nanoseconds,
    }
    if snapshot.icount is not None:
        shown["icount"] = snapshot.icount
    return shown


def snapshot_text(snapshot: Snapshot) -> str:
    """Return the line that `qemu-img snapshot -l` prints of a snapshot."""
    seconds, nanoseconds = divmod(snapshot.vm_clock_nsec, 10**9)
    clock = (
        f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        f".{nanoseconds // 10**6:03}"
    )
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot.date_sec))
    return _SNAPSHOT_FORMAT.format(
        _text(snapshot.id) or "",
        _text(snapshot.name) or "",
        human_size(snapshot.vm_state_size),
        date,
        clock,
        "" if snapshot.icount is None else snapshot.icount,
    )


def _specific_text(value: dict[str, Any], depth: int) -> list[str]:
    lines: list[str] = []
    indent = "    " * depth
    for name, item in value.items():
        label = f"{indent}{name.replace('-', ' ')}:"
        if isinstance(item, dict):
            lines += [label, *_specific_text(item, depth + 1)]
        elif isinstance(item, list):
            lines.append(label)
            for index, element in enumerate(item):
                if isinstance(element, dict):
                    lines.append(f"{indent}    [{index}]:")
                    lines += _specific_text(element, depth + 2)
                else:
                    lines.append(f"{indent}    [{index}]: {element}")
        elif isinstance(item, bool):
            lines.append(f"{label} {str(item).lower()}")
        else:
            lines.append(f"{label} {item}")
    return lines
