"""Another version, refcount width or lazy refcounts for a qcow2 image that is not in use.

The header is replaced by writes of sector 0, each of which leaves a whole header; new
refcounts are written beside the old ones. What must come first for version 2 (its
snapshots, zero clusters) the open image does: `Qcow2Image.prepare_version`. Blocking calls.
"""

import os
from dataclasses import dataclass, replace

from nbdserve.errors import ConfigError, ImageCorruptError, ImageError
from nbdserve.formats.check_result import CheckResult
from nbdserve.formats.qcow2.backing_name import plan_header_change, with_data_file
from nbdserve.formats.qcow2.check import read_header
from nbdserve.formats.qcow2.extensions import (
    EXTENSION_BITMAPS,
    EXTENSION_FEATURE_NAMES,
    FEATURE_INCOMPATIBLE,
    FEATURE_NAMES,
    encode_feature_names,
)
from nbdserve.formats.qcow2.header import (
    AUTOCLEAR_BITMAPS,
    AUTOCLEAR_DATA_FILE_RAW,
    COMPATIBLE_LAZY_REFCOUNTS,
    COMPATIBLE_OFFSET,
    CURRENT_LENGTH,
    FIXED_LENGTH,
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
    V2_LENGTH,
    Header,
    encode_u64,
    require_writable,
)
from nbdserve.formats.qcow2.new_refcounts import write_all, write_new_refcounts
from nbdserve.formats.qcow2.rebuild import rebuild_refcounts
from nbdserve.formats.qcow2.snapshot_table import Snapshot
from nbdserve.formats.qcow2.walk import ImageFile, Walk, require_countable
from nbdserve.formats.qcow2.zero_clusters import is_zero_cluster

#: qemu leaves the feature name table out where the first cluster is small.
_MIN_CLUSTER_FOR_NAMES = 8192


@dataclass(frozen=True, slots=True)
class Amendment:
    """What shall be different; None leaves it as it is.

    Attributes:
        version: 2 or 3.
        refcount_bits: 1 to 64, a power of two.
        lazy_refcounts: Whether writers may put refcounts off.
        data_file: Another name of the external data file.
        data_file_raw: False if that need not be a raw image by itself any more.
    """

    version: int | None = None
    refcount_bits: int | None = None
    lazy_refcounts: bool | None = None
    data_file: bytes | None = None
    data_file_raw: bool | None = None

    @property
    def of_the_disk(self) -> bool:
        """Whether anything but what is said of the data file is to change."""
        return (self.version, self.refcount_bits, self.lazy_refcounts) != (None,) * 3


def judge_amendment(
    name: str, header: Header, snapshots: list[Snapshot], wanted: Amendment
) -> None:
    """Refuse what the image can't become.

    Raises:
        ConfigError: The choices contradict each other.
        ImageError: The image uses what version 2 does not have.
    """
    if not header.external_data and (wanted.data_file or wanted.data_file_raw):
        raise ConfigError(
            f"{name}: keeps its data in the image itself; nbdserve image convert makes"
            " another image with a data file"
        )
    if wanted.data_file_raw and not header.raw_data:
        raise ConfigError(
            f"{name}: only new images can have a raw data file: use nbdserve image convert"
        )
    version = wanted.version or header.version
    bits = wanted.refcount_bits or header.refcount_bits
    if version > 2:
        return
    if wanted.lazy_refcounts:
        raise ConfigError(f"{name}: lazy refcounts need version 3")
    if bits != 16:
        raise ConfigError(
            f"{name}: refcounts of version 2 have 16 bits, these {bits}: add"
            " --refcount-bits 16"
        )
    features = header.incompatible_features
    features &= ~(INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT)
    if features:
        used = ", ".join(
            FEATURE_NAMES.get((FEATURE_INCOMPATIBLE, bit), f"bit {bit}")
            for bit in range(64)
            if features >> bit & 1
        )
        raise ImageError(f"{name}: version 2 does not have what it uses: {used}")
    if _has_bitmaps(header):
        raise ImageError(
            f"{name}: version 2 has no persistent bitmaps: remove them first"
        )
    for snapshot in snapshots if header.version > 2 else []:
        if snapshot.vm_state_size or snapshot.disk_size not in (None, header.size):
            shown = snapshot.name.decode("utf-8", "backslashreplace")
            raise ImageError(
                f"{name}: version 2 can't say that snapshot {shown!r} has another size"
                " or VM state: delete it first"
            )


def amend_image(fd: int, name: str, wanted: Amendment) -> None:
    """Change header and refcounts; nobody else may use the image.

    Raises:
        ConfigError: The choices contradict each other.
        ImageError: The image is broken, or can't become that.
        OSError: The file can't be read or written.
    """
    require_writable(read_header(fd))
    if read_header(fd).dirty:
        rebuild_refcounts(fd, name)
    header = read_header(fd)
    walk = Walk(ImageFile(fd), header, CheckResult(filename=name, format="qcow2"))
    require_countable(header, walk.file.size)
    walk.run_without_refcounts()
    judge_amendment(name, header, walk.snapshots, wanted)
    if walk.result.corruptions:
        raise ImageCorruptError(
            f"{name}: {walk.result.messages[0]}; repair it first: nbdserve image check"
            " --repair all"
        )
    if header.version == 2 and wanted.version == 3:
        _replace_header(fd, header, _as_version_3(header))
        header = read_header(fd)
    bits = wanted.refcount_bits or header.refcount_bits
    if bits != header.refcount_bits:
        if header.version == 2:
            raise ConfigError(f"{name}: refcounts of version 2 have 16 bits")
        order = bits.bit_length() - 1
        write_new_refcounts(fd, name, replace(header, refcount_order=order), walk.used)
        header = read_header(fd)
    _set_lazy(fd, header, wanted.lazy_refcounts)
    _set_data_file(fd, wanted)
    if header.version == 3 and wanted.version == 2:
        _require_no_zero_clusters(walk)
        _replace_header(fd, header, _as_version_2(header))


def _has_bitmaps(header: Header) -> bool:
    return bool(
        header.extension(EXTENSION_BITMAPS) is not None
        and header.autoclear_features & AUTOCLEAR_BITMAPS
    )


def _as_version_3(header: Header) -> Header:
    extensions = header.extensions
    if header.cluster_size >= _MIN_CLUSTER_FOR_NAMES:
        extensions += ((EXTENSION_FEATURE_NAMES, encode_feature_names()),)
    return replace(
        header,
        version=3,
        header_length=CURRENT_LENGTH,
        unknown_fields=bytes(CURRENT_LENGTH - FIXED_LENGTH - 1),
        extensions=extensions,
    )


def _as_version_2(header: Header) -> Header:
    dropped = (EXTENSION_FEATURE_NAMES, EXTENSION_BITMAPS)
    return replace(
        header,
        version=2,
        header_length=V2_LENGTH,
        incompatible_features=0,
        compatible_features=0,
        autoclear_features=0,
        unknown_fields=b"",
        extensions=tuple(each for each in header.extensions if each[0] not in dropped),
    )


def _replace_header(fd: int, old: Header, new: Header) -> None:
    cluster = os.pread(fd, old.cluster_size, 0)
    for offset, data in plan_header_change(cluster, old, new):
        write_all(fd, data, offset)
        os.fsync(fd)


def _set_lazy(fd: int, header: Header, lazy: bool | None) -> None:
    if lazy is None or lazy == header.lazy_refcounts or header.version == 2:
        return
    features = header.compatible_features ^ COMPATIBLE_LAZY_REFCOUNTS
    write_all(fd, encode_u64(features), COMPATIBLE_OFFSET)
    os.fsync(fd)


def _set_data_file(fd: int, wanted: Amendment) -> None:
    """Change what the header says of the data file."""
    old = new = read_header(fd)
    if wanted.data_file is not None:
        new = with_data_file(new, wanted.data_file)
    if wanted.data_file_raw is False:
        features = new.autoclear_features & ~AUTOCLEAR_DATA_FILE_RAW
        new = replace(new, autoclear_features=features)
    if new != old:
        _replace_header(fd, old, new)


def _require_no_zero_clusters(walk: Walk) -> None:
    for table in walk.tables:
        words, _ = walk.l2_words(table)
        if any(map(is_zero_cluster, words)):
            raise ImageError(
                f"{walk.result.filename}: has zero clusters, which version 2 does not"
                " know: somebody wrote it meanwhile"
            )
