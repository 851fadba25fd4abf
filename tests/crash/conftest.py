"""Images made once, a pool that stays small, and the count of states at the end."""

from collections.abc import Callable

import pytest

from nbdserve.formats.mapped import pool
from nbdserve.formats.qcow2 import compacting_pool, compaction
from tests.crash.examine import TOTAL
from tests.crash.flavours import Image, make

MakeImage = Callable[[str], Image]


@pytest.fixture(scope="session")
def image_of(tmp_path_factory: pytest.TempPathFactory) -> MakeImage:
    """Return the image of a flavour, made when first asked for."""
    made: dict[str, Image] = {}

    def image(name: str) -> Image:
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return image


@pytest.fixture(autouse=True)
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the pool from growing when it is emptied in haste."""
    monkeypatch.setattr(pool, "_MOST", 0)


@pytest.fixture(autouse=True)
def small_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let compaction of a small image take many steps."""
    monkeypatch.setattr(compaction, "_BATCH", 8192)
    monkeypatch.setattr(compaction, "_COMMIT", 16384)
    monkeypatch.setattr(compaction, "_CUT", 32768)
    monkeypatch.setattr(compacting_pool, "_CLUSTERS", 4)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many states were tried."""
    if not TOTAL.states and not TOTAL.violations:
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in TOTAL.states.most_common())
    terminalreporter.write_line(
        f"crash states: {TOTAL.distinct} distinct tried, "
        f"{len(TOTAL.violations)} violations ({kinds})"
    )
