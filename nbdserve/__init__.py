"""nbdserve: an NBD server for raw, qcow and qcow2 disk images.

The engine serves as a library as well:

    async with nbdserve.open_image("disk.qcow2") as image:
        data = await image.read(0, 512)
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nbdserve.block.dirty_bitmap import DirtyBitmap as DirtyBitmap
    from nbdserve.formats.open import open_image as open_image
    from nbdserve.formats.qcow2.bitmaps import BitmapInfo as BitmapInfo
    from nbdserve.formats.qcow2.image import Qcow2Image as Qcow2Image
else:
    _PLACES = {
        "BitmapInfo": "nbdserve.formats.qcow2.bitmaps",
        "DirtyBitmap": "nbdserve.block.dirty_bitmap",
        "Qcow2Image": "nbdserve.formats.qcow2.image",
        "open_image": "nbdserve.formats.open",
    }

    def __getattr__(name: str) -> object:
        """Load the engine when it is first asked for: the command line starts without."""
        if name in _PLACES:
            from importlib import import_module  # noqa: PLC0415

            return getattr(import_module(_PLACES[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
