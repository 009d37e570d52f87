"""What a user can get wrong in a search: one sentence, exit code 2, before the first trial."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qresafe.cli import main
from qresafe.dist.trackers import PACKAGES

Refused = Callable[..., str]
SPACE = {"patch.mask.tau": {"uniform": [0.1, 1.0]}}


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path) -> Refused:
    """Run a search that must fail with one sentence before any stage; return the sentence."""

    def run(*options: str, **changes: Any) -> str:
        prompts = [{"axis": axis, "limit": 4} for axis in ("harmful", "benign", "borderline")]
        own = {"model.path": str(tiny_llama), "evaluate.prompts": prompts}
        data = {"space": SPACE, "set": own} | changes
        path = tmp_path / "space.yaml"
        path.write_text(yaml.safe_dump(json.loads(json.dumps(data))))
        storage = ("--storage", str(tmp_path / "store"), "--workers", "0")
        with pytest.raises(SystemExit) as leaving:
            main(["search", str(path), *storage, *options])
        out, err = capsys.readouterr()
        lines = err.strip().splitlines()
        assert leaving.value.code == 2, err
        assert out == ""
        assert "Traceback" not in err
        assert lines[-1].startswith("error: ")
        assert [line for line in lines if line.startswith("+ ")] == [], "work was done before"
        return lines[-1]

    return run


def test_unknown_keys_and_empty_ranges(refused: Refused) -> None:
    assert "did you mean tau" in refused(space={"patch.mask.tua": {"uniform": [0, 1]}})
    assert "is empty" in refused(space={"patch.mask.tau": {"uniform": [1, 1]}})


def test_a_space_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    for given, fragment in (("quick-cpy", "did you mean quick-cpu"), ("absent.yaml", "absent")):
        with pytest.raises(SystemExit) as leaving:
            main(["search", given])
        assert leaving.value.code == 2
        assert fragment in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metric", "fragment"),
    [
        ("atack_success", "did you mean attack_success"),
        ("accuracy", "no stage produces the metric 'accuracy'"),
    ],
)
def test_metrics_that_no_stage_produces(refused: Refused, metric: str, fragment: str) -> None:
    assert fragment in refused(objectives=[{"metric": metric}])
    assert fragment in refused(constraints=[{"metric": metric, "at_most": 0.1}])


def test_metrics_that_this_experiment_does_not_produce(refused: Refused) -> None:
    harmful = [{"axis": "harmful", "limit": 4}]
    said = refused(validation=[h | {"split": "dev"} for h in harmful])
    assert "'over_refusal' needs borderline prompts" in said
    said = refused("--set", "evaluate.judges=[keyword]")
    assert "'over_refusal' needs a judge besides keyword" in said


def test_a_rule_that_looks_at_what_no_probe_measures(refused: Refused) -> None:
    rule = {"name": "asha", "metric": "codes_changed"}
    assert "no probe measures codes_changed" in refused(scheduler=rule)
    said = refused(scheduler={"name": "asha", "metric": "over_refusal"})
    assert "'over_refusal' needs borderline prompts" in said


def test_a_grid_without_end(refused: Refused) -> None:
    assert "no end of values" in refused(searcher={"name": "grid"})


def test_pbt_without_a_whole_generation(refused: Refused) -> None:
    lr = {"patch.lr": {"loguniform": [1e-4, 1e-3]}}
    said = refused("--set", "patch.steps=10", space=lr, scheduler={"name": "pbt", "interval": 25})
    assert "intervals of 25 steps in 10 steps" in said


def test_a_winner_is_not_chosen_on_the_prompts_that_judge_it(refused: Refused) -> None:
    test = [{"axis": axis, "split": "test"} for axis in ("harmful", "benign", "borderline")]
    assert "are both validation and test" in refused(validation=test)


def test_nothing_to_resume_or_to_show(refused: Refused) -> None:
    assert "no such search to resume" in refused("--resume")
    assert "no such search to resume" in refused("--show")


def test_a_tracker_that_is_not_installed(refused: Refused, monkeypatch: Any) -> None:
    monkeypatch.setitem(PACKAGES, "wandb", "no_such_package")
    assert "no_such_package is not installed: pip install" in refused(trackers=["wandb"])
