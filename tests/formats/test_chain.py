"""Backing files: found where qemu finds them, and only where the operator allows."""

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import nbdserve
from nbdserve.block.device import BlockDevice
from nbdserve.errors import (
    BackingFileError,
    ConfigError,
    ImageError,
    ImageFormatError,
    ImageInUseError,
    NbdserveError,
)
from nbdserve.formats import chain
from nbdserve.formats.chain import ChainOptions, Driver
from nbdserve.formats.open import RawDriver
from nbdserve.formats.open import drivers as open_drivers
from nbdserve.formats.raw import RawImage
from nbdserve.storage.base import Storage
from nbdserve.storage.file import FileStorage


class Opened(RawImage):
    """Stands for an image of any format; closes its backing file as engines do."""

    def __init__(
        self,
        storage: Storage,
        image_format: str,
        *,
        read_only: bool,
        backing: BlockDevice | None,
    ) -> None:
        super().__init__(storage, read_only=read_only)
        self.format = image_format
        self.name = storage.name
        self.backing = backing

    async def close(self) -> None:
        await super().close()
        if self.backing is not None:
            await self.backing.close()


class HeaderDriver:
    """Reads the real header, and shows the file as it is."""

    def __init__(
        self, name: str, driver: Driver, refuse: Callable[[Storage], None]
    ) -> None:
        self.name = name
        self.backing = driver.backing
        self.refuse = refuse

    async def open(
        self,
        storage: Storage,
        *,
        read_only: bool,
        backing: BlockDevice | None,
        writethrough: bool,
    ) -> BlockDevice:
        self.refuse(storage)
        return Opened(storage, self.name, read_only=read_only, backing=backing)


def drivers(
    refuse: Callable[[Storage], None] = lambda storage: None,
) -> dict[str, Driver]:
    return {
        name: HeaderDriver(name, driver, refuse)
        for name, driver in open_drivers().items()
    }


def create(
    path: Path,
    backing: str | None = None,
    backing_format: str | None = "qcow2",
    image_format: str = "qcow2",
) -> Path:
    """Make an image with any backing name, whether or not such a file exists."""
    command = ["qemu-img", "create", "-q", "-f", image_format]
    if backing is not None:
        command += ["-u", "-b", backing]
        if backing_format is not None:
            command += ["-F", backing_format]
    subprocess.run([*command, str(path), "1M"], check=True, timeout=20)
    return path


def patch_name(path: Path, old: bytes, new: bytes) -> None:
    """Change a recorded name in place: qemu-img writes no hostile ones."""
    assert len(old) == len(new)
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


def drop_backing_format(path: Path) -> None:
    """Make the backing format extension one of an unknown kind."""
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\xe2\x79\x2a\xca", b"\x12\x34\x56\x78", 1))


async def names(path: Path, *allowed: Path) -> list[str]:
    """Open a chain and return the names of its files, the top first."""
    options = ChainOptions(allow_backing=allowed)
    device: BlockDevice | None = await chain.open_chain(path, options, drivers())
    assert isinstance(device, Opened)
    top = device
    assert not top.read_only
    result = []
    while device is not None:
        assert isinstance(device, Opened)
        assert device is top or device.read_only
        result.append(os.path.relpath(device.name, path.parent))
        device = device.backing
    await top.close()
    return result


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def refusal(path: Path, kind: type[NbdserveError] = BackingFileError) -> str:
    """Return the message with which a chain is refused: one line, nothing left open."""
    before = descriptors()
    with pytest.raises(kind) as error:
        await chain.open_chain(path, ChainOptions(), drivers())
    assert error.type is kind
    assert descriptors() == before
    message = str(error.value)
    assert message.isprintable()
    assert message.startswith(str(path))
    return message


class TestAllowed:
    """Chains that work."""

    async def test_relative_names_of_every_format(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub/base.raw").write_bytes(bytes(4096))
        create(tmp_path / "sub/old.qcow", "base.raw", "raw", image_format="qcow")
        create(tmp_path / "mid.qcow2", "sub/old.qcow", "qcow")
        top = create(tmp_path / "top.qcow2", "mid.qcow2")
        assert await names(top) == [
            "top.qcow2",
            "mid.qcow2",
            "sub/old.qcow",
            "sub/base.raw",
        ]

    async def test_relative_to_the_working_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        create(tmp_path / "base.qcow2")
        create(tmp_path / "top.qcow2", "base.qcow2")
        monkeypatch.chdir(tmp_path)
        device = await chain.open_chain("top.qcow2", ChainOptions(), drivers())
        await device.close()

    async def test_absolute_name_in_the_own_folder(self, tmp_path: Path) -> None:
        base = create(tmp_path / "base.qcow2")
        assert await names(create(tmp_path / "top.qcow2", str(base)))

    async def test_allowed_folder_and_links_into_it(self, tmp_path: Path) -> None:
        images, templates = tmp_path / "images", tmp_path / "templates"
        images.mkdir()
        templates.mkdir()
        create(templates / "base.qcow2")
        (images / "link").symlink_to(templates / "base.qcow2")
        direct = create(images / "a.qcow2", "../templates/base.qcow2")
        linked = create(images / "b.qcow2", "link")
        expected = "../templates/base.qcow2"
        assert await names(direct, templates) == ["a.qcow2", expected]
        assert await names(linked, templates) == ["b.qcow2", expected]
        (tmp_path / "alias").symlink_to(templates)
        assert await names(direct, tmp_path / "alias") == ["a.qcow2", expected]
        assert await names(direct, Path("/")) == ["a.qcow2", expected]

    @pytest.mark.parametrize(
        ("base_format", "expected"), [("raw", "raw"), ("qcow2", "qcow2")]
    )
    async def test_unrecorded_format_is_probed(
        self, tmp_path: Path, base_format: str, expected: str
    ) -> None:
        create(tmp_path / "base", image_format=base_format)
        top = create(tmp_path / "top.qcow2", "base", base_format)
        drop_backing_format(top)
        device = await chain.open_chain(top, ChainOptions(), drivers())
        assert isinstance(device, Opened)
        assert isinstance(device.backing, Opened)
        assert (device.format, device.backing.format) == ("qcow2", expected)
        await device.close()

    async def test_the_chain_can_be_listed(self, tmp_path: Path) -> None:
        base = tmp_path / "base.raw"
        base.write_bytes(bytes(512))
        top = create(tmp_path / "top.qcow2", "base.raw", "raw")
        before = descriptors()
        listed = await chain.backing_chain(top, ChainOptions(), drivers())
        assert listed == [(str(top), "qcow2"), (str(base), "raw")]
        base.unlink()
        with pytest.raises(BackingFileError, match=r"base\.raw can't be opened"):
            await chain.backing_chain(top, ChainOptions(), drivers())
        assert descriptors() == before

    async def test_recorded_raw_is_not_probed(self, tmp_path: Path) -> None:
        create(tmp_path / "inner.qcow2", "/etc/shadow", "raw")
        top = create(tmp_path / "top.qcow2", "inner.qcow2", "raw")
        assert await names(top) == ["top.qcow2", "inner.qcow2"]

    async def test_64_backing_files_but_not_65(self, tmp_path: Path) -> None:
        image = create(tmp_path / "0.qcow2", "x.qcow2")
        template = image.read_bytes()
        create(image)
        for number in range(1, 66):
            path = tmp_path / f"{number}.qcow2"
            path.write_bytes(template)
            length = len(f"{number - 1}.qcow2")
            content = bytearray(template)
            start = int.from_bytes(content[8:16], "big")
            content[start : start + length] = f"{number - 1}.qcow2".encode()
            content[16:20] = length.to_bytes(4, "big")
            path.write_bytes(content)
        assert len(await names(tmp_path / "64.qcow2")) == 65
        assert "more than 64 backing files" in await refusal(tmp_path / "65.qcow2")

    async def test_backing_files_are_locked_against_writers(
        self, tmp_path: Path
    ) -> None:
        base = create(tmp_path / "base.qcow2")
        top = create(tmp_path / "top.qcow2", "base.qcow2")
        device = await chain.open_chain(top, ChainOptions(), drivers())
        with pytest.raises(ImageInUseError, match=r"base\.qcow2: in use"):
            FileStorage(base)
        second = create(tmp_path / "second.qcow2", "base.qcow2")
        await (await chain.open_chain(second, ChainOptions(), drivers())).close()
        await device.close()
        writer = FileStorage(base)
        with pytest.raises(ImageInUseError, match=r"base\.qcow2: in use"):
            await chain.open_chain(top, ChainOptions(), drivers())
        await (await chain.open_chain(top, ChainOptions(lock=False), drivers())).close()
        await writer.close()


class TestRefused:
    """Each refusal is one line that names the files and says what to do."""

    async def test_outside_the_folder(self, tmp_path: Path) -> None:
        (tmp_path / "images").mkdir()
        base = create(tmp_path / "base.qcow2")
        (tmp_path / "images/link").symlink_to(base)
        for number, name in enumerate(["../base.qcow2", str(base), "link"]):
            top = create(tmp_path / f"images/top{number}.qcow2", name)
            message = await refusal(top)
            assert message == (
                f"{top}: its backing file {base} lies outside the image's folder;"
                f" add --allow-backing {tmp_path} to allow it"
            )

    async def test_a_folder_whose_name_begins_alike(self, tmp_path: Path) -> None:
        (tmp_path / "images").mkdir()
        (tmp_path / "images-secret").mkdir()
        create(tmp_path / "images-secret/base.qcow2")
        top = create(tmp_path / "images/top.qcow2", "../images-secret/base.qcow2")
        assert "--allow-backing" in await refusal(top)

    async def test_deeper_in_the_chain(self, tmp_path: Path) -> None:
        create(tmp_path / "mid.qcow2", "/etc/passwd", "raw")
        top = create(tmp_path / "top.qcow2", "mid.qcow2")
        before = descriptors()
        with pytest.raises(BackingFileError, match="--allow-backing /etc to allow"):
            await chain.open_chain(top, ChainOptions(), drivers())
        assert descriptors() == before

    @pytest.mark.parametrize(
        "name",
        [
            'json:{"driver":"nbd"}',
            "nbd://localhost:10809/x",
            "file:base.qcow2",
            "fat:rw:/etc",
            ":base",
        ],
    )
    async def test_protocols(self, tmp_path: Path, name: str) -> None:
        top = create(tmp_path / "top.qcow2", "x" * len(name))
        patch_name(top, b"x" * len(name), name.encode())
        assert "is not a plain file name" in await refusal(top)

    async def test_missing(self, tmp_path: Path) -> None:
        top = create(tmp_path / "top.qcow2", "gone.qcow2")
        assert await refusal(top) == (
            f"{top}: its backing file {tmp_path}/gone.qcow2 can't be opened:"
            " No such file or directory"
        )

    @pytest.mark.parametrize(
        ("name", "shown"),
        [(b"a\0b", r"a\x00b"), (b"a\nb", r"a\nb"), (b"a\xffb", r"a\xffb")],
    )
    async def test_strange_names(self, tmp_path: Path, name: bytes, shown: str) -> None:
        top = create(tmp_path / "top.qcow2", "QXQ")
        patch_name(top, b"QXQ", name)
        assert shown in await refusal(top)

    async def test_loops(self, tmp_path: Path) -> None:
        self_backed = create(tmp_path / "self.qcow2", "self.qcow2")
        assert "comes back to" in await refusal(self_backed)
        create(tmp_path / "a.qcow2", "b.qcow2")
        create(tmp_path / "b.qcow2", "link.qcow2")
        os.link(tmp_path / "a.qcow2", tmp_path / "link.qcow2")
        assert "comes back to" in await refusal(tmp_path / "a.qcow2")
        (tmp_path / "circle").symlink_to("circle")
        top = create(tmp_path / "top.qcow2", "circle")
        assert "symbolic links form a loop" in await refusal(top)

    async def test_what_is_no_disk(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        top = create(tmp_path / "top.qcow2", "fifo", "raw")
        assert "fifo: is a FIFO" in await refusal(top)
        top = create(tmp_path / "dot.qcow2", ".", "raw")
        assert "--allow-backing" in await refusal(top)

    async def test_unknown_recorded_format(self, tmp_path: Path) -> None:
        (tmp_path / "base").write_bytes(bytes(512))
        top = create(tmp_path / "top.qcow2", "base", "vmdk")
        message = await refusal(top)
        assert "'vmdk'" in message
        assert "only raw, qcow, qcow2 are supported" in message

    async def test_unknown_version_of_a_backing_file(self, tmp_path: Path) -> None:
        (tmp_path / "base").write_bytes(b"QFI\xfb\0\0\0\x09".ljust(512, b"\0"))
        top = create(tmp_path / "top.qcow2", "base", "raw")
        drop_backing_format(top)
        with pytest.raises(ImageFormatError, match=r"base: .* version 9"):
            await chain.open_chain(top, ChainOptions(), drivers())

    async def test_a_broken_header_is_named(self, tmp_path: Path) -> None:
        base = create(tmp_path / "base.qcow2")
        with base.open("r+b") as file:
            file.seek(20)
            file.write(b"\0\0\0\x40")
        top = create(tmp_path / "top.qcow2", "base.qcow2")
        before = descriptors()
        with pytest.raises(ImageError, match=r"base\.qcow2: .*cluster_bits"):
            await chain.open_chain(top, ChainOptions(), drivers())
        assert descriptors() == before

    async def test_everything_is_closed_when_an_engine_refuses(
        self, tmp_path: Path
    ) -> None:
        create(tmp_path / "base.qcow2")
        create(tmp_path / "mid.qcow2", "base.qcow2")
        top = create(tmp_path / "top.qcow2", "mid.qcow2")

        for victim in ("base", "mid", "top"):

            def refuse(storage: Storage, victim: str = victim) -> None:
                if victim in storage.name.rsplit("/", 1)[1]:
                    raise ImageError("the engine says no")

            before = descriptors()
            with pytest.raises(ImageError, match=rf"{victim}\.qcow2: the engine"):
                await chain.open_chain(top, ChainOptions(), drivers(refuse))
            assert descriptors() == before

    async def test_a_disk_that_fails_is_an_image_error(self, tmp_path: Path) -> None:
        top = create(tmp_path / "top.qcow2")

        def refuse(storage: Storage) -> None:
            raise OSError(errno.EIO, "whatever")

        before = descriptors()
        with pytest.raises(
            ImageError, match=r"top\.qcow2: can't be opened: Input/output error"
        ):
            await chain.open_chain(top, ChainOptions(), drivers(refuse))
        assert descriptors() == before

    async def test_no_driver(self, tmp_path: Path) -> None:
        top = create(tmp_path / "top.qcow2")
        with pytest.raises(ImageFormatError, match="no driver for the format qcow2"):
            await chain.open_chain(top, ChainOptions(), {"raw": RawDriver()})


class TestOpenImage:
    """The library's entry."""

    async def test_as_context_and_awaited(self, tmp_path: Path) -> None:
        path = tmp_path / "disk.raw"
        path.write_bytes(bytes(1000))
        async with nbdserve.open_image(path, format="raw") as image:
            await image.write(10, b"hello")
            with pytest.raises(ImageInUseError, match=r"disk\.raw: in use"):
                await nbdserve.open_image(path, format="raw")
            async with nbdserve.open_image(path, read_only=True, lock=False) as view:
                assert await view.read(10, 5) == b"hello"
        image = await nbdserve.open_image(path, read_only=True)
        assert (await image.read(10, 5), image.size) == (b"hello", 1000)
        await image.close()

    async def test_auto_refuses_to_write_what_might_be_raw(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "disk.raw"
        path.write_bytes(bytes(1000))
        with pytest.raises(ImageFormatError, match="add --format raw"):
            await nbdserve.open_image(path)

    async def test_what_a_person_gets_wrong(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="gone: No such file"):
            await nbdserve.open_image(tmp_path / "gone")
        with pytest.raises(ConfigError, match="cache mode 'none' is not"):
            await nbdserve.open_image(tmp_path / "gone", cache="none")
        with pytest.raises(AttributeError, match="no attribute 'opne_image'"):
            nbdserve.opne_image  # type: ignore[attr-defined]  # noqa: B018

    def test_importing_loads_nothing_of_the_engine(self) -> None:
        program = (
            "import sys, nbdserve\n"
            "heavy = {'asyncio', 'uvloop', 'structlog', 'nbdserve.formats'}\n"
            "print(heavy & set(sys.modules))"
        )
        result = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        assert result.stdout == "set()\n"

    async def test_writethrough(self, tmp_path: Path) -> None:
        path = tmp_path / "disk.raw"
        path.write_bytes(bytes(1000))
        async with nbdserve.open_image(
            path, format="raw", cache="writethrough"
        ) as image:
            await image.write(0, b"durable")
        assert path.read_bytes()[:7] == b"durable"


async def test_whoever_gives_up_leaves_nothing_open(tmp_path: Path) -> None:
    image = create(tmp_path / "a.qcow2")
    before = descriptors()
    for _ in range(10):
        opening = asyncio.create_task(
            chain.open_chain(image, ChainOptions(), drivers())
        )
        await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
    assert descriptors() == before
