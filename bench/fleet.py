"""Our schedule of batches in virtual time: what `dist.data` and Ray Data's actor pool do.

The pool hands each batch, in the plan's order, to the actor with the fewest batches in flight, as
long as one has room; an actor works through its own in order. One driver does the handing out,
a batch at a time. What a batch takes is given, so nothing here depends on the machine.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """What a batch costs beside its own computing, in seconds.

    Attributes:
        driver: Of the driver's time: it serves one batch after another, for all actors.
        reply: From the end of a batch until the driver knows, and the way back.
        gap: On the actor, between two batches that it already holds.
    """

    driver: float = 0.0
    reply: float = 0.0
    gap: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """Who computed which batch, and when.

    Attributes:
        actor: Of each batch.
        began: Of each batch, in seconds.
        ended: Of each batch, in seconds.
        ready: When each actor was there.
    """

    actor: list[int]
    began: list[float]
    ended: list[float]
    ready: list[float]

    @property
    def end(self) -> float:
        """When the last batch ended."""
        return max(self.ended)

    @property
    def busy(self) -> float:
        """Computing time, as a share of the time from each actor's start to the last batch's end.

        An actor that comes after the end has no time to be idle in.
        """
        computed = sum(end - begin for begin, end in zip(self.began, self.ended, strict=True))
        return computed / sum(max(0.0, self.end - ready) for ready in self.ready)


def simulate(
    seconds: Sequence[float], ready: Sequence[float], in_flight: int, costs: Costs
) -> Schedule:
    """Return the schedule of a pool.

    Args:
        seconds: What each batch takes, in the order of the plan.
        ready: When each actor is there.
        in_flight: The most batches that an actor holds, the running one included.
        costs: See there.
    """
    began, ended, actor_of = [0.0] * len(seconds), [0.0] * len(seconds), [-1] * len(seconds)
    free = list(ready)
    held = [0] * len(ready)
    news = [(at, actor, False) for actor, at in enumerate(ready)]
    heapq.heapify(news)
    with_room: list[tuple[int, int]] = []  # (batches held, actor); an entry may be out of date
    driver, following = 0.0, 0
    while news:
        at, actor, finished = heapq.heappop(news)
        driver = max(driver, at)
        held[actor] -= finished
        heapq.heappush(with_room, (held[actor], actor))
        while following < len(seconds) and with_room:
            known, actor = heapq.heappop(with_room)
            if known != held[actor] or known >= in_flight:
                continue
            driver += costs.driver
            start = max(driver, free[actor] + costs.gap * (known > 0))
            began[following], actor_of[following] = start, actor
            free[actor] = ended[following] = start + seconds[following]
            heapq.heappush(news, (free[actor] + costs.reply, actor, True))
            held[actor] += 1
            heapq.heappush(with_room, (held[actor], actor))
            following += 1
    return Schedule(actor_of, began, ended, list(ready))
