"""Rate limits by a clock of the test's own, and between threads by counting."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from qresafe.chat.limits import RateLimit


class Clock:
    """A clock that stands still but for sleeping."""

    def __init__(self) -> None:
        self.now, self.slept = 100.0, 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


def starts(limit: RateLimit, clock: Clock, tokens: list[int]) -> list[float]:
    """Return when requests of so many tokens begin, in seconds from the first."""
    found = []
    for count in tokens:
        limit.wait(count)
        found.append(clock.now - 100.0)
    return found


def test_thirty_requests_a_minute_are_two_seconds_apart() -> None:
    clock = Clock()
    limit = RateLimit(30, None, clock, clock.sleep)
    assert starts(limit, clock, [10, 10, 10]) == [0.0, 2.0, 4.0]


def test_tokens_take_their_time() -> None:
    clock = Clock()
    limit = RateLimit(None, 600, clock, clock.sleep)  # 10 tokens a second
    assert starts(limit, clock, [50, 20, 10]) == [0.0, 5.0, 7.0]


def test_the_stricter_limit_holds() -> None:
    clock = Clock()
    limit = RateLimit(30, 600, clock, clock.sleep)
    assert starts(limit, clock, [50, 5, 5]) == [0.0, 5.0, 7.0]


def test_a_guess_of_tokens_is_corrected() -> None:
    clock = Clock()
    limit = RateLimit(None, 600, clock, clock.sleep)
    limit.wait(50)  # reserves 5 s
    limit.correct(50, 20)  # took 2 s' worth
    assert starts(limit, clock, [10]) == [2.0]


def test_idle_time_is_not_saved_up() -> None:
    clock = Clock()
    limit = RateLimit(30, None, clock, clock.sleep)
    limit.wait(1)
    clock.now += 3600
    assert starts(limit, clock, [1, 1]) == [3600.0, 3602.0]


def test_without_limits_nobody_waits() -> None:
    clock = Clock()
    assert starts(RateLimit(None, None, clock, clock.sleep), clock, [10**9] * 3) == [0.0] * 3


def test_threads_get_different_slots() -> None:
    pauses: list[float] = []
    limit = RateLimit(60, None, clock=lambda: 0.0, sleep=pauses.append)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(limit.wait, [1] * 50))
    assert sorted(pauses) == [float(second) for second in range(1, 50)]
