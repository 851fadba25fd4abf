"""What can be judged before anything is opened, is."""

from dataclasses import replace
from typing import Any

import pytest

from nbdserve.config.model import ImageConfig, ServeConfig, TcpAddress, VsockAddress
from nbdserve.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "name", "path"),
    [
        ("disk.qcow2", "disk", "disk.qcow2"),
        ("/srv/vm.tar.qcow2", "vm.tar", "/srv/vm.tar.qcow2"),
        ("/dev/loop0", "loop0", "/dev/loop0"),
        ("root=vm.qcow2", "root", "vm.qcow2"),
        ("root=/srv/a=b.img", "root", "/srv/a=b.img"),
        ("=disk.img", "", "disk.img"),
        ("dir/a=b.img", "a=b", "dir/a=b.img"),
        ("./a=b.img", "a=b", "./a=b.img"),
        ("söda=x", "söda", "x"),
        (".hidden", ".hidden", ".hidden"),
    ],
)
def test_the_name_precedes_the_first_equals_sign_unless_a_slash_does(
    text: str, name: str, path: str
) -> None:
    assert ImageConfig.parse(text) == ImageConfig(name, path)


@pytest.mark.parametrize("text", ["", "name=", "="])
def test_a_missing_path_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="names no image"):
        ImageConfig.parse(text)


def test_names_that_the_protocol_cannot_carry_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most 4096"):
        ImageConfig.parse("x" * 4097 + "=disk.img")
    with pytest.raises(ConfigError, match="not valid UTF-8"):
        ImageConfig.parse("\udcff.img")
    assert ImageConfig.parse("x" * 4096 + "=disk.img").name == "x" * 4096


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:10809", "127.0.0.1", 10809),
        ("storage.example:0", "storage.example", 0),
        ("storage.example", "storage.example", 10809),
        (":1234", "", 1234),
        ("[::1]:1234", "::1", 1234),
        ("[::]", "::", 10809),
    ],
)
def test_addresses_are_host_and_port(text: str, host: str, port: int) -> None:
    assert TcpAddress.parse(text) == TcpAddress(host, port)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("::1:10809", "in brackets"),
        ("localhost:nbd", "from 0 to 65535"),
        ("localhost:65536", "from 0 to 65535"),
        ("localhost:-1", "from 0 to 65535"),
        ("localhost:" + "9" * 5000, "from 0 to 65535"),
        ("localhost:", "from 0 to 65535"),
        ("10809", "did you mean :10809"),
        ("", "write :10809 for all addresses"),
    ],
)
def test_what_is_no_address_is_refused_with_a_hint(text: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        TcpAddress.parse(text)


def test_two_images_of_one_name_are_refused_by_name() -> None:
    images = (ImageConfig.parse("a/disk.img"), ImageConfig.parse("b/disk.qcow2"))
    with pytest.raises(ConfigError) as caught:
        ServeConfig(images)
    assert all(word in str(caught.value) for word in ("'disk'", "a/disk.img", "NAME="))


def test_create_needs_one_writable_image() -> None:
    one, two = ImageConfig("a", "a"), ImageConfig("b", "b")
    with pytest.raises(ConfigError, match="--create makes one image"):
        ServeConfig((one, two), create_size=1)
    with pytest.raises(ConfigError, match="--create and --read-only exclude"):
        ServeConfig((replace(one, read_only=True),), create_size=1)


def test_strings_and_sockets_that_do_not_fit_are_refused() -> None:
    image = ImageConfig("a", "a")
    with pytest.raises(ConfigError, match="description"):
        ImageConfig("a", "a", description="x" * 4097)
    with pytest.raises(ConfigError, match="too long for a Unix socket"):
        ServeConfig((image,), unix=("/tmp/" + "x" * 103,))
    for place in ({"unix": ("",)}, {"control": ""}):
        with pytest.raises(ConfigError, match="'' is no path"):
            ServeConfig((image,), **place)
    assert ServeConfig((image,), unix=("/tmp/" + "x" * 102,)).unix


def test_bitmaps_have_names_of_their_own() -> None:
    image = ImageConfig("disk", "disk.qcow2", bitmaps=("a", "b"))
    assert image.bitmaps == ("a", "b")
    for names in [("",), ("a", "a"), ("x" * 4096,), ("nul\0",)]:
        with pytest.raises(ConfigError, match="bitmap"):
            ImageConfig("disk", "disk.qcow2", bitmaps=names)


@pytest.mark.parametrize(
    ("places", "named"),
    [
        ({"listen": (TcpAddress("::1", 10809),) * 2}, r"--listen \[::1\]:10809"),
        ({"unix": ("/run/a", "/run/./a")}, "--unix /run/a"),
        ({"vsock": (VsockAddress(None, 7), VsockAddress(None, 7))}, "--vsock 7"),
    ],
)
def test_a_place_is_given_once(places: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named} is given twice$"):
        ServeConfig(images=(ImageConfig("a", "a"),), **places)


def test_several_free_ports_are_no_repetition() -> None:
    anywhere = TcpAddress("127.0.0.1", 0)
    ServeConfig(images=(ImageConfig("a", "a"),), listen=(anywhere, anywhere))
