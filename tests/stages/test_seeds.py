"""One seed for all that an experiment draws at random."""

from __future__ import annotations

from typing import Any

import pytest

from qresafe.loading import load_spec
from qresafe.specs import ExperimentSpec
from qresafe.stages.seeds import with_seed

GPTQ = {"method": "gptq", "act_order": "none"}
QLORA = {"method": "qlora", "base": {"method": "rtn", "bits": 8}}


@pytest.mark.parametrize(
    ("quantize", "seeded"),
    [
        ({"method": "rtn"}, {}),
        (GPTQ, {"seed": 7}),
        (QLORA, {"seed": 7}),
        ({"method": "critical16", "base": GPTQ}, {"seed": 7, "base": GPTQ | {"seed": 7}}),
        ({"method": "critical16", "base": QLORA}, {"seed": 7, "base": QLORA | {"seed": 7}}),
    ],
)
def test_a_seed_reaches_the_base_method_too(
    quantize: dict[str, Any], seeded: dict[str, Any]
) -> None:
    spec = load_spec(ExperimentSpec, {"model": {"path": "w"}, "quantize": quantize})
    found = with_seed(spec, 7)
    wanted = spec.quantize.model_validate(quantize | seeded)
    assert found.quantize == wanted
    assert (found.pairs.seed, found.patch.seed) == (7, 7)
