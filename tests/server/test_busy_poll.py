"""Staying awake for the next request: for a moment, and only while that pays."""

from collections.abc import Callable

import pytest

from nbdserve.server import busy_poll
from nbdserve.server.busy_poll import BusyPoll

WINDOW_S = 0.0001


class Clockwork:
    """A loop and a clock of which a test has both hands."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.ready: list[Callable[[], object]] = []

    def call_soon(self, callback: Callable[[], object]) -> None:
        self.ready.append(callback)

    def sleeps(self) -> bool:
        """Whether the loop has nothing to do."""
        return not self.ready

    def turn(self, seconds: float) -> None:
        """Let time go by, then one turn of the loop."""
        self.now_s += seconds
        ready, self.ready = self.ready, []
        for callback in ready:
            callback()


@pytest.fixture
def clockwork(monkeypatch: pytest.MonkeyPatch) -> Clockwork:
    clockwork = Clockwork()
    monkeypatch.setattr(busy_poll, "perf_counter", lambda: clockwork.now_s)
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1})
    return clockwork


def poll_on(clockwork: Clockwork, window_s: float = WINDOW_S) -> BusyPoll:
    return BusyPoll(clockwork, window_s)  # type: ignore[arg-type]


def turns_until_awake(clockwork: Clockwork, poll: BusyPoll) -> int:
    """After how many answers the loop stays awake again; nobody asks in time."""
    for count in range(1, 1000):
        poll.expect()
        if not clockwork.sleeps():
            clockwork.turn(2 * WINDOW_S)
            assert clockwork.sleeps()
            return count
    raise AssertionError("never awake again")


def test_it_stays_awake_for_a_moment(clockwork: Clockwork) -> None:
    poll = poll_on(clockwork)
    assert clockwork.sleeps()
    poll.expect()
    for _ in range(9):
        clockwork.turn(WINDOW_S / 10)
        assert not clockwork.sleeps()
    clockwork.turn(WINDOW_S / 5)
    assert clockwork.sleeps()


def test_each_answer_begins_the_moment_anew(clockwork: Clockwork) -> None:
    poll = poll_on(clockwork)
    for _ in range(100):
        poll.expect()
        clockwork.turn(WINDOW_S / 2)
        assert len(clockwork.ready) == 1
    clockwork.turn(WINDOW_S)
    assert clockwork.sleeps()


def test_where_nobody_comes_in_time_it_is_rarely_tried(clockwork: Clockwork) -> None:
    poll = poll_on(clockwork)
    counts = [turns_until_awake(clockwork, poll) for _ in range(9)]
    assert counts == [1, 2, 4, 8, 16, 32, 64, 64, 64]


def test_who_comes_in_time_makes_it_worth_trying(clockwork: Clockwork) -> None:
    poll = poll_on(clockwork)
    for _ in range(9):
        turns_until_awake(clockwork, poll)
    while clockwork.sleeps():
        poll.expect()
    poll.expect()  # in time
    clockwork.turn(2 * WINDOW_S)
    assert turns_until_awake(clockwork, poll) == 2


def test_no_window_and_a_single_processor_do_nothing(
    clockwork: Clockwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    poll = poll_on(clockwork, 0.0)
    poll.expect()
    assert clockwork.sleeps()
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {3})
    poll = poll_on(clockwork)
    poll.expect()
    assert clockwork.sleeps()
