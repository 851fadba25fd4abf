"""Making a new image file, of any format.

The image is written under a temporary name beside its final one, synced, and only
then given its name, without ever replacing a file: after a crash or an error
there is a whole image or none. Blocking calls: made by the command line or in
a thread.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from nbdserve.errors import ConfigError
from nbdserve.formats.crypto.new_luks import NewLuks
from nbdserve.formats.preallocation import MODES, take_space
from nbdserve.formats.qcow1 import create as qcow1
from nbdserve.formats.qcow2 import create as qcow2
from nbdserve.storage.publish import publish, require_new, temporary_name

FORMATS: Final = ("qcow2", "qcow", "raw")
MAX_SIZE = (1 << 63) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """The arguments of `create_image`; None is "not given"."""

    size: int
    format: str
    backing: str | None
    backing_format: str | None
    cluster_size: int | None
    compat: int | None
    refcount_bits: int | None
    preallocation: str | None
    extended_l2: bool
    data_file: str | None
    data_file_raw: bool
    lazy_refcounts: bool | None
    encryption: NewLuks | None

    @property
    def taken(self) -> str:
        """How much space is to be taken at once."""
        return self.preallocation or "off"


def create_image(  # noqa: PLR0913 - each is one option of the command line
    path: str | os.PathLike[str],
    size: int,
    *,
    format: str = "qcow2",  # noqa: A002 - what everybody calls it
    backing: str | None = None,
    backing_format: str | None = None,
    cluster_size: int | None = None,
    compat: int | None = None,
    refcount_bits: int | None = None,
    preallocation: str | None = None,
    extended_l2: bool = False,
    data_file: str | None = None,
    data_file_raw: bool = False,
    lazy_refcounts: bool | None = None,
    progress: Callable[[int], None] = lambda _: None,
    encryption: NewLuks | None = None,
) -> None:
    """Make a new image; durable, and complete, when this returns.

    Args:
        path: Where; nothing may be there yet.
        size: Bytes of the disk; qcow and qcow2 round up to 512.
        format: qcow2, qcow or raw.
        backing: Name of the backing file, stored as it is; a relative one counts
            from the folder of the image.
        backing_format: Its format; required with `backing`.
        cluster_size: Bytes; qcow2 only, 65536 unless given.
        compat: 2 or 3, the qcow2 version; 3 unless given.
        refcount_bits: 1 to 64; qcow2 only, 16 unless given.
        extended_l2: Whether clusters have subclusters; qcow2 version 3 only.
        preallocation: off (unless given), metadata (qcow2 only: each cluster gets
            its place), falloc (the space is taken too) or full (and written with
            zeros); qcow2 and raw.
        data_file: Name of a file to keep the guest's data in, stored as it is; a
            relative one counts from the folder of the image. It is made as well;
            qcow2 only.
        data_file_raw: Whether that file is to be a raw image by itself, always.
        lazy_refcounts: Whether writers may put refcounts off (qemu does); qcow2 only.
        progress: Told how many bytes are preallocated; counts anew for each file.
        encryption: See `new_luks`; qcow2 only.

    Raises:
        ConfigError: A choice is not possible, the file exists, the backing file
            is missing or of another format, or the system refuses a step.
    """
    path = os.fspath(path)
    request = _Request(
        size=size,
        format=format,
        backing=backing,
        backing_format=backing_format,
        cluster_size=cluster_size,
        compat=compat,
        refcount_bits=refcount_bits,
        preallocation=preallocation,
        extended_l2=extended_l2,
        data_file=data_file,
        data_file_raw=data_file_raw,
        lazy_refcounts=lazy_refcounts,
        encryption=encryption,
    )
    _judge(path, request)
    if backing is not None:
        _judge_backing(path, request)
    write = _writer(request, progress)
    with _data_file(path, request, progress):
        _make(path, write)


def _make(path: str, write: Callable[[int], None]) -> None:
    """Let `write` fill a new file.

    Raises:
        ConfigError: It exists, or the system refuses a step.
    """
    try:
        _publish(path, write)
    except FileExistsError as error:
        raise ConfigError(f"{path} exists already: nothing is overwritten") from error
    except OSError as error:
        raise ConfigError(f"can't create {path}: {error.strerror}") from error


@contextmanager
def _data_file(
    path: str, request: _Request, progress: Callable[[int], None]
) -> Iterator[None]:
    """Make the external data file, and remove it if the image that names it fails."""
    if request.data_file is None:
        yield
        return
    place = os.path.join(os.path.dirname(path), request.data_file)
    if os.path.abspath(place) == os.path.abspath(path):
        raise ConfigError(f"{path}: can't be its own data file")
    # whole sectors, as the disk
    size = -(-request.size // 512) * 512
    _make(place, lambda fd: _write_raw(fd, size, request.taken, progress))
    try:
        yield
    except BaseException:
        os.unlink(place)
        raise


def _judge(path: str, request: _Request) -> None:
    if not path or "\0" in path:
        raise ConfigError(f"{path!r} is no path for a new image")
    if request.format not in FORMATS:
        raise ConfigError(
            f"format {request.format!r}: must be one of {', '.join(FORMATS)}"
        )
    if not 0 <= request.size <= MAX_SIZE:
        raise ConfigError(f"size {request.size}: must be 0 to 2^63 - 1 bytes")
    if request.taken not in MODES:
        raise ConfigError(
            f"preallocation {request.preallocation!r}: must be one of {', '.join(MODES)}"
        )
    if request.data_file is not None:
        judge_data_name(request.data_file)
    if request.format == "qcow2":
        return
    for name, value in (
        ("cluster size", request.cluster_size),
        ("compat", request.compat),
        ("refcount bits", request.refcount_bits),
        ("extended L2", request.extended_l2 or None),
        ("a data file", request.data_file),
        ("lazy refcounts", request.lazy_refcounts),
        ("encryption", request.encryption),
    ):
        if value is not None:
            raise ConfigError(f"{name} can be chosen for qcow2 only")
    if request.format == "raw" and request.backing is not None:
        raise ConfigError("a raw image can't have a backing file")
    if request.format == "qcow" and request.taken != "off":
        raise ConfigError(f"preallocation {request.taken} is for qcow2 and raw only")
    if request.format == "raw" and request.taken == "metadata":
        raise ConfigError("preallocation metadata is for qcow2: raw has no metadata")


def judge_data_name(name: str) -> None:
    """Refuse what can't be the name of a data file.

    Raises:
        ConfigError: It is empty, has a NUL byte, or reads like a URI.
    """
    if "\0" in name or not name:
        raise ConfigError("the name of the data file is empty or has a NUL byte")
    if ":" in name.partition("/")[0]:
        raise ConfigError(
            f"data file {name!r} reads like a URI: write ./{name} for a file"
        )


def _judge_backing(path: str, request: _Request) -> None:
    backing = request.backing or ""
    if request.backing_format not in FORMATS:
        raise ConfigError(
            f"backing file {backing}: its format must be given, one of"
            f" {', '.join(FORMATS)}"
        )
    if ":" in backing.partition("/")[0]:
        raise ConfigError(
            f"backing file {backing!r} reads like a URI: write ./{backing} for a file"
        )
    if "\0" in backing or not backing:
        raise ConfigError("the name of the backing file is empty or has a NUL byte")
    resolved = os.path.join(os.path.dirname(path), backing)
    try:
        with open(resolved, "rb") as file:
            magic = file.read(8)
    except OSError as error:
        raise ConfigError(f"backing file {resolved}: {error.strerror}") from error
    found = {b"QFI\xfb\0\0\0\1": "qcow", b"QFI\xfb\0\0\0\2": "qcow2"}.get(
        magic, "qcow2" if magic == b"QFI\xfb\0\0\0\3" else "raw"
    )
    wanted = request.backing_format
    # A raw disk may hold an image, but qcow can't record that it is meant so.
    if found != wanted and (wanted != "raw" or request.format == "qcow"):
        raise ConfigError(f"backing file {resolved} is {found}, not {wanted}")


def _writer(
    request: _Request, progress: Callable[[int], None]
) -> Callable[[int], None]:
    """Judge what is left and return the function that fills the file."""
    backing_name = None if request.backing is None else os.fsencode(request.backing)
    if request.format == "raw":
        return lambda fd: _write_raw(fd, request.size, request.taken, progress)
    if request.format == "qcow":
        return lambda fd: qcow1.write_image(fd, request.size, backing_name=backing_name)
    options = qcow2.Options(
        cluster_size=(
            qcow2.DEFAULT_CLUSTER_SIZE
            if request.cluster_size is None
            else request.cluster_size
        ),
        version=3 if request.compat is None else request.compat,
        refcount_bits=16 if request.refcount_bits is None else request.refcount_bits,
        backing_name=backing_name,
        backing_format=request.backing_format if request.backing else None,
        extended_l2=request.extended_l2,
        preallocation=request.taken,
        data_name=(
            None if request.data_file is None else os.fsencode(request.data_file)
        ),
        data_raw=request.data_file_raw,
        lazy_refcounts=bool(request.lazy_refcounts),
        encryption=request.encryption,
    )
    return lambda fd: qcow2.write_image(fd, request.size, options, progress)


def _write_raw(
    fd: int, size: int, preallocation: str, progress: Callable[[int], None]
) -> None:
    os.ftruncate(fd, size)
    take_space(fd, 0, size, preallocation, progress)


def _publish(path: str, write: Callable[[int], None]) -> None:
    """Let `write` fill a file, make it durable, and give it the name `path`."""
    require_new(path)
    with temporary_name(path) as temporary:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o666)
        try:
            write(fd)
            os.fsync(fd)
        finally:
            os.close(fd)
        publish(temporary, path)
