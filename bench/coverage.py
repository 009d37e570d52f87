"""How often a 95 % interval holds the truth, and how often a gate decides wrongly.

    make bench-statistics               # some minutes: docs/results-statistics.md
    python -m bench.coverage --quick    # few draws; prints only

Wilson's coverage is a sum over all outcomes; everything else is simulated from a fixed seed. The
page also holds what `bench.streaming` printed.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from qresafe.stages.clusters import at_k, ratio_interval, share_interval
from qresafe.stages.paired import change_of, required_pairs, score_interval
from qresafe.stages.statistics import (
    holm,
    mcnemar,
    mean_interval,
    minimum_detectable_effect,
    wilson,
)

RESULTS = Path(__file__).parents[1] / "docs" / "results-statistics.md"
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 0.5)
SIZES = (20, 50, 100, 300, 520, 1000)
# (clusters, prompts in each, share of yes, correlation within a cluster)
CLUSTERED = (
    (176, 2, 0.10, 0.5),
    (100, 5, 0.05, 0.2),
    (40, 7, 0.13, 0.4),
    (40, 7, 0.50, 0.4),
    (40, 7, 0.03, 0.4),
    (20, 15, 0.30, 0.2),
)
# (prompts, share gained, share lost)
PAIRED = (
    (50, 0.30, 0.10),
    (100, 0.05, 0.05),
    (300, 0.02, 0.01),
    (300, 0.10, 0.05),
    (300, 0.005, 0.005),
    (520, 0.002, 0.0),
)
Table = tuple[str, list[str], list[list[str]]]  # heading, header, rows


def wilson_table() -> Table:
    """Return Wilson's exact coverage by share and n."""
    rows = [[f"{p:g}", *(percent(wilson_coverage(n, p)) for n in SIZES)] for p in SHARES]
    return "Wilson's interval, exact", ["true share", *(f"n {n}" for n in SIZES)], rows


def wilson_coverage(n: int, p: float) -> float:
    """Return P(interval holds p) of n independent answers, summed over all outcomes."""
    ends = [wilson(k, n) for k in range(n + 1)]
    holds = np.array([low <= p <= high for low, high in ends])
    return float(stats.binom.pmf(np.arange(n + 1), n, p)[holds].sum())


def cluster_table(draws: int, rng: Any) -> Table:
    """Return the coverage of the cluster interval of a share, and Wilson's on the same answers."""
    rows = []
    for clusters, size, p, alike in CLUSTERED:
        codes = np.repeat(np.arange(clusters), size)
        held = np.zeros(2)
        for _ in range(draws):
            said = beta_clusters(rng, clusters, size, p, alike).ravel()
            ends = share_interval(said, codes), wilson(int(said.sum()), said.size)
            held += [low <= p <= high for low, high in ends]
        rows.append([f"{clusters} × {size}", f"{p:g}", f"{alike:g}", *map(percent, held / draws)])
    header = ["clusters × prompts", "true share", "correlation", "cluster interval", "Wilson"]
    return "A share of answers in clusters", header, rows


def paired_table(draws: int, rng: Any) -> Table:
    """Return the coverage of the score interval of a paired change."""
    rows = []
    for n, gained, lost in PAIRED:
        counts = rng.multinomial(n, [gained, lost, 1 - gained - lost], 5 * draws)
        kinds, times = np.unique(counts, axis=0, return_counts=True)
        held = 0
        for (up, down, _), count in zip(kinds, times, strict=True):
            low, high = score_interval(up, down, n)
            held += count * (low <= gained - lost <= high)
        rows.append([str(n), f"{gained:g}", f"{lost:g}", percent(held / (5 * draws))])
    return "The change of a share, paired", ["n", "gained", "lost", "score interval"], rows


def paired_cluster_table(draws: int, rng: Any) -> Table:
    """Return the coverage of the paired interval where prompts come in clusters."""
    rows = []
    for clusters, size, gained, lost, alike in (
        (40, 7, 0.02, 0.02, 0.4),
        (40, 7, 0.10, 0.05, 0.4),
        (100, 5, 0.05, 0.05, 0.2),
        (176, 2, 0.05, 0.02, 0.5),
    ):
        codes = np.repeat(np.arange(clusters), size)
        held = np.zeros(2)
        for _ in range(draws):
            before, after = flipped_clusters(rng, clusters, size, gained, lost, alike)
            moved = after - before
            plain = score_interval((moved > 0).sum(), (moved < 0).sum(), len(moved))
            change = change_of(before, after, codes)
            ends = (change.low, change.high), plain
            held += [low <= gained - lost <= high for low, high in ends]
        told = [f"{clusters} × {size}", f"{gained:g}", f"{lost:g}", f"{alike:g}"]
        rows.append([*told, *map(percent, held / draws)])
    header = ["clusters × prompts", "gained", "lost", "correlation", "ours", "score alone"]
    return "The change of a share, paired, in clusters", header, rows


def mean_table(draws: int, rng: Any) -> Table:
    """Return the coverage of the intervals of means: ROUGE-L-like scores, and ASR@k."""
    rows = []
    for n in (20, 60, 220):
        held = 0
        for _ in range(draws):
            low, high = mean_interval(rng.beta(4, 1, n))
            held += low <= 0.8 <= high
        rows.append([f"mean of {n} scores, Beta(4, 1), Student's t", percent(held / draws)])
    for n, size in ((60, 3), (40, 7)):
        held = 0
        for _ in range(draws):
            scores = 0.7 * rng.beta(4, 1, n)[:, None] + 0.3 * rng.beta(4, 1, (n, size))
            low, high = ratio_interval(scores.sum(1), np.full(n, size))
            held += low <= 0.8 <= high
        rows.append([f"mean of {n} × {size} scores, cluster bootstrap", percent(held / draws)])
    for n, k in ((100, 1), (100, 5), (300, 10)):
        held, samples = 0, 20
        # E[1 - (1 - q)^k] of q ~ Beta(.5, 4): 1 - B(.5, 4 + k) / B(.5, 4)
        truth = 1 - np.exp(_log_beta(0.5, 4 + k) - _log_beta(0.5, 4))
        for _ in range(draws):
            yes = rng.binomial(samples, rng.beta(0.5, 4, n))
            low, high = share_interval(at_k(yes, np.full(n, samples), k), np.arange(n), least=0.0)
            held += low <= truth <= high
        rows.append([f"ASR@{k} of {n} prompts, {samples} samples each", percent(held / draws)])
    return "Means and ASR@k", ["estimate", "coverage"], rows


def decision_table(draws: int, rng: Any) -> Table:
    """Return how often tests and the gate are wrong, and how often the promised n decides."""
    flips = rng.binomial(300, 0.05, draws)
    false = np.mean([mcnemar(int(up), int(n - up)) <= 0.05 for up, n in _halved(rng, flips)])
    family = np.mean([min(holm(list(rng.random(12)))) <= 0.05 for _ in range(draws)])
    d = minimum_detectable_effect(300)
    seen = np.mean([mcnemar(int(k), 0) <= 0.05 for k in rng.binomial(300, d, draws)])
    rows = [
        ["McNemar at 5 %, no change, 300 prompts of which 5 % flip: significant", percent(false)],
        ["Holm over 12 uniform p: any below 5 %", percent(family)],
        [f"minimum detectable effect of 300 prompts ({100 * d:.1f} points): seen", percent(seen)],
    ]
    for threshold, flip in ((0.02, 0.0), (0.02, 0.03), (0.03, 0.10)):
        n = required_pairs(threshold, 0.0, flip) or 0
        passed = decided(rng, draws, n, flip / 2, flip / 2, threshold)
        told = f"n for {100 * threshold:g} points, {100 * flip:g} % flip both ways: {n}; passes"
        rows.append([told, percent(passed)])
        wrong = decided(rng, draws, n, flip / 2 + threshold, flip / 2, threshold)
        rows.append(["the same n, truly worse by the threshold: passes", percent(wrong)])
    return "Tests, power and the gate's rule", ["what", "share of draws"], rows


def _halved(rng: Any, flips: Any) -> Iterator[tuple[int, int]]:
    """Yield (flips of one direction, all flips), each way equally likely."""
    return zip(rng.binomial(flips, 0.5), flips, strict=True)


def decided(rng: Any, draws: int, n: int, gained: float, lost: float, threshold: float) -> float:
    """Return how often the upper end of the score interval is at or below the threshold."""
    counts = rng.multinomial(n, [gained, lost, 1 - gained - lost], draws)
    kinds, times = np.unique(counts, axis=0, return_counts=True)
    passed = [score_interval(up, down, n).high <= threshold for up, down, _ in kinds]
    return float((times * passed).sum() / draws)


def beta_clusters(rng: Any, clusters: int, size: int, p: float, alike: float) -> Any:
    """Return 0 or 1 as (clusters, size): share p, correlation `alike` within a cluster."""
    heads = 1 / alike - 1
    chance = rng.beta(heads * p, heads * (1 - p), clusters)
    return (rng.random((clusters, size)) < chance[:, None]).astype(float)


def flipped_clusters(
    rng: Any, clusters: int, size: int, gained: float, lost: float, alike: float
) -> tuple[Any, Any]:
    """Return before and after, where the kinds of change are Dirichlet-distributed by cluster."""
    heads = 1 / alike - 1
    chance = rng.dirichlet([heads * gained, heads * lost, heads * (1 - gained - lost)], clusters)
    drawn = rng.random((clusters, size))
    up = drawn < chance[:, :1]
    down = ~up & (drawn < chance[:, :2].sum(1, keepdims=True))
    before = np.where(down, 1.0, 0.0)
    return before.ravel(), np.where(up, 1.0, np.where(down, 0.0, before)).ravel()


def percent(share: float) -> str:
    """Return a share in per cent, one decimal."""
    return f"{100 * share:.1f}"


def _log_beta(a: float, b: float) -> float:
    from scipy.special import betaln

    return float(betaln(a, b))


def tables(draws: int) -> Iterator[Table]:
    """Yield every table, each from a stream of its own."""
    yield wilson_table()
    made: Sequence[Callable[[int, Any], Table]] = (
        cluster_table,
        paired_table,
        paired_cluster_table,
        mean_table,
        decision_table,
    )
    for place, make in enumerate(made):
        yield make(draws, np.random.default_rng([20261124, place]))


def page(found: Sequence[Table], draws: int, streamed: Sequence[str]) -> str:
    """Return the tables as a Markdown page."""
    today = datetime.date.today().isoformat()
    lines = [
        "# Statistics and streaming, measured",
        f"`make bench-statistics`, {today}. {draws:,} draws a row (five times as many for the "
        "paired score interval), so a coverage of 95 % is known to about "
        f"{200 * (0.95 * 0.05 / draws) ** 0.5:.1f} points. What each number means: "
        "[statistics.md](statistics.md).",
        "",
        "Figures are per cent of draws in which a 95 % interval held the truth; 93 to 97 is the "
        "band that we ask for. Where a row leaves it, it is shown as it is.",
    ]
    for heading, header, rows in found:
        lines += ["", f"## {heading}", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += [
        "",
        "## Memory of importing, judging (two judges) and comparing",
        "Two JSONL files of completions, each step in a process of its own (`python -m "
        "bench.streaming`); about 370 MiB of each are libraries (torch, pyarrow, scipy).",
        *streamed,
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--streamed", type=Path, help="what bench.streaming printed")
    args = parser.parse_args()
    if not (args.quick or args.streamed):
        parser.error("give --streamed FILE, or --quick")
    found = list(tables(100 if args.quick else args.draws))
    if args.quick:
        print(page(found, 100, ["(not measured)"]))
        return
    text = page(found, args.draws, args.streamed.read_text().splitlines())
    print(text)
    RESULTS.write_text(text)


if __name__ == "__main__":
    main()
