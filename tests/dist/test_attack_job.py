"""An attack is one Ray Data job, with the completions of this process."""

from pathlib import Path

import pyarrow as pa
import pytest

from qresafe.artifacts import Artifact, Run
from qresafe.dist.runtime import RayRuntime, make_runtime
from qresafe.hf.models import resolve
from qresafe.hf.warm import ModelInput
from qresafe.progress import Silent
from qresafe.records import PROMPT
from qresafe.specs import AttackSpec, ModelSpec, ResourcesSpec
from qresafe.stages.attack import attack
from qresafe.stages.generate import FILE
from qresafe.stages.runtime import Runtime, read_table

pytestmark = pytest.mark.ray


def attacked(storage: Path, model: Path, runtime: Runtime) -> Artifact:
    rows = [{"prompt_id": f"p{i}", "axis": "harmful", "prompt": "word " * i} for i in range(1, 7)]
    return attack(
        Run(str(storage), "r"),
        label="W",
        model=ModelInput.of(resolve(ModelSpec(path=str(model)))),
        prompts=pa.Table.from_pylist(rows, schema=PROMPT),
        spec=AttackSpec(decoding="paper", systems=("none", "aoa"), max_new_tokens=4, batch_size=3),
        runtime=runtime,
        progress=Silent(),
    )


@pytest.mark.long
def test_on_ray_it_gives_the_completions_of_this_process(tiny_llama: Path, tmp_path: Path) -> None:
    here = attacked(tmp_path / "a", tiny_llama, make_runtime(ResourcesSpec(workers=0)))
    cluster = RayRuntime(ResourcesSpec(workers=2))
    there = attacked(tmp_path / "b", tiny_llama, cluster)
    cluster.close()
    assert there.key == here.key
    assert here.manifest.counts["cells"] == 12
    assert read_table(there.path / FILE).equals(read_table(here.path / FILE))
