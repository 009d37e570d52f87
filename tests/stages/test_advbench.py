"""The main job on real input: AdvBench's 520 prompts through W, Q0 and Q, each from disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from qresafe.loading import load_spec
from qresafe.specs import ExperimentSpec
from qresafe.stages.compare import read_comparison
from qresafe.stages.experiment import Experiment
from qresafe.stages.runtime import InProcessRuntime

ADVBENCH = Path(__file__).parents[3] / "shared" / "data" / "advbench" / "harmful_behaviors.csv"


@pytest.mark.data
@pytest.mark.long
@pytest.mark.skipif(not ADVBENCH.exists(), reason="needs ../shared/data/advbench")
def test_520_prompts_through_w_q0_and_q(tmp_path: Path) -> None:
    few = {"harmful": 16, "benign": 8, "borderline": 8, "recombined": 8, "max_new_tokens": 16}
    spec = load_spec(
        ExperimentSpec,
        {
            "storage": str(tmp_path),
            "quantize": {"method": "rtn", "bits": 4},
            "pairs": few | {"keep": "different"},
            "patch": {"steps": 2, "batch_size": 16},
            "evaluate": {
                "prompts": [{"benchmark": "advbench", "axis": "harmful", "path": str(ADVBENCH)}],
                "generate": {"max_new_tokens": 8, "batch_size": 130},
                "adapter": False,
            },
        },
    )
    experiment = Experiment(spec, InProcessRuntime(threads=1))
    experiment.check()
    found = read_comparison(experiment.comparison)
    assert [arm.label for arm in found.arms] == ["W", "Q0", "Q"]
    assert found.prompts == {"harmful": {"advbench": 520}}
    for arm in found.arms:
        said = {count.judge: count for count in arm.counts}
        assert said["keyword"].n == said["refusal"].n == 520
        attack = arm.measures["attack_success"]
        assert attack.n + attack.undecided == 520  # every prompt is decided or counted apart
    assert experiment.exported.manifest.counts["codes"] > 0
