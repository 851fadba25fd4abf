"""Writing a new qcow2 image into an empty file.

The file is laid out front to back: header, refcount table, refcount blocks, L1
table, and with preallocation L2 tables and data. Fields, extensions and limits
are those of `qemu-img create`. Blocking calls: made by the command line or in
a thread.
"""

import errno
import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nbdserve.errors import ConfigError, ImageFormatError
from nbdserve.formats.crypto.new_luks import NewLuks
from nbdserve.formats.mapped import subclusters
from nbdserve.formats.mapped.tables import encode_entries, encode_words
from nbdserve.formats.preallocation import MODES, take_space
from nbdserve.formats.qcow2.extensions import (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_DATA_FILE,
    EXTENSION_FEATURE_NAMES,
    EXTENSION_LUKS,
    Extensions,
    encode_feature_names,
    encode_luks_extension,
)
from nbdserve.formats.qcow2.header import (
    AUTOCLEAR_DATA_FILE_RAW,
    COMPATIBLE_LAZY_REFCOUNTS,
    CRYPT_LUKS,
    CRYPT_NONE,
    CURRENT_LENGTH,
    INCOMPATIBLE_DATA_FILE,
    INCOMPATIBLE_EXTENDED_L2,
    MAX_BACKING_NAME,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_L2_CLUSTER_BITS,
    V2_LENGTH,
    Header,
    encode_header,
    l1_entries_for,
)

DEFAULT_CLUSTER_SIZE = 65536
#: qemu writes the feature name table only where clusters are larger than this.
_NO_FEATURE_NAMES_UP_TO = 4096
_COPIED = 1 << 63
#: Bytes of tables that are put together at a time.
_BATCH = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What can be chosen about a new image.

    Attributes:
        cluster_size: Bytes, a power of two from 512 to 2 MiB.
        version: 2 or 3.
        refcount_bits: A power of two from 1 to 64; 16 for version 2.
        backing_name: As it shall be stored.
        backing_format: Its format.
        preallocation: Whether every cluster of the disk gets its place, and how much
            of the space is taken; see `preallocation.MODES`.
        extended_l2: Whether clusters, of 16 KiB at least, have subclusters.
        data_name: Name of an external data file, as it shall be stored.
        data_raw: Whether that is to be a raw image by itself; then every
            cluster gets its place as well.
        lazy_refcounts: Whether writers may put refcounts off.
        encryption: The LUKS header that it gets, if guest data are to be encrypted.
    """

    cluster_size: int = DEFAULT_CLUSTER_SIZE
    version: int = 3
    refcount_bits: int = 16
    backing_name: bytes | None = None
    backing_format: str | None = None
    preallocation: str = "off"
    extended_l2: bool = False
    data_name: bytes | None = None
    data_raw: bool = False
    lazy_refcounts: bool = False
    encryption: NewLuks | None = None

    def __post_init__(self) -> None:
        """Judge every choice.

        Raises:
            ConfigError: Names what is allowed.
        """
        allowed = [1 << bits for bits in range(MIN_CLUSTER_BITS, MAX_CLUSTER_BITS + 1)]
        if self.cluster_size not in allowed:
            raise ConfigError(
                f"cluster size {self.cluster_size}: must be a power of two from 512 to"
                " 2097152 (2M)"
            )
        if self.version not in (2, 3):
            raise ConfigError(f"compat {self.version}: must be 2 or 3")
        if self.refcount_bits not in (1, 2, 4, 8, 16, 32, 64):
            raise ConfigError(
                f"refcount bits {self.refcount_bits}: must be 1, 2, 4, 8, 16, 32 or 64"
            )
        self._judge_version()
        if self.extended_l2 and self.cluster_size < 1 << MIN_EXTENDED_L2_CLUSTER_BITS:
            raise ConfigError(
                f"cluster size {self.cluster_size}: with extended L2 entries at least"
                f" {1 << MIN_EXTENDED_L2_CLUSTER_BITS} (16K)"
            )
        self._judge_preallocation()
        self._judge_encryption()
        if self.backing_name is not None and self.data_raw:
            raise ConfigError(
                "a raw data file is all of the disk, so there can't be a backing file"
            )
        if self.backing_name is not None and self.maps_all:
            raise ConfigError(
                "preallocation hides the backing file: choose one of the two"
            )
        if len(self.backing_name or b"") > MAX_BACKING_NAME:
            raise ConfigError(
                f"the backing file name has {len(self.backing_name or b'')} bytes: at"
                f" most {MAX_BACKING_NAME}"
            )

    def _judge_encryption(self) -> None:
        if self.encryption is None:
            return
        if self.data_name is not None:
            raise ConfigError(
                "an external data file is not encrypted: choose one of the two"
            )
        if self.maps_all:
            raise ConfigError(
                "preallocated clusters of an encrypted image would read as noise: choose"
                " one of encryption and preallocation"
            )

    def _judge_preallocation(self) -> None:
        if self.preallocation not in MODES:
            raise ConfigError(
                f"preallocation {self.preallocation!r}: must be one of"
                f" {', '.join(MODES)}"
            )
        if self.data_raw and self.data_name is None:
            raise ConfigError("a raw data file needs a data file")

    def _judge_version(self) -> None:
        if self.version == 2 and self.refcount_bits != 16:
            raise ConfigError(
                f"refcount bits {self.refcount_bits}: version 2 has 16, others need"
                " compat 3"
            )
        for wanted, what in (
            (self.extended_l2, "extended L2 entries need"),
            (self.lazy_refcounts, "lazy refcounts need"),
            (self.data_name is not None, "an external data file needs"),
        ):
            if wanted and self.version < 3:
                raise ConfigError(f"{what} compat 3")

    @property
    def maps_all(self) -> bool:
        """Whether every cluster of the disk has its place from the beginning."""
        return self.preallocation != "off" or self.data_raw

    def features(self) -> tuple[int, int, int]:
        """Return the incompatible, compatible and autoclear features."""
        incompatible = INCOMPATIBLE_EXTENDED_L2 if self.extended_l2 else 0
        if self.data_name is not None:
            incompatible |= INCOMPATIBLE_DATA_FILE
        return (
            incompatible,
            COMPATIBLE_LAZY_REFCOUNTS if self.lazy_refcounts else 0,
            AUTOCLEAR_DATA_FILE_RAW if self.data_raw else 0,
        )

    def extensions(self, luks_offset: int) -> Extensions:
        """Return the header extensions, in the order of qemu.

        Args:
            luks_offset: Where the LUKS header lies, if there is one.
        """
        found: list[tuple[int, bytes]] = []
        if self.backing_format is not None:
            found.append((EXTENSION_BACKING_FORMAT, self.backing_format.encode()))
        if self.data_name is not None:
            found.append((EXTENSION_DATA_FILE, self.data_name))
        if self.encryption is not None:
            luks = encode_luks_extension(luks_offset, self.encryption.length)
            found.append((EXTENSION_LUKS, luks))
        if self.version > 2 and self.cluster_size > _NO_FEATURE_NAMES_UP_TO:
            found.append((EXTENSION_FEATURE_NAMES, encode_feature_names()))
        return tuple(found)

    @property
    def l2_entries(self) -> int:
        """Entries of an L2 table."""
        return self.cluster_size // (16 if self.extended_l2 else 8)

    def l1_entries(self, size: int) -> int:
        """Return how many L1 entries map `size` bytes of disk.

        Raises:
            ConfigError: More than an L1 table can have.
        """
        bits = self.cluster_size.bit_length() - 1
        entries = l1_entries_for(size, bits, extended=self.extended_l2)
        if entries * 8 > MAX_L1_BYTES:
            limit = MAX_L1_BYTES // 8 * self.l2_entries * self.cluster_size
            raise ConfigError(
                f"{size} bytes are too many for clusters of {self.cluster_size} bytes:"
                f" at most {limit}; take larger clusters"
            )
        return entries


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where things lie, in clusters, one after the other behind the header.

    `mapped` clusters have an entry; they are the `data`, or lie in the data file.
    """

    refcount_table: int
    refcount_blocks: int
    l1: int
    luks: int
    l2: int
    data: int
    mapped: int

    @property
    def before_luks(self) -> int:
        return 1 + self.refcount_table + self.refcount_blocks + self.l1

    @property
    def metadata(self) -> int:
        return self.before_luks + self.luks + self.l2

    @property
    def total(self) -> int:
        return self.metadata + self.data


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def _lay_out(size: int, options: Options) -> _Layout:
    cluster_size = options.cluster_size
    l1_entries = options.l1_entries(size)
    l1 = _ceil_div(l1_entries * 8, cluster_size)
    l2 = l1_entries if options.maps_all else 0
    mapped = _ceil_div(size, cluster_size) if options.maps_all else 0
    data = mapped if options.data_name is None else 0
    luks = (
        _ceil_div(options.encryption.length, cluster_size) if options.encryption else 0
    )
    block_entries = cluster_size * 8 // options.refcount_bits
    table = blocks = 1
    # Both cover themselves too: repeat until nothing grows.
    while True:
        layout = _Layout(table, blocks, l1, luks, l2, data, mapped)
        blocks = _ceil_div(layout.total, block_entries)
        table = _ceil_div(blocks * 8, cluster_size)
        if (table, blocks) == (layout.refcount_table, layout.refcount_blocks):
            break
    if table * cluster_size > MAX_REFCOUNT_TABLE_BYTES:
        raise ConfigError(
            f"{size} bytes can't be preallocated with clusters of {cluster_size} bytes:"
            " the refcount table would be too large; take larger clusters"
        )
    return layout


def write_image(
    fd: int,
    size: int,
    options: Options,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a new image into an empty file; the caller syncs it.

    An external data file is the caller's as well.

    Args:
        fd: Open for writing.
        size: Bytes of the disk, rounded up to 512 as qemu does.
        options: The rest.
        progress: Told how many bytes of data are preallocated.

    Raises:
        ConfigError: The size does not fit the cluster size, or the backing
            name the first cluster.
        OSError: The file can't be written, or has no room.
    """
    size = _ceil_div(size, 512) * 512
    layout = _lay_out(size, options)
    cluster_size = options.cluster_size
    header = _header(size, options, layout)
    try:
        encoded = encode_header(header)
    except ImageFormatError as error:
        raise ConfigError(str(error)) from error
    os.ftruncate(fd, layout.total * cluster_size)
    _write_all(fd, encoded, 0)
    blocks_offset = (1 + layout.refcount_table) * cluster_size
    _write_words(
        fd, header.refcount_table_offset, blocks_offset, layout.refcount_blocks, header
    )
    _write_refcounts(fd, blocks_offset, layout.total, options)
    if options.encryption is not None:
        luks_offset = layout.before_luks * cluster_size
        _write_all(fd, options.encryption.encode(), luks_offset)
    if layout.mapped:
        l2_offset = (layout.metadata - layout.l2) * cluster_size
        data_offset = layout.metadata * cluster_size if layout.data else 0
        flag = _COPIED
        _write_words(
            fd, header.l1_table_offset, flag | l2_offset, header.l1_size, header
        )
        bitmap = subclusters.ALL if options.extended_l2 else None
        _write_words(fd, l2_offset, flag | data_offset, layout.mapped, header, bitmap)
        length = layout.data * cluster_size
        take_space(fd, data_offset, length, options.preallocation, progress)


def _header(size: int, options: Options, layout: _Layout) -> Header:
    cluster_size = options.cluster_size
    cluster_bits = cluster_size.bit_length() - 1
    incompatible, compatible, autoclear = options.features()
    luks_offset = layout.before_luks * cluster_size
    l1_clusters_before = 1 + layout.refcount_table + layout.refcount_blocks
    return Header(
        version=options.version,
        backing_name=options.backing_name,
        cluster_bits=cluster_bits,
        size=size,
        l1_size=options.l1_entries(size),
        l1_table_offset=l1_clusters_before * cluster_size if layout.l1 else 0,
        refcount_table_offset=cluster_size,
        refcount_table_clusters=layout.refcount_table,
        refcount_order=options.refcount_bits.bit_length() - 1,
        header_length=V2_LENGTH if options.version == 2 else CURRENT_LENGTH,
        incompatible_features=incompatible,
        compatible_features=compatible,
        autoclear_features=autoclear,
        crypt_method=CRYPT_LUKS if options.encryption else CRYPT_NONE,
        extensions=options.extensions(luks_offset),
    )


def _write_words(
    fd: int,
    at: int,
    first_word: int,
    count: int,
    header: Header,
    bitmap: int | None = None,
) -> None:
    """Write `count` words, each one cluster further than the last; `bitmap` behind each."""
    step = header.cluster_size
    for index, words in _ranges(first_word, count, step):
        if bitmap is None:
            _write_all(fd, encode_words(words), at + 8 * index)
        else:
            bitmaps = array("Q", [bitmap]) * len(words)
            _write_all(fd, encode_entries(words, bitmaps), at + 16 * index)


def _ranges(first: int, count: int, step: int) -> Iterator[tuple[int, "array[int]"]]:
    per_batch = _BATCH // 8
    for index in range(0, count, per_batch):
        number = min(per_batch, count - index)
        start = first + index * step
        yield index, array("Q", range(start, start + number * step, step))


def _write_refcounts(fd: int, at: int, clusters: int, options: Options) -> None:
    """Write refcounts of 1 for the first `clusters` clusters."""
    bits = options.refcount_bits
    if bits >= 8:
        one, per_unit = (1).to_bytes(bits // 8, "big"), 1
    else:
        # Less than a byte: the first cluster is in the lowest bits.
        per_unit = 8 // bits
        one = bytes([sum(1 << shift for shift in range(0, 8, bits))])
    units, rest = divmod(clusters, per_unit)
    per_batch = _BATCH // len(one)
    for index in range(0, units, per_batch):
        batch = one * min(per_batch, units - index)
        _write_all(fd, batch, at + index * len(one))
    if rest:
        last = bytes([one[0] & (1 << rest * bits) - 1])
        _write_all(fd, last, at + units)


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        if written == 0:
            raise OSError(errno.EIO, "a write made no progress")
        view = view[written:]
        offset += written
