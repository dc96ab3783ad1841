"""Waits that come again, by a clock of their own: where they nap, and how late they notice."""

from __future__ import annotations

import pytest

from ef_horovod.errors import CollectiveTimeoutError
from ef_horovod.transports.timeouts import waiting

POLL, YIELD = 1e-6, 2e-6  # seconds


class Clock:
    """Stands in for `time` and `os`; counts what a waiting thread does."""

    def __init__(self) -> None:
        self.now = 100.0
        self.naps: list[float] = []
        self.yields = 0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if seconds:
            self.naps.append(seconds)

    def sched_yield(self) -> None:
        self.now += YIELD
        self.yields += 1


class Waits:
    """A program that waits once in each step."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.waits = clock, waiting.RecurringWaits()

    def late(self, seconds: float, timeout: float = 300.0, name: str = "bucket.0") -> float:
        """Wait for what takes so long; seconds after its end."""
        self.clock.naps.clear()
        self.clock.yields = 0
        end = self.clock.now + seconds

        def done() -> bool:
            self.clock.now += POLL
            return self.clock.now >= end

        self.waits.until(name, done, timeout, lambda: "rank 0 waited")
        return self.clock.now - end


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(waiting, "time", clock)
    monkeypatch.setattr(waiting.os, "sched_yield", clock.sched_yield)
    return clock


@pytest.fixture
def waits(clock: Clock) -> Waits:
    return Waits(clock)


@pytest.mark.parametrize("seconds", [0.002, 0.01, 0.03])
def test_most_of_an_equal_wait_is_one_nap_and_its_end_is_seen_at_once(clock, waits, seconds):
    first = waits.late(seconds)
    assert clock.yields == 0, "nobody knows yet when it is due"
    for _ in range(15):
        late = waits.late(seconds)
    assert late < 4 * (POLL + YIELD) < first
    assert len(clock.naps) == 1
    assert clock.naps[0] == pytest.approx(0.75 * seconds, rel=0.02)


def test_long_waits_take_a_core_for_a_hundredth_of_a_second_at_most(clock, waits):
    for seconds in [1.0] * 20 + [1.2]:
        late = waits.late(seconds)
        assert clock.yields * YIELD <= 0.01
    assert late < 1.1e-3, "then they nap for a millisecond"


@pytest.mark.parametrize("once", [0.2, 3.0, 100.0])
def test_one_long_wait_makes_no_other_one_long(waits, once):
    """The first step, in which another rank compiles; or a moment without a network."""
    for before in (0, 20):
        for _ in range(before):
            waits.late(0.02)
        waits.late(once)
        assert waits.late(0.02) < 0.005


def test_a_network_that_gets_faster_is_noticed(waits):
    for _ in range(30):
        waits.late(0.2)
    assert sum(waits.late(0.01) for _ in range(10)) < 0.3
    assert waits.late(0.01) < 1e-3


def test_what_is_there_already_costs_nothing(clock, waits):
    for _ in range(20):
        waits.late(0.02)
    for _ in range(3):
        before = clock.now
        waits.late(0.0)
        assert clock.now - before < 4 * POLL
    assert not clock.naps


def test_names_have_waits_of_their_own(clock, waits):
    for _ in range(20):
        waits.late(0.05)
    assert waits.late(0.001, name="bucket.1") < 1e-3


@pytest.mark.parametrize("usual", [0.001, 0.05, 20.0])
def test_the_limit_holds_whatever_was_usual(clock, waits, usual):
    for _ in range(30):
        waits.late(usual)
    begin = clock.now
    with pytest.raises(CollectiveTimeoutError, match="rank 0 waited"):
        waits.late(50.0, timeout=8.0)
    assert 8.0 <= clock.now - begin < 8.1


def test_polls_stop_with_the_wait(clock):
    answers = iter([False, False, True, False])
    waiting.wait_until(lambda: next(answers), 1.0, lambda: "rank 0 waited")
    assert list(answers) == [False]
