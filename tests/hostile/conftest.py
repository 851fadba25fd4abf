"""The count of images at the end."""

import pytest

from tests.hostile.driver import TRIED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many images were tried."""
    if TRIED["images"]:
        terminalreporter.write_line(
            f"hostile images: {TRIED['images']} tried,"
            f" {TRIED['writable']} of them could be opened for writing"
        )
