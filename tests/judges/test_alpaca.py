"""AlpacaEval's win rates, against arithmetic and against implementations of another kind."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from qresafe.errors import DataError
from qresafe.judges import alpaca
from qresafe.judges.length_control import Gamed, length_controlled


def test_the_win_rate_is_the_mean_preference() -> None:
    found = alpaca.win_rate([1, 2, 2, 1.5])
    # (0 + 1 + 1 + 0.5) / 4
    assert found["win_rate"] == 62.5
    assert (found["n_wins"], found["n_wins_base"], found["n_draws"]) == (2, 1, 1)
    # Deviations from 0.625: -0.625, 0.375, 0.375, -0.125; their squares add up to 0.6875.
    assert found["standard_error"] == pytest.approx(math.sqrt(0.6875 / 3 / 4) * 100)


def test_draws_are_written_in_two_ways_and_nulls_are_left_out() -> None:
    found = alpaca.win_rate([2, 0, None, math.nan, 1.5, 1, 3, -1, 0.5])
    assert found["n_total"] == 4  # 2, a draw, a draw, 1
    assert found["win_rate"] == (1 + 0.5 + 0.5 + 0) / 4 * 100
    assert found["n_draws"] == 2


def test_weighted_preferences_keep_their_weight_unless_rounded() -> None:
    found = alpaca.win_rate([1.2, 1.9, 1.6])
    assert found["win_rate"] == pytest.approx((0.2 + 0.9 + 0.6) / 3 * 100)
    assert found["discrete_win_rate"] == pytest.approx(2 / 3 * 100)


def test_no_preference_has_no_rate() -> None:
    found = alpaca.win_rate([None, math.nan])
    assert (found["win_rate"], found["standard_error"], found["n_total"]) == (None, None, 0)


def test_brute_force_on_random_preferences() -> None:
    """Row by row, in plain Python, from the definition."""
    random = np.random.default_rng(0)
    for _ in range(50):
        drawn = random.choice([0, 1, 1.5, 2, None, 2.5, *random.uniform(1, 2, 5)], size=37)
        wins = []
        for value in drawn:
            if value is None:
                continue
            value = 1.5 if value == 0 else value
            if 1 <= value <= 2:
                wins.append(value - 1)
        found = alpaca.win_rate(list(drawn))
        mean = sum(wins) / len(wins)
        spread = math.sqrt(sum((win - mean) ** 2 for win in wins) / (len(wins) - 1))
        assert found["win_rate"] == pytest.approx(100 * mean)
        assert found["standard_error"] == pytest.approx(100 * spread / math.sqrt(len(wins)))


def answer(**top: float) -> str:
    logs = {token: math.log(share) for token, share in top.items()}
    return json.dumps({"text": max(top, key=top.__getitem__), "top": logs})


@pytest.mark.parametrize(
    ("said", "swapped", "expected"),
    [
        (answer(m=0.2, M=0.6, Both=0.2), False, 1.75),  # 0.6 / 0.8 for the model's output
        (answer(m=0.2, M=0.6, Both=0.2), True, 1.25),
        (answer(m=0.9), False, 1.0),  # what is not among the likeliest has no share
        (answer(M=0.9), False, 2.0),
        (answer(Both=0.9), False, None),
        (json.dumps({"text": "M", "top": None}), False, 2.0),
        ("m", True, 2.0),
        (" M\n", False, 2.0),
        ("Model m", False, None),
        ("", False, None),
    ],
)
def test_an_annotators_answer(said: str, swapped: bool, expected: float | None) -> None:
    found = alpaca.preference(said, swapped=swapped)
    assert found == (expected if expected is None else pytest.approx(expected))


def test_places_are_swapped_for_half_of_the_instructions_always_the_same() -> None:
    thrown = [alpaca.is_swapped(f"instruction {n}") for n in range(1000)]
    assert thrown == [alpaca.is_swapped(f"instruction {n}") for n in range(1000)]
    assert 440 <= sum(thrown) <= 560  # within four standard deviations of 500


def test_the_prompt_shows_both_outputs_as_published() -> None:
    system, user = alpaca.messages("Say {output_1}.", "first", "second")
    assert system["content"].startswith("You are a highly efficient assistant, who evaluates and")
    assert '{\n    "instruction": """Say {output_1}.""",\n}\n' in user["content"]
    assert '"model_identifier": "m",\n        "output": """first"""' in user["content"]
    assert '"model_identifier": "M",\n        "output": """second"""' in user["content"]
    assert user["content"].endswith("m or M.\n\n## Best Model Identifier")


# ---------------------------------------------------------------- length control


def synthetic(count: int = 120, seed: int = 0) -> dict[str, Any]:
    """Return annotations whose preference depends on length and difficulty, and gamed rows."""
    random = np.random.default_rng(seed)
    difficulty = random.normal(0, 1, count)
    lengths = random.integers(50, 400, count), random.integers(50, 900, count)
    delta = (lengths[0] - lengths[1]) / (lengths[0] - lengths[1]).std(ddof=1)
    logit = -1.2 * np.tanh(delta) + 0.6 * difficulty - 0.4
    preferences = 1 + 1 / (1 + np.exp(-(logit + random.normal(0, 0.5, count))))
    preferences[random.choice(count, 7, replace=False)] = np.nan
    gamed_delta = random.normal(0, 1, 2 * count)
    gamed = Gamed(
        index=np.tile(np.arange(count), 2),
        preference=1 / (1 + np.exp(2 * np.tanh(gamed_delta))),
        delta_length=gamed_delta,
        difficulty=np.tile(difficulty, 2),
        own=np.zeros(2 * count),
    )
    return {
        "index": list(range(count)),
        "preferences": preferences,
        "lengths": (lengths[0].tolist(), lengths[1].tolist()),
        "gamed": gamed,
    }


def design(given: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return rows (tanh of length, difficulty, own), targets and weights, built row by row."""
    gamed, (first, second) = given["gamed"], given["lengths"]
    spread = np.std(np.subtract(first, second), ddof=1)
    rows, targets, weights = [], [], []
    for place in range(len(gamed.index)):
        rows.append([math.tanh(gamed.delta_length[place]), gamed.difficulty[place], 0.0])
        targets.append(gamed.preference[place])
        weights.append(0.1)
    for place, preference in enumerate(given["preferences"]):
        if math.isnan(preference):
            continue
        delta = math.tanh((first[place] - second[place]) / spread)
        rows.append([delta, gamed.difficulty[place], 1.0])
        targets.append(preference - 1)
        weights.append(1.0)
    return np.array(rows), np.array(targets), np.array(weights)


def lasso(rows: Any, targets: Any, weights: Any, strength: float) -> Any:
    """Minimise |w|_1 + C * sum of weighted log losses by L-BFGS on positive and negative parts."""
    width = rows.shape[1]

    def loss(parts: Any) -> tuple[float, Any]:
        plus, minus = parts[:width], parts[width:]
        logits = rows @ (plus - minus)
        losses = np.logaddexp(0, logits) - targets * logits
        slope = rows.T @ (weights * (1 / (1 + np.exp(-logits)) - targets))
        gradient = np.concatenate([1 + strength * slope, 1 - strength * slope])
        return parts.sum() + strength * float(weights @ losses), gradient

    found = minimize(
        loss,
        np.full(2 * width, 0.1),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * 2 * width,
        options={"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-10},
    )
    return found.x[:width] - found.x[width:]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_length_controlled_rate_against_scipy(seed: int) -> None:
    given = synthetic(seed=seed)
    found = length_controlled(**given)
    rows, targets, weights = design(given)
    expected = lasso(rows, targets, weights, found.strength)
    assert found.weights == pytest.approx(expected, abs=2e-3)  # liblinear stops at 1e-4
    difficulty = given["gamed"].difficulty[: len(given["index"])]  # of all, nulls included
    logits = expected[1] * difficulty + expected[2]
    assert found.win_rate == pytest.approx(100 * np.mean(1 / (1 + np.exp(-logits))), abs=0.05)


def test_the_strength_is_the_one_with_the_least_held_out_loss() -> None:
    """Cross-validation by scipy's fits alone: five folds, loss weighted, ten strengths."""
    from sklearn.model_selection import GroupKFold

    given = synthetic(count=60, seed=3)
    rows, targets, weights = design(given)
    folds = GroupKFold(n_splits=5).split(np.zeros(2 * len(rows)), groups=[*range(len(rows))] * 2)
    tests = [np.unique(test % len(rows)) for _, test in folds]
    losses = {}
    for strength in np.logspace(-4, 4, 10):
        held_out = []
        for test in tests:
            train = np.setdiff1d(np.arange(len(rows)), test)
            fit = lasso(rows[train], targets[train], weights[train], strength)
            logits = rows[test] @ fit
            loss = np.logaddexp(0, logits) - targets[test] * logits
            held_out.append(float(np.mean(weights[test] * loss)))
        losses[strength] = float(np.mean(held_out))
    best = min(losses.values())
    assert losses[length_controlled(**given).strength] == pytest.approx(best, abs=1e-4)


def test_it_is_the_published_cross_validation() -> None:
    """The same fit by scikit-learn's own LogisticRegressionCV, which `alpaca_eval` calls."""
    from sklearn import config_context
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.metrics import make_scorer
    from sklearn.model_selection import GroupKFold

    given = synthetic(count=90, seed=7)
    rows, targets, weights = design(given)
    n = len(rows)

    def loss(truth: Any, predicted: Any, target: Any, weight: Any) -> float:
        assert set(truth) <= {0, 1}
        logs = target * np.log(predicted) + (1 - target) * np.log(1 - predicted)
        return float(-(weight * logs).mean())

    with config_context(enable_metadata_routing=True):
        scorer = make_scorer(loss, response_method="predict_proba", greater_is_better=False)
        model = LogisticRegressionCV(
            Cs=10,
            cv=GroupKFold(n_splits=5),
            scoring=scorer.set_score_request(target=True, weight=True),
            l1_ratios=(1.0,),
            solver="liblinear",
            fit_intercept=False,
            random_state=123,
            use_legacy_attributes=False,
        ).set_fit_request(sample_weight=True)
        model.fit(
            np.vstack([rows, rows]),
            np.repeat([1, 0], n),
            sample_weight=np.concatenate([targets * weights, (1 - targets) * weights]),
            groups=np.tile(np.arange(n), 2),
            target=np.tile(targets, 2),
            weight=np.tile(weights, 2),
        )
    found = length_controlled(**given)
    assert found.strength == pytest.approx(float(model.C_))
    assert found.weights == pytest.approx(tuple(model.coef_[0]), abs=1e-12)


def test_equal_outputs_of_the_reference_win_half() -> None:
    """Preferences that follow length alone leave nothing when lengths are made equal."""
    given = synthetic(count=400, seed=5)
    first, second = map(np.array, given["lengths"])
    delta = (first - second) / (first - second).std(ddof=1)
    given["preferences"] = 1 + 1 / (1 + np.exp(2 * np.tanh(delta)))  # as of the gamed rows
    found = length_controlled(**given)
    raw = alpaca.win_rate(list(given["preferences"]))["win_rate"]
    assert isinstance(raw, float)
    assert raw > 60  # its outputs are longer
    assert found.win_rate == pytest.approx(50, abs=1)


def test_what_cannot_be_controlled_is_said() -> None:
    given = synthetic(count=30)
    with pytest.raises(DataError, match="no difficulty for instruction 30"):
        length_controlled(**(given | {"index": [*range(1, 31)]}))
    same = given | {"lengths": ([10] * 30, [20] * 30)}
    with pytest.raises(DataError, match="differ in length by the same"):
        length_controlled(**same)
