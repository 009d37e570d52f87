"""Does a patch carry over? To other prompts, to another Q0 of the same W, onto another patch.

    python -m bench.transfer                   # seed 0, test prompts: all tables
    python -m bench.transfer --only prompts    # AdvBench

What a patch changes in the decoded weights, Q - Q0, is added to another quantized model of the same
W and rounded to that one's grid: no training there. "Composed" adds what two patches of one Q0
change, each trained on a part of the pairs. Every model is exported, reloaded and asked as usual.
"Prompts" asks what none of our templates wrote: AdvBench, whose file is not part of the project.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.demo import Cell, Row, experiment_of, measure
from qresafe.hf.checkpoint import QuantizedCheckpoint

RISK_III = {"risk": "III"}
MODELS: dict[str, dict[str, Any]] = {
    "LLM-QAT INT4": {"method": "llm_qat", "bits": 4, "calibration": RISK_III},
    "LLM-QAT INT8": {"method": "llm_qat", "bits": 8, "calibration": RISK_III},
    "QLoRA NF4": {"method": "qlora", "calibration": RISK_III},
}
HALVES: dict[str, dict[str, Any]] = {  # of the pairs
    "harmful and benign pairs": {"borderline": 0, "recombined": 0},
    "borderline and benign pairs": {"harmful": 0},
}
ADVBENCH = Path(__file__).parents[2] / "shared" / "data" / "advbench" / "harmful_behaviors.csv"
PARTS = ("models", "prompts")
ASKED = ("attack_success", "compliance", "coherence")
COLUMNS = ("attack_success", "over_refusal", "exact_match")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--split", choices=["dev", "test"], default="test")
    parser.add_argument("--storage", default=".bench/transfer")
    parser.add_argument("--only", choices=PARTS, nargs="+")
    parser.add_argument("--advbench", type=Path, default=ADVBENCH, help="harmful_behaviors.csv")
    args = parser.parse_args()
    only = args.only or PARTS
    if "models" in only:
        print("| seed | model | patch | " + " | ".join(COLUMNS) + " | codes changed |")
        print("|---|---|---|---|---|---|---|")
        for seed in args.seeds:
            between_models(seed, args.split, args.storage)
            composed(seed, args.split, args.storage)
    if "prompts" in only and not args.advbench.exists():
        parser.error(f"--advbench: no file {args.advbench}")
    if "prompts" in only:
        print("| seed | prompts | n | arm | " + " | ".join(ASKED) + " |")
        print("|---|---|---|---|" + "---|" * len(ASKED))
        for seed in args.seeds:
            other_prompts(seed, args.advbench, args.storage)


def between_models(seed: int, split: str, storage: str) -> None:
    """Put every model's patch on every model."""
    made = {
        name: made_of({"quantize": quantize}, seed, split, storage)
        for name, quantize in MODELS.items()
    }
    for name, target in made.items():
        show(name, "none", measure(target, name, "none", "Q0"))
        show(name, "its own", measure(target, name, "its own", "Q"))
        for other, source in made.items():
            if other == name:
                continue
            own = made_of({"quantize": MODELS[name]}, seed, split, storage)
            put(own, [source])
            show(name, f"of {other}", measure(own, name, f"of {other}", "Q"))


def composed(seed: int, split: str, storage: str) -> None:
    """Put two patches of parts of the pairs on the Q0 that both were made for."""
    name, quantize = next(iter(MODELS.items()))
    halves = []
    for label, pairs in HALVES.items():
        half = made_of({"quantize": quantize, "pairs": pairs}, seed, split, storage)
        show(name, label, measure(half, name, label, "Q"))
        halves.append(half)
    both = made_of({"quantize": quantize}, seed, split, storage)
    put(both, halves)
    show(name, "both composed", measure(both, name, "both composed", "Q"))


def other_prompts(seed: int, advbench: Path, storage: str) -> None:
    """Ask W, Q0 and Q, patched on the embedded prompts, those of AdvBench."""
    prompts = [{"benchmark": "advbench", "path": str(advbench), "split": "train"}]
    quantize = next(iter(MODELS.values()))
    asked = made_of({"quantize": quantize}, seed, "test", storage, {"prompts": prompts})
    for arm in ("W", "Q0", "Q"):
        cell = measure(asked, "AdvBench", arm, arm)
        shares = " | ".join(f"{100 * (cell.measures[name] or 0):.1f}" for name in ASKED)
        print(f"| {seed} | AdvBench | {cell.n['attack_success']} | {arm} | {shares} |", flush=True)


def made_of(
    changes: dict[str, Any],
    seed: int,
    split: str,
    storage: str,
    evaluate: dict[str, Any] | None = None,
) -> Any:
    """Return an experiment with the default patch, in this process."""
    own = {"control": False, "evaluate": {"adapter": False} | (evaluate or {})}
    return experiment_of(Row("transfer", "", "Q", "demo", own | changes, seed), split, storage)


def put(target: Any, sources: Sequence[Any]) -> None:
    """Let `target` have, instead of a patch trained for it, what the sources' patches change."""
    q0 = QuantizedCheckpoint.open(target.quantized.path / "checkpoint")
    patches = [
        tuple(QuantizedCheckpoint.open(made.path / "checkpoint") for made in
              (source.quantized, source.exported))
        for source in sources
    ]  # fmt: skip

    def work(folder: Any) -> dict[str, Any]:
        from qresafe.stages.patch_output import write_tensors

        write_tensors(folder / "codes.safetensors", moved(q0, patches))
        return {"seconds": 0.0}

    target.patched = target.run.stage(
        "patch",
        spec={"moved": True},
        inputs={"q0": target.quantized.key}
        | {f"patch {i}": source.exported.key for i, source in enumerate(sources)},
        code_version=1,
        work=work,
    )


def moved(
    q0: QuantizedCheckpoint, patches: Sequence[tuple[QuantizedCheckpoint, QuantizedCheckpoint]]
) -> dict[str, torch.Tensor]:
    """Return q0's codes after adding what each (Q0, Q) changes in the decoded weights."""
    codes: dict[str, torch.Tensor] = {}
    for name in q0.names:
        mine = q0.read(name)
        delta = torch.zeros(mine.grid.shape)
        for base, q in patches:
            delta += q.read(name).dense().float() - base.read(name).dense().float()
        codes[name] = mine.grid.move(mine.codes, delta)
    return codes


def show(model: str, patch: str, cell: Cell) -> None:
    """Print one row; shares in per cent."""
    shares = " | ".join(f"{100 * (cell.measures[name] or 0):.1f}" for name in COLUMNS)
    changed = "" if cell.codes_changed is None else f"{100 * cell.codes_changed:.2f}"
    print(f"| {cell.seed} | {model} | {patch} | {shares} | {changed} |", flush=True)


if __name__ == "__main__":
    main()
