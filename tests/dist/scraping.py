"""What the one Ray node of a test exports for Prometheus."""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

from qresafe.metrics import METRICS

SUFFIXES = {"counter": "_total", "gauge": "", "histogram": "_bucket"}

Scraped = dict[str, list[tuple[str, float]]]


def exported(name: str) -> str:
    return f"ray_{name}{SUFFIXES[METRICS[name].kind]}"


def scrape_until(enough: Callable[[Scraped], bool], *labels: str, seconds: float = 120) -> Scraped:
    """Return what is exported with these labels once it is enough, or after `seconds`.

    Processes report twice a second (`RAY_metrics_report_interval_ms` in the tests' sessions), each
    when it comes to it; the caller asserts what should be there.
    """
    deadline = time.monotonic() + seconds
    while not enough(found := scrape(*labels)) and time.monotonic() < deadline:
        time.sleep(0.3)
    return found


@contextmanager
def watching(name: str, *labels: str) -> Iterator[list[float]]:
    """Yield a list that gets what a gauge stands at while the block runs, three times a second.

    Ray forgets a gauge two seconds after the process that set it has ended.
    """
    seen: list[float] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.3):
            seen.append(total(scrape(*labels), name))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join(30)


def scrape(*labels: str) -> Scraped:
    """Return exported name -> its (labels, value), of our metrics that have `labels`."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:  # the node's agent is still starting
        return {}
    found: Scraped = {}
    for line in lines:
        match = re.fullmatch(r"(ray_qresafe_\w+)\{(.*)\} (\S+)", line)
        if match and all(label in match[2] for label in labels):
            found.setdefault(match[1], []).append((match[2], float(match[3])))
    return found


def total(found: Scraped, name: str, *labels: str) -> float:
    """Return the sum over all processes that report, of what has `labels`; 0 without any."""
    rows = found.get(exported(name), [])
    return sum(value for given, value in rows if all(label in given for label in labels))
