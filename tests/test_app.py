"""What the composition root decides itself: folders, notes, all or nothing."""

import asyncio
import os
from pathlib import Path

import pytest

from nbdserve.app import Serving, _own_folder, _state_dir, serve
from nbdserve.config.model import ImageConfig, ServeConfig
from nbdserve.errors import ConfigError
from nbdserve.formats.create import create_image
from nbdserve.formats.open import open_image


def config(*images: Path, unix: Path | None = None) -> ServeConfig:
    """Return what `nbdserve serve IMAGE... --unix PATH` would."""
    return ServeConfig(
        tuple(ImageConfig(path.stem, str(path)) for path in images),
        unix=(str(unix),) if unix else (),
    )


def test_the_state_dir_of_the_operator_comes_first(tmp_path: Path) -> None:
    chosen, runtime = tmp_path / "chosen", tmp_path / "runtime"
    chosen.mkdir()
    runtime.mkdir()
    environment = {"RUNTIME_DIRECTORY": str(runtime), "XDG_RUNTIME_DIR": str(tmp_path)}
    images = (ImageConfig("a", "a"),)
    picked = _state_dir(ServeConfig(images, state_dir=str(chosen)), environment)
    assert picked == str(chosen)
    assert _state_dir(ServeConfig(images), environment) == str(runtime)
    several = environment | {"RUNTIME_DIRECTORY": f"{tmp_path}/gone:{runtime}"}
    assert _state_dir(ServeConfig(images), several) == str(runtime)
    del environment["RUNTIME_DIRECTORY"]
    assert _state_dir(ServeConfig(images), environment) == str(tmp_path)


def test_a_container_has_no_state_dir_of_its_own() -> None:
    environment = {"container": "podman"}
    assert _state_dir(ServeConfig((ImageConfig("a", "a"),)), environment) is None


def test_a_folder_that_others_may_enter_is_not_used(tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    assert _own_folder(str(ours)) == str(ours)
    assert _own_folder(str(ours)) == str(ours)
    ours.chmod(0o750)
    assert _own_folder(str(ours)) is None
    (tmp_path / "link").symlink_to(tmp_path)
    assert _own_folder(str(tmp_path / "link")) is None
    (tmp_path / "file").touch(0o600)
    assert _own_folder(str(tmp_path / "file")) is None


def test_a_failing_image_gives_back_those_that_were_open(tmp_path: Path) -> None:
    good, unix = tmp_path / "good.qcow2", tmp_path / "sock"
    create_image(good, 1 << 20)
    announced: list[Serving] = []
    with pytest.raises(ConfigError, match=r"missing\.qcow2"):
        serve(config(good, tmp_path / "missing.qcow2", unix=unix), announced.append)
    assert not announced
    assert not unix.exists()

    async def open_again() -> int:
        async with open_image(good) as image:  # its lock was given up
            return image.size

    assert asyncio.run(open_again()) == 1 << 20


def test_what_cannot_be_announced_ends_the_server_cleanly(tmp_path: Path) -> None:
    image, unix = tmp_path / "a.qcow2", tmp_path / "sock"
    create_image(image, 1 << 20)
    before = set(os.listdir("/proc/self/fd"))

    def announce(serving: Serving) -> None:
        assert serving.images[0].size == 1 << 20
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        serve(config(image, unix=unix), announce)
    assert not unix.exists()
    assert set(os.listdir("/proc/self/fd")) <= before
