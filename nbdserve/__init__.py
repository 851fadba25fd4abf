"""nbdserve: an NBD server for raw, qcow and qcow2 disk images.

The engine serves as a library as well:

    async with nbdserve.open_image("disk.qcow2") as image:
        data = await image.read(0, 512)
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nbdserve.formats.open import open_image as open_image
else:

    def __getattr__(name: str) -> object:
        """Load the engine when it is first asked for: the command line starts without."""
        if name == "open_image":
            from nbdserve.formats.open import open_image  # noqa: PLC0415

            return open_image
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
