"""The usual repairs beside ours: TRL's DPO or SFT, rounded to Q0's grid afterwards.

They train in this process, on one GPU if it has any, on decoded weights and without a mask, and
leave what the patch stage leaves (codes.safetensors, delta.safetensors, history.jsonl), so that the
same export deploys them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from upath import UPath

from qresafe.core.grids import QuantizedTensor
from qresafe.errors import DataError
from qresafe.hf import baselines
from qresafe.hf.checkpoint import QuantizedCheckpoint, load_dense
from qresafe.hf.models import load_tokenizer
from qresafe.hf.warm import ModelInput
from qresafe.progress import Progress
from qresafe.specs import PatchSpec
from qresafe.stages.patch_output import Change, write_changes, write_history
from qresafe.stages.runtime import read_table


@dataclass(frozen=True)
class BaselineJob:
    """A baseline to train; the same arguments as a `PatchJob`, and `spec.method` says which.

    Attributes:
        q0: The quantized checkpoint.
        pairs: Path of pairs.parquet.
        spec: rank, alpha, rate, batch sizes, steps and seed mean what they mean for a patch.
    """

    q0: ModelInput
    pairs: str
    spec: PatchSpec

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows that the method learns from: preferences for DPO, all for SFT.

        Raises:
            DataError: There is none.
        """
        rows: list[dict[str, Any]] = read_table(UPath(self.pairs)).to_pylist()
        found = [row for row in rows if row["preference"] or self.spec.method == "sft"]
        if not found:
            remedy = "add calibration prompts, or take a Q0 that has lost refusals"
            raise DataError("no row to train the baseline on", where=self.pairs, remedy=remedy)
        return found

    def run_local(self, folder: UPath, progress: Progress) -> None:
        """Train and round, in this process."""
        ref = self.q0.ref.on_this_machine()
        model, quantized = load_dense(ref.path, self._dtype(ref.path))
        train = {"dpo": baselines.dpo, "sft": baselines.sft}[self.spec.method]
        with tempfile.TemporaryDirectory() as work:
            trained, log = train(
                model,
                load_tokenizer(ref.path),
                self.rows(),
                self.spec,
                layers=list(quantized),
                work=Path(work),
                progress=progress,
            )
        changed = _write(trained, quantized, folder)
        write_history(folder, _history(log, self.spec.method, changed))

    def _dtype(self, path: Any) -> torch.dtype | None:
        """Return the type to train in; None: the checkpoint's own.

        A step of all weights is often less than bfloat16 can add to them, and float16 loses small
        gradients, for which the trainers have no scale.
        """
        half = QuantizedCheckpoint.open(path).dtype == torch.float16
        return torch.float32 if half or self.spec.updates == "full" else None


def _write(model: Any, quantized: Mapping[str, QuantizedTensor], folder: UPath) -> float:
    """Write each layer's change and the codes nearest to it; return the share of codes changed."""
    changed = total = 0

    def changes() -> Iterator[Change]:
        nonlocal changed, total
        for name, stored in quantized.items():
            weight = model.get_submodule(name).weight.detach().float().cpu()
            delta = weight - stored.dense()
            codes = stored.grid.move(stored.codes, delta)
            changed += int((codes != stored.codes).sum())
            total += stored.codes.numel()
            yield name, codes, delta

    write_changes(folder, changes())
    return changed / total


def _history(log: Sequence[Mapping[str, float]], term: str, changed: float) -> list[dict[str, Any]]:
    """Return history.jsonl's records."""
    records: list[dict[str, Any]] = [
        {
            "step": step,
            "loss": entry["loss"],
            "parts": {term: entry["loss"]},
            "seconds": entry["seconds"],
            "tokens": 0,  # the trainers count none per step
        }
        for step, entry in enumerate(log, 1)
    ]
    records[-1]["codes_changed"] = changed
    return records
