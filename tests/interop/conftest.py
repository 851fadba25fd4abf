"""Fixtures for tests with real clients: an image in every flavour, served for real."""

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.images import FLAVOURS, Image
from tests.helpers.psk import python_with_psk
from tests.helpers.servers import Server, server_under_test

#: The last line of `tests/run` says so.
collect_ignore = [] if python_with_psk() else ["test_tls_psk.py"]


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Image]:
    """Makes each flavour once; tests work on copies."""

    @functools.cache
    def original(flavour: str) -> Image:
        return FLAVOURS[flavour](tmp_path_factory.mktemp(flavour), "disk")

    return original


@pytest.fixture(params=list(FLAVOURS))
def image(
    request: pytest.FixtureRequest,
    originals: Callable[[str], Image],
    tmp_path: Path,
) -> Image:
    """One image of each flavour; a test picks some with indirect parameters."""
    return originals(request.param).copied_to(tmp_path)


@pytest.fixture(params=["tcp", "unix"])
def transport(request: pytest.FixtureRequest) -> str:
    """Each way to reach a server."""
    name: str = request.param
    return name


@pytest.fixture
def server(image: Image, transport: str, tmp_path: Path) -> Iterator[Server]:
    """The image on the network. A test that looks at the file afterwards stops it."""
    server = server_under_test(
        image.path,
        tmp_path / "server",
        image_format=image.format,
        transport=transport,
    )
    with server:
        yield server
        sys.stderr.write(server.stderr)  # pytest shows it when the test failed


@pytest.fixture
def uri(server: Server, transport: str) -> str:
    """Where clients find the image."""
    return server.uri(transport)
