"""What logs look like."""

import json
from collections.abc import Iterator

import pytest
import structlog

from nbdserve.observe.logs import configure


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def test_json_is_one_object_a_line_on_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure("json", "info")
    log = structlog.get_logger().bind(peer="1.2.3.4:5")
    log.debug("hidden")
    log.info("connection opened", export="disk")
    log.error("failed", exc_info=ValueError("oops"))
    out, err = capsys.readouterr()
    opened, failed = (json.loads(line) for line in err.splitlines())
    assert out == ""
    assert opened.pop("timestamp").endswith("Z")
    assert opened == {
        "event": "connection opened",
        "export": "disk",
        "level": "info",
        "peer": "1.2.3.4:5",
    }
    assert failed["exception"][0]["exc_type"] == "ValueError"


def test_console_lines_are_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    configure("console", "warning")
    log = structlog.get_logger()
    log.info("hidden")
    log.warning("disk is slow", seconds=3)
    err = capsys.readouterr().err
    assert "disk is slow" in err
    assert "seconds=3" in err
    assert "hidden" not in err
    assert "\x1b" not in err
