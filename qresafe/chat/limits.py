"""Requests and tokens per minute, kept by giving every request a time slot of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class RateLimit:
    """Spaces requests out so that no minute holds more than is allowed; safe between threads.

    A request waits for as long as its share of a minute takes: 1 / requests, or its tokens /
    tokens, whichever is longer. Spread evenly, there are no bursts to be punished for.

    Args:
        requests: The most requests per minute; None: any number.
        tokens: The most tokens per minute, prompts and answers; None: any number.
        clock: Seconds that never go back.
        sleep: Waits so many seconds.
    """

    def __init__(
        self,
        requests: float | None,
        tokens: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._requests, self._tokens = requests, tokens
        self._clock, self._sleep = clock, sleep
        self._lock, self._free = threading.Lock(), clock()

    def wait(self, tokens: int) -> None:
        """Wait for a slot for a request of about `tokens` tokens."""
        length = self._length(tokens)
        if not length:
            return
        with self._lock:
            start = max(self._clock(), self._free)
            self._free = start + length
        if (pause := start - self._clock()) > 0:
            self._sleep(pause)

    def correct(self, expected: int, used: int) -> None:
        """Lengthen or shorten what lies ahead when a request took other tokens than expected."""
        with self._lock:
            self._free += self._length(used) - self._length(expected)

    def _length(self, tokens: int) -> float:
        by_requests = 60.0 / self._requests if self._requests else 0.0
        by_tokens = 60.0 * tokens / self._tokens if self._tokens else 0.0
        return max(by_requests, by_tokens)
