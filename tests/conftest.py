"""Fixtures for all tests: every async test runs on asyncio's loop and on uvloop."""

import asyncio
import signal
from collections.abc import Callable, Mapping

import pytest
import uvloop


def pytest_configure() -> None:
    """Let Ctrl-C mean something to us and to the programs that tests start.

    A shell without job control starts what ends in `&` with SIGINT ignored. That
    is inherited, and a program that finds it so leaves it so.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every async test on both loops."""
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
