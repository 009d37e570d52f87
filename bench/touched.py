"""What patch files change: by projection and layer, and how far two of them agree."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from qresafe.stages import qpatch

LAYER = re.compile(r"layers\.(\d+)\..*?(\w+)_proj$")


def touched_shares(files: Iterable[Path]) -> dict[tuple[str, int], float]:
    """Return (projection, layer) -> the mean share of its codes that the patches change."""
    each: dict[tuple[str, int], list[float]] = {}
    patches = [changes_of(path) for path in files]
    for name in dict.fromkeys(name for patch in patches for name in patch):
        if found := LAYER.search(name):
            shares = [len(p[name][1]) / p[name][0] if name in p else 0.0 for p in patches]
            each[found[2], int(found[1])] = shares
    return {place: sum(shares) / len(patches) for place, shares in each.items()}


def rank_agreement(files: Iterable[Path]) -> float | None:
    """Return how alike patches rank the places they change: 1 in the same order, 0 by chance.

    Spearman's correlation of the shares by projection and layer, the mean over pairs of patches.

    Returns:
        None for fewer than two patches.
    """
    each = [touched_shares([path]) for path in files]
    places = sorted({place for shares in each for place in shares})
    lists = [[shares.get(place, 0.0) for place in places] for shares in each]
    found = [float(spearmanr(a, b).statistic) for a, b in itertools.combinations(lists, 2)]
    return sum(found) / len(found) if found else None


def overlaps(patch: Path, other: Path) -> tuple[float, float] | None:
    """Return the share of `patch`'s changed codes that `other` changes too, and that by chance.

    By chance: `other`'s share of the codes of the layers that either changes.

    Returns:
        None where `patch` changes nothing.
    """
    mine, theirs = changes_of(patch), changes_of(other)
    count = sum(len(positions) for _, positions in mine.values())
    if not count:
        return None
    shared = sum(
        len(np.intersect1d(positions, theirs[name][1], assume_unique=True))
        for name, (_, positions) in mine.items()
        if name in theirs
    )
    sizes = {name: size for found in (mine, theirs) for name, (size, _) in found.items()}
    changed = sum(len(positions) for _, positions in theirs.values())
    return shared / count, changed / sum(sizes.values())


def changes_of(file: Path) -> dict[str, tuple[int, np.ndarray]]:
    """Return layer -> how many codes it has, and the sorted positions of those that change."""
    changes = qpatch.read(file)[1].codes
    return {name: (change.size, change.positions.numpy()) for name, change in changes.items()}
