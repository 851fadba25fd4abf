"""Whatever is in an image: typed errors, bounded memory and time, and no other file.

Valid images of every kind are broken by structure and by bytes, and driven through
everything that can be done with one. NBDSERVE_FULL=1 tries many more, new ones each
time. What was found is in `found.py` and is tried again each time.
"""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.hostile import driver
from tests.hostile.driver import (
    MOST_MEMORY,
    TRIED,
    Driver,
    HarmError,
    bounded,
    watched,
)
from tests.hostile.found import FOUND
from tests.hostile.mutations import Mutation, mutated, mutations
from tests.hostile.specimens import DATA_FILE, NAMES, neighbours, specimen

FULL = bool(os.environ.get("NBDSERVE_FULL"))
EXAMPLES = 500 if FULL else 20
CANARY = "canary"

SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=not FULL,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)

pytestmark = [pytest.mark.interop, pytest.mark.timeout(3600 if FULL else 120)]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder in memory: this is not about disks."""
    with TemporaryDirectory(prefix="nbdserve-hostile-", dir="/dev/shm") as name:
        yield Path(name)


def drive(folder: Path, name: str, changes: list[Mutation]) -> None:
    """Break an image, and drive it."""
    drive_content(folder, mutated(specimen(name), changes))


def drive_content(folder: Path, content: bytes) -> None:
    """Drive one image, and look at what else is in its folder."""
    for each in folder.iterdir():
        each.unlink()
    neighbours(folder)
    (folder / CANARY).write_bytes(b"untouched")
    before = {each.name: each.read_bytes() for each in folder.iterdir()}
    path = folder / "image"
    path.write_bytes(content)
    work = Driver(path)
    with bounded(), watched(folder, {CANARY, DATA_FILE}):
        asyncio.run(work.run())
    TRIED["images"] += 1
    TRIED["writable"] += work.opened
    path.unlink()
    assert {each.name: each.read_bytes() for each in folder.iterdir()} == before


def test_harm_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file that is opened, memory, time, and an error that is none of ours."""
    (folder / CANARY).touch()
    for path in (Path("/etc/passwd"), folder / CANARY, folder.parent):
        with pytest.raises(HarmError, match="opened"), watched(folder, {CANARY}):
            os.close(os.open(path, os.O_RDONLY))
    with pytest.raises(HarmError, match="memory"), bounded():
        assert len(b"x" * (MOST_MEMORY + (8 << 20)))
    monkeypatch.setattr(driver, "MOST_SECONDS", 0.0)
    with pytest.raises(HarmError, match=r"took .* s"), bounded():
        assert folder.exists()
    monkeypatch.undo()
    monkeypatch.setattr(driver, "check_image", lambda path: {}[path])
    with pytest.raises(KeyError):
        drive(folder, "v3", [])


@pytest.mark.parametrize("name", NAMES)
def test_an_image_as_it_is(name: str, folder: Path) -> None:
    drive(folder, name, [])


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_image_breaks_nothing_else(name: str, folder: Path) -> None:
    # tables of 2 MiB take their time
    examples = EXAMPLES // 4 if name == "v3 2M" else EXAMPLES

    @settings(SETTINGS, max_examples=examples)
    @given(changes=mutations)
    def one(changes: list[Mutation]) -> None:
        drive(folder, name, changes)

    one()


def test_what_was_found(folder: Path) -> None:
    for name, changes in FOUND:
        drive(folder, name, [Mutation(*change) for change in changes])


@pytest.mark.parametrize("name", ["v1", "v3", "v3 overlay"])
def test_noise_over_the_front(name: str, folder: Path) -> None:
    """Bytes that nobody has thought of, where the header and its extensions are."""

    @SETTINGS
    @given(noise=st.binary(max_size=2048), at=st.integers(8, 200))
    def one(noise: bytes, at: int) -> None:
        content = bytearray(specimen(name).content)
        content[at : at + len(noise)] = noise
        drive_content(folder, bytes(content))

    one()
