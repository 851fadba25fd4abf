"""Persistent bitmaps of an image or of what lies below it, and copies of them."""

from nbdserve.block.device import BlockDevice
from nbdserve.block.dirty_bitmap import DirtyBitmap
from nbdserve.errors import ConfigError, ImageError
from nbdserve.formats.mapped.image import MappedImage
from nbdserve.formats.qcow2.bitmap_directory import entry_length
from nbdserve.formats.qcow2.image import Qcow2Image


async def find_bitmap(device: BlockDevice, name: str) -> DirtyBitmap | None:
    """Return the persistent bitmap of that name: of the image, or of its backing files.

    As qemu-nbd, the first one from the top is taken. It is kept up to date while the
    image is open for writing, and it records.

    Raises:
        ImageError: It can't be used, or nobody knows which bitmaps there are.
        OSError: It can't be read.
    """
    below: BlockDevice | None = device
    while isinstance(below, MappedImage):
        if isinstance(below, Qcow2Image):
            for bitmap in await below.bitmaps():
                if bitmap.name == name:
                    return await below.dirty_bitmap(name)
        below = below.backing
    return None


async def bitmaps_size(source: BlockDevice | None, cluster_size: int) -> int | None:
    """Return the bytes that an image's bitmaps need in another one, in whole clusters.

    Returns:
        None if the source can't have any.

    Raises:
        ImageCorruptError: Nobody knows which there are.
    """
    if not isinstance(source, Qcow2Image) or source.header.version < 3:
        return None
    clusters = directory = 0
    for bitmap in await source.bitmaps():
        if bitmap.problem is None:
            data = -(-source.size // bitmap.granularity)
            entries = -(-data // (8 * cluster_size))
            clusters += entries + -(-8 * entries // cluster_size)
            directory += entry_length(bitmap.name.encode("utf-8", "surrogateescape"))
    return (clusters + -(-directory // cluster_size)) * cluster_size


async def judge_bitmaps(source: BlockDevice) -> None:
    """Refuse to copy bitmaps that can't be copied.

    Raises:
        ConfigError: The source can't have any.
        ImageError: One can't be used.
    """
    if not isinstance(source, Qcow2Image):
        raise ConfigError("only a qcow2 image has persistent bitmaps to copy")
    for bitmap in await source.bitmaps():
        if bitmap.problem is not None:
            raise ImageError(
                f"bitmap {bitmap.name!r} {bitmap.problem}, so that it can't be copied;"
                " remove it: nbdserve image bitmap remove"
            )


async def copy_bitmaps(source: BlockDevice, target: BlockDevice) -> None:
    """Give an image all persistent bitmaps of another one of the same size.

    Raises:
        ImageError: One can't be used, or the target can't have it.
        OSError: Reading or writing fails.
    """
    await judge_bitmaps(source)
    if not isinstance(source, Qcow2Image) or not isinstance(target, Qcow2Image):
        raise TypeError("persistent bitmaps are those of qcow2 images")
    for bitmap in await source.bitmaps():
        name = bitmap.name
        await target.add_bitmap(
            name, granularity=bitmap.granularity, enabled=bitmap.enabled
        )
        await target.merge_bitmap(name, await source.dirty_bitmap(name))
