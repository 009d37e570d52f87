"""Spaces: what they draw, which combinations they have, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from qresafe.errors import SpecError
from qresafe.loading import load_spec
from qresafe.search_space import Domain, Space, with_params
from qresafe.search_spec import SPACES, load_search, space_names
from qresafe.specs import ExperimentSpec


def space(**domains: Any) -> Space:
    keys = {key.replace("__", "."): Domain.model_validate(d) for key, d in domains.items()}
    return Space.of(keys)


def draws(of: Space, count: int = 400) -> list[dict[str, Any]]:
    return [of.draw(np.random.default_rng([0, i])) for i in range(count)]


@pytest.mark.parametrize("name", space_names())
def test_every_shipped_space_fits_its_experiment(name: str) -> None:
    search = load_search(name)
    assert search.spec.name == name
    for params in draws(search.space, 20):
        search.trial(params)
    dev = {one.split for one in search.validation.evaluate.prompts}
    test = {one.split for one in search.experiment.evaluate.prompts}
    assert (dev, test) == ({"dev"}, {"test"})


def test_the_spaces_of_the_issue_are_shipped() -> None:
    wanted = {"paper", "grid-loop", "quick-cpu", "tau-ablation", "bits"}
    assert wanted <= set(space_names())
    assert wanted <= {path.stem for path in SPACES.iterdir()}


def test_draws_stay_inside_and_spread() -> None:
    found = draws(space(patch__lr={"loguniform": [1e-4, 1e-2]}, patch__rank={"uniform": [2, 9]}))
    rates, ranks = [d["patch.lr"] for d in found], [d["patch.rank"] for d in found]
    assert 1e-4 <= min(rates) < max(rates) <= 1e-2
    # Half of a log-uniform draw lies below the geometric mean: 200 of 400, within 5 sigma of 10.
    assert 150 < sum(rate < 1e-3 for rate in rates) < 250
    assert set(ranks) == set(range(2, 10))
    assert {type(rank) for rank in ranks} == {int}


def test_a_range_of_a_real_key_with_whole_ends_is_no_range_of_whole_numbers() -> None:
    taus = [d["patch.mask.tau"] for d in draws(space(patch__mask__tau={"uniform": [0, 1]}), 50)]
    assert len(set(taus)) == 50


def test_quantized_ranges_and_choices() -> None:
    found = space(
        pairs__harmful={"uniform": [50, 300], "step": 50},
        patch__mask__remask_every={"choice": [0, 25]},
    )
    assert {d["pairs.harmful"] for d in draws(found)} == {50, 100, 150, 200, 250, 300}
    assert {d["patch.mask.remask_every"] for d in draws(found)} == {0, 25}


def test_conditions_decide_who_takes_part() -> None:
    found = space(
        patch__mask__loss={"choice": ["nll", "dpo"], "when": {"patch.mask.score": "snip"}},
        patch__mask__score={"choice": ["snip", "random"]},
    )
    assert [p.key for p in found] == ["patch.mask.score", "patch.mask.loss"]  # the parent first
    for params in draws(found, 50):
        assert ("patch.mask.loss" in params) == (params["patch.mask.score"] == "snip")
    assert found.grid() == [
        {"patch.mask.score": "snip", "patch.mask.loss": "nll"},
        {"patch.mask.score": "snip", "patch.mask.loss": "dpo"},
        {"patch.mask.score": "random"},
    ]


def test_a_key_that_is_added_does_not_change_other_draws() -> None:
    one = draws(space(patch__lr={"uniform": [1, 2]}), 5)
    two = draws(space(patch__lr={"uniform": [1, 2]}, patch__rank={"choice": [1, 2]}), 5)
    assert [d["patch.lr"] for d in one] == [d["patch.lr"] for d in two]


def test_choices_may_be_presets_and_mappings() -> None:
    base = ExperimentSpec()
    assert with_params(base, {"patch.objective": "paper"}).patch.objective.dpo == 1
    mixture = with_params(base, {"pairs": {"harmful": 7, "benign": 9}}).pairs
    assert (mixture.harmful, mixture.benign) == (7, 9)
    assert with_params(base, {}) is base


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        ("space: {patch.mask.tua: {uniform: [0, 1]}}", ["patch.mask.tua", "did you mean tau"]),
        ("space: {patch.mask.tau: {uniform: [1, 0]}}", ["patch.mask.tau", "[1, 0] is empty"]),
        ("space: {patch.mask.tau: {uniform: [0, 2]}}", ["patch.mask.tau", "at most 1"]),
        ("space: {patch.mask.tau: {choice: []}}", ["patch.mask.tau", "empty"]),
        ("space: {patch.mask.tau: {unifrm: [0, 1]}}", ["unifrm", "did you mean uniform"]),
        ("space: {patch.lr: {loguniform: [0, 1]}}", ["patch.lr", "above 0"]),
        ("space: {patch.lr: {uniform: [1, 2], choice: [1]}}", ["exactly one"]),
        ("space: {}", ["no key"]),
        ("objectivs: 1\nspace: {}", ["objectivs", "did you mean objectives"]),
        (
            "space: {patch.lr: {uniform: [1, 2], when: {patch.mask.tau: 1}}}",
            ["patch.lr depends on 'patch.mask.tau'"],
        ),
        (
            "space: {patch.mask: {choice: [{}]}, patch.mask.tau: {uniform: [0, 1]}}",
            ["patch.mask holds patch.mask.tau"],
        ),
        (
            "searcher: {name: grid}\nspace: {patch.lr: {loguniform: [1, 2]}}",
            ["patch.lr", "no end of values", "choice or a step"],
        ),
        (
            "searcher: {name: optna}\nspace: {patch.lr: {uniform: [1, 2]}}",
            ["searcher.name", "'optuna'"],
        ),
        ("base: dmo\nspace: {patch.lr: {uniform: [1, 2]}}", ["dmo", "did you mean demo"]),
        (
            "scheduler: {name: pbt}\nspace: {patch.rank: {choice: [1, 2]}}",
            ["pbt varies patch.lr and patch.objective.beta only"],
        ),
        ("objectives: []\nspace: {patch.lr: {uniform: [1, 2]}}", ["at least one metric"]),
    ],
)
def test_a_mistake_is_one_sentence_with_its_file(
    tmp_path: Path, content: str, fragments: list[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(SpecError) as mistake:
        load_search(path)
    for fragment in [*fragments, "mine.yaml"]:
        assert fragment in str(mistake.value)


def test_overrides_reach_the_search_and_its_experiment(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"space": {"patch.lr": {"uniform": [1, 2]}}}))
    found = load_search(path, ["budget.trials=3", "patch.steps=7", "name=other"])
    assert (found.spec.budget.trials, found.validation.patch.steps) == (3, 7)
    assert (found.spec.name, found.experiment.name) == ("other", "other")
    with pytest.raises(SpecError, match="did you mean patch"):
        load_search(path, ["ptch.steps=7"])


def test_the_key_of_a_search_is_what_its_results_depend_on(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"space": {"patch.lr": {"uniform": [1, 2]}}}))
    key = load_search(path).key
    same = ["budget.trials=99", "confirm=[]", "resources.workers=0", "name=x", "storage=/x"]
    assert {load_search(path, [text]).key for text in same} == {key}
    other = ["searcher.seed=1", "patch.steps=7", "budget.concurrent=3", "probe.every=3"]
    assert len({key, *(load_search(path, [text]).key for text in other)}) == 1 + len(other)


def test_specs_of_trials_are_specs() -> None:
    found = load_search("quick-cpu")
    spec = found.trial({"patch.mask.tau": 0.125})
    again = load_spec(ExperimentSpec, spec.model_dump(mode="json"))
    assert again == spec
    assert again.patch.mask.tau == 0.125
