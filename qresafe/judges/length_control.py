"""AlpacaEval's length-controlled win rate (Dubois et al. 2024, arXiv 2404.04475).

The preference is modelled by a logistic regression on three features: tanh of the difference in
length in units of its standard deviation, the instruction's difficulty, and whether the row is
the model's own and not one of the "gamed baselines" (the reference itself asked to be brief or
verbose). The win rate is the mean prediction with the difference in length set to 0. Features,
weights, penalty, folds and the grid of C are those of `alpaca_eval`'s metrics/glm_winrate.py
(`length_controlled_v1`); difficulties and gamed rows are its published df_gamed.csv.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qresafe.errors import DataError

GAMED_WEIGHT = 0.2 / 2  # regularize_to_baseline_lambda over its two gamed baselines
FOLDS = 5
STRENGTHS = np.logspace(-4, 4, 10)  # scikit-learn's own grid of C

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Gamed:
    """The rows of df_gamed.csv.

    Attributes:
        index: The instruction of each row.
        preference: In [0, 1]; NaN where there is none.
        delta_length: Standardized already, as the file holds it.
        difficulty: Of the row's instruction.
        own: 1 where the row is of a model's own output and not of a gamed baseline, else 0.
    """

    index: NDArray[np.int64]
    preference: Floats
    delta_length: Floats
    difficulty: Floats
    own: Floats

    def difficulties(self, index: NDArray[np.int64]) -> Floats:
        """Return the difficulty of each instruction.

        Raises:
            DataError: An instruction has none.
        """
        known = dict(zip(self.index[::-1].tolist(), self.difficulty[::-1].tolist(), strict=True))
        if missing := [place for place in index.tolist() if place not in known]:
            what = f"no difficulty for instruction {missing[0]}"
            remedy = "annotate AlpacaEval's own 805 instructions, in their order"
            raise DataError(what, where="df_gamed.csv", remedy=remedy)
        return np.array([known[place] for place in index.tolist()])


@dataclass(frozen=True)
class LengthControlled:
    """A length-controlled win rate.

    Attributes:
        win_rate: In percent.
        weights: Of length, difficulty and the model, in this order.
        strength: The C that cross-validation chose.
    """

    win_rate: float
    weights: tuple[float, float, float]
    strength: float


def length_controlled(
    index: Sequence[int],
    preferences: Floats,
    lengths: tuple[Sequence[int], Sequence[int]],
    gamed: Gamed,
) -> LengthControlled:
    """Fit the regression and return its prediction at equal lengths.

    Args:
        index: The instruction of each annotation.
        preferences: From 1 to 2, NaN where there is none: such a row is predicted, not learned.
        lengths: Characters of the reference's and of the model's outputs.
        gamed: The published rows.

    Raises:
        DataError: An instruction has no difficulty, lengths do not differ, or too few
            preferences are left to fit.
    """
    difficulty = gamed.difficulties(np.asarray(index))
    delta = np.asarray(lengths[0], dtype=float) - np.asarray(lengths[1], dtype=float)
    spread = delta.std(ddof=1) if len(delta) > 1 else 0.0
    if not spread > 0:
        remedy = "the win rate itself is length-controlled then"
        raise DataError("all outputs differ in length by the same", remedy=remedy)
    ones = np.ones(len(delta))
    given = _features(gamed.delta_length, gamed.difficulty, gamed.own)
    rows = np.vstack([given, _features(delta / spread, difficulty, ones)])
    targets = np.concatenate([gamed.preference, preferences - 1])
    weights = np.where(rows[:, 2] == 1.0, 1.0, GAMED_WEIGHT)
    known = ~np.isnan(targets)
    if known.sum() < FOLDS:
        raise DataError("too few preferences to fit", remedy=f"give at least {FOLDS}")
    model, strength = _fit(rows[known], targets[known], weights[known])
    at_equal_length = _features(np.zeros(len(delta)), difficulty, ones)
    predicted = model.predict_proba(at_equal_length)[:, 1]
    length, hardness, own_weight = (float(weight) for weight in model.coef_[0])
    return LengthControlled(float(predicted.mean() * 100), (length, hardness, own_weight), strength)


def _features(delta: Floats, difficulty: Floats, own: Floats) -> Floats:
    return np.column_stack([np.tanh(delta), difficulty, own])


def _fit(rows: Floats, targets: Floats, weights: Floats) -> tuple[Any, float]:
    """Return the model with the C of the least held-out loss, fitted to all rows."""
    from sklearn.model_selection import GroupKFold

    # A target p is a row that is 1 with weight p and 0 with weight 1 - p; both stay together.
    doubled, both = np.vstack([rows, rows]), np.concatenate([targets, targets])
    labels = np.repeat([1, 0], len(rows))
    share = np.concatenate([targets, 1 - targets])
    sample, groups = np.concatenate([weights, weights]), np.tile(np.arange(len(rows)), 2)
    folds = list(GroupKFold(n_splits=FOLDS).split(doubled, labels, groups))

    def held_out(strength: float) -> float:
        losses = []
        for train, test in folds:
            model = _regression(strength)
            model.fit(doubled[train], labels[train], sample_weight=(share * sample)[train])
            losses.append(_loss(both[test], model.predict_proba(doubled[test])[:, 1], sample[test]))
        return float(np.mean(losses))

    best = float(min(STRENGTHS, key=held_out))
    return _regression(best).fit(doubled, labels, sample_weight=share * sample), best


def _regression(strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(
        l1_ratio=1.0, C=strength, solver="liblinear", fit_intercept=False, random_state=123
    )


def _loss(targets: Floats, predicted: Floats, weights: Floats) -> float:
    clipped = np.clip(predicted, 1e-15, 1 - 1e-15)
    losses = targets * np.log(clipped) + (1 - targets) * np.log(1 - clipped)
    return float(-(losses * weights).mean())
