"""The GPU bench's whole code path on a CPU, as on a machine that lacks most libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import PLAN, main, measure_one, render
from bench.gpu_measures import Place, Row
from bench.gpu_model import SHAPES, Budget, Limits, build, pair_batch, quantize
from qresafe.core.objectives import sequence_logps
from qresafe.hf.answer_head import AnswerHead
from qresafe.stages.patch_loss import answer_logps

ROOT = Path(__file__).parents[2]
# What a bare GPU machine may lack. None in sys.modules makes an import fail.
ABSENT = ["ray", "deepspeed", "bitsandbytes", "pyarrow", "pydantic", "upath", "compressed_tensors"]
BARE = f"""
import sys
sys.modules |= dict.fromkeys({ABSENT})
from bench.gpu import main
sys.exit(main(sys.argv[1:]))
"""

CPU = torch.device("cpu")


@pytest.fixture
def place() -> Place:
    return Place(CPU, torch.float32, Limits(1e12, 1e14), Budget(9.0))


@pytest.mark.long
def test_everything_is_measured_on_a_machine_with_torch_transformers_and_peft_alone(
    tmp_path: Path,
) -> None:
    page = tmp_path / "results.md"
    command = [sys.executable, "-c", BARE, "--device", "cpu", "--shapes", "tiny", "--out", page]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = [line for line in page.read_text().splitlines() if line.startswith("| tiny")]
    # 3 patch steps, 3 of SNIP, 3 of grids, 2 of generation; 5 of them have a peer.
    assert len(rows) == 11
    assert sum("×" in row for row in rows) == 5
    assert "not measured" not in done.stdout
    assert f"torch {torch.__version__}" in done.stdout


def test_what_does_not_fit_in_time_is_a_row_that_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--device", "cpu", "--shapes", "tiny", "--minutes", "0"]) == 0
    assert capsys.readouterr().out.count("no time left") == len(PLAN)


def test_what_does_not_fit_in_memory_is_a_row_that_says_so(place: Place) -> None:
    def too_large(*_: object) -> list[Row]:
        raise torch.cuda.OutOfMemoryError

    (row,) = measure_one("peer", too_large, SHAPES["tiny"], place)
    assert row.value is None
    assert row.note == "does not fit into the GPU's memory"


def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_ratios_are_ours_divided_by_the_peer_of_the_same_shape(place: Place) -> None:
    found = {
        "a": [Row("peer", 200.0, "tokens/s"), Row("ours", 300.0, "tokens/s", "peer", 1.25, 0.5)],
        "b": [Row("peer", note="does not fit"), Row("ours", 300.0, "tokens/s", "peer")],
    }
    page = render(found, place)
    assert "| a | ours | 300 tokens/s | 1.50× peer | 1.2 | 50.0%  |" in page  # 300 / 200
    assert "| b | peer | does not fit | | | |" in page
    assert "| b | ours | 300 tokens/s | – | – | – |" in page


def test_both_sides_of_the_patch_step_see_the_same_log_probabilities() -> None:
    shape = SHAPES["tiny"]
    model = build(shape, CPU, torch.float32)
    names = set(quantize(model))
    assert len(names) == 7 * shape.layers  # q, k, v, o, gate, up, down
    batch = pair_batch(shape, CPU, seed=3)
    assert batch.ids.shape[0] == 2 * shape.pairs
    assert batch.tokens == int(batch.attention_mask.sum())
    with torch.no_grad():
        peer = sequence_logps(
            model(input_ids=batch.ids, attention_mask=batch.attention_mask).logits, batch.labels
        )
        ours = answer_logps(AnswerHead(model).logits(model, batch.ids, batch.positions), batch)
    torch.testing.assert_close(ours, peer)
