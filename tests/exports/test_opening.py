"""From the configuration of an image to its export."""

import errno
from pathlib import Path

import pytest

from nbdserve.config.model import ImageConfig
from nbdserve.errors import ImageError
from nbdserve.exports.access import OPEN
from nbdserve.exports.opening import open_export


async def test_a_failing_system_call_makes_an_image_unusable(tmp_path: Path) -> None:
    # what else it could be is for nobody who asks for an export to handle
    (tmp_path / "a").write_bytes(bytes(512))
    missing = tmp_path / "missing"
    image = ImageConfig("a", str(tmp_path / "a"), "raw", scratch=str(missing))
    with pytest.raises(ImageError, match=r"/a: can't be opened: .*/missing") as error:
        await open_export(image, OPEN, None)
    assert isinstance(error.value.__cause__, OSError)
    assert error.value.__cause__.errno == errno.ENOENT
