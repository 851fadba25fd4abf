"""Making a new image that holds what a disk holds.

The image is written under a temporary name in its folder, made durable, and only then
gets its own name: whatever interrupts the work, there is a whole image or none.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass

from nbdserve.block.device import BlockDevice
from nbdserve.errors import ConfigError
from nbdserve.formats.copy import Progress, copy_into_new
from nbdserve.formats.create import create_image
from nbdserve.formats.crypto.new_luks import NewLuks
from nbdserve.formats.crypto.secret import Secret
from nbdserve.formats.open import open_image
from nbdserve.formats.persistent_bitmaps import copy_bitmaps, judge_bitmaps
from nbdserve.formats.qcow2.create import DEFAULT_CLUSTER_SIZE, Options
from nbdserve.formats.qcow2.sequential_writer import COMPRESSORS, SequentialWriter
from nbdserve.formats.rewrite import write_disk
from nbdserve.storage.executor import run
from nbdserve.storage.file import FileStorage
from nbdserve.storage.names import shown
from nbdserve.storage.publish import publish, require_new, temporary_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What the new image shall be; None is "as `create_image` chooses".

    Attributes:
        format: qcow2, qcow or raw.
        compression: zlib or zstd; None stores plain clusters.
        backing: Name of a backing file, stored as it is. Only what differs from
            that file is stored.
        backing_format: Its format.
        cluster_size: Bytes; qcow2 only, as the rest.
        compat: 2 or 3.
        refcount_bits: 1 to 64.
        preallocation: See `create_image`.
        bitmaps: Whether it gets the persistent bitmaps of the source, too.
        extended_l2: Whether clusters have subclusters.
        data_file: Name of an external data file; see `create_image`, as the rest.
        data_file_raw: Whether that is to be a raw image by itself.
        lazy_refcounts: Whether writers may put refcounts off.
        encryption: The same.
    """

    format: str = "qcow2"
    compression: str | None = None
    backing: str | None = None
    backing_format: str | None = None
    cluster_size: int | None = None
    compat: int | None = None
    refcount_bits: int | None = None
    preallocation: str | None = None
    bitmaps: bool = False
    extended_l2: bool = False
    data_file: str | None = None
    data_file_raw: bool = False
    lazy_refcounts: bool | None = None
    encryption: NewLuks | None = None

    def __post_init__(self) -> None:
        """Judge what `create_image` does not know.

        Raises:
            ConfigError: Choices contradict each other.
        """
        if self.bitmaps and (self.format != "qcow2" or self.compat == 2):
            raise ConfigError("only qcow2 images of version 3 have persistent bitmaps")
        if self.compression is None:
            return
        if self.compression not in COMPRESSORS:
            raise ConfigError(
                f"compression {self.compression!r}: must be one of"
                f" {', '.join(COMPRESSORS)}"
            )
        if self.format != "qcow2":
            raise ConfigError("compressed images are written in format qcow2 only")
        if self.preallocated:
            raise ConfigError(
                "compressed clusters have no place to preallocate: choose one of"
                " compression and preallocation"
            )
        if self.data_file is not None:
            raise ConfigError(
                "an external data file has no compressed clusters: choose one of the two"
            )
        if self.encryption is not None:
            raise ConfigError(
                "encrypted images are not compressed: choose one of encryption and"
                " compression"
            )
        if self.compression == "zstd" and self.compat == 2:
            raise ConfigError("compression zstd needs compat 3")

    @property
    def preallocated(self) -> bool:
        """Whether clusters have their places before anything is written."""
        return self.preallocation not in (None, "off")

    def options(self) -> Options:
        """Return the layout of a new qcow2 image."""
        return Options(
            cluster_size=self.cluster_size or DEFAULT_CLUSTER_SIZE,
            version=3 if self.compat is None else self.compat,
            refcount_bits=self.refcount_bits or 16,
            backing_name=None if self.backing is None else os.fsencode(self.backing),
            backing_format=self.backing_format if self.backing else None,
            extended_l2=self.extended_l2,
            lazy_refcounts=bool(self.lazy_refcounts),
            encryption=self.encryption,
        )


async def convert_to_file(  # noqa: PLR0913 -- keywords, each with a default
    source: BlockDevice,
    path: str | os.PathLike[str],
    target: Target,
    *,
    allow_backing: Sequence[str | os.PathLike[str]] = (),
    allow_data_file: Sequence[str | os.PathLike[str]] = (),
    secrets: Sequence[Secret] = (),
    progress: Progress,
) -> None:
    """Write what `source` holds to a new image at `path`; durable on return.

    Args:
        source: Read from the beginning to the end.
        path: Nothing may be there.
        target: Format and layout.
        allow_backing: Folders in which backing files of the new one's backing file
            may lie, besides its own.
        allow_data_file: External data files that the backing file and those below it
            may have, and folders in which these may lie.
        secrets: Passphrases of the backing file of the new image, and its own.
        progress: Told how many bytes are done.

    Raises:
        ConfigError: A choice is not possible, or the file exists.
        ImageError: The source or the backing file can't be read.
        OSError: Reading or writing fails.
    """
    path = os.fspath(path)
    if target.bitmaps:
        await judge_bitmaps(source)
    try:
        await run(require_new, path)
        with temporary_name(path) as temporary:
            await run(_create, temporary, source.size, target)
            async with AsyncExitStack() as stack:
                made = stack.enter_context(_made_data_file(path, target))
                backing = None
                if target.backing is not None:
                    folders = [os.path.dirname(path) or os.curdir, *allow_backing]
                    backing = await stack.enter_async_context(
                        open_image(
                            os.path.join(os.path.dirname(path), target.backing),
                            format=target.backing_format or "auto",
                            read_only=True,
                            allow_backing=folders,
                            allow_data_file=allow_data_file,
                            secrets=secrets,
                        )
                    )
                await _fill(source, temporary, target, backing, progress, secrets)
                if target.bitmaps:
                    await _copy_bitmaps(source, temporary, target, secrets)
                await run(publish, temporary, path)
                made.pop_all()
    except FileExistsError as error:
        raise ConfigError(
            f"{shown(path)} exists already: nothing is overwritten"
        ) from error


def _create(path: str, size: int, target: Target) -> None:
    """Make an empty image, which judges every option."""
    create_image(
        path,
        size,
        format=target.format,
        backing=target.backing,
        backing_format=target.backing_format,
        cluster_size=target.cluster_size,
        compat=target.compat,
        refcount_bits=target.refcount_bits,
        preallocation=target.preallocation,
        extended_l2=target.extended_l2,
        data_file=target.data_file,
        data_file_raw=target.data_file_raw,
        lazy_refcounts=target.lazy_refcounts,
        encryption=target.encryption,
    )


@contextmanager
def _made_data_file(path: str, target: Target) -> Iterator[ExitStack]:
    """Remove the new data file in the end, unless the stack is emptied before."""
    with ExitStack() as stack:
        if target.data_file is not None:
            place = os.path.join(os.path.dirname(path), target.data_file)
            stack.callback(os.unlink, place)
        yield stack


async def _fill(
    source: BlockDevice,
    path: str,
    target: Target,
    backing: BlockDevice | None,
    progress: Progress,
    secrets: Sequence[Secret],
) -> None:
    """Write the disk's content into the empty image at `path`."""
    in_order = not target.preallocated and target.data_file is None
    if target.format == "qcow2" and in_order:
        await _write_sequentially(source, path, target, backing, progress)
        return
    folders = _backing_folders(path, target)
    image = await open_image(
        path,
        format=target.format,
        allow_backing=folders,
        allow_data_file=_data_files(path, target),
        secrets=secrets,
    )
    try:
        await copy_into_new(source, image, backing=backing, progress=progress)
        await image.flush()
    finally:
        await image.close()


async def _copy_bitmaps(
    source: BlockDevice, path: str, target: Target, secrets: Sequence[Secret]
) -> None:
    folders = _backing_folders(path, target)
    async with open_image(
        path,
        format="qcow2",
        allow_backing=folders,
        allow_data_file=_data_files(path, target),
        secrets=secrets,
    ) as image:
        await copy_bitmaps(source, image)


def _backing_folders(path: str, target: Target) -> list[str]:
    """Return where the backing file lies: the operator named it, so it may."""
    if target.backing is None:
        return []
    full = os.path.join(os.path.dirname(path), target.backing)
    return [os.path.dirname(os.path.realpath(full))]


def _data_files(path: str, target: Target) -> list[str]:
    """Return where the new external data file is, if there is one."""
    if target.data_file is None:
        return []
    return [os.path.join(os.path.dirname(path), target.data_file)]


async def _write_sequentially(
    source: BlockDevice,
    path: str,
    target: Target,
    backing: BlockDevice | None,
    progress: Progress,
) -> None:
    storage = await run(FileStorage, path)
    try:
        await storage.truncate(0)
        writer = SequentialWriter(
            storage, source.size, target.options(), compression=target.compression
        )
        await write_disk(source, writer, backing=backing, progress=progress)
        await writer.finish()
    finally:
        await storage.close()
