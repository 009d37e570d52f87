"""Stage: log pi_Q0(y_w|x) and log pi_Q0(y_l|x) of the preference pairs (paper Eq. 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from upath import UPath

from qresafe import records
from qresafe.artifacts import Artifact, Run
from qresafe.core.masked_lora import attach_frozen
from qresafe.hf.batching import length_plan
from qresafe.hf.warm import ModelInput
from qresafe.progress import Progress
from qresafe.stages.patch_data import collate, full_row
from qresafe.stages.patch_loss import answer_logps
from qresafe.stages.runtime import (
    Batch,
    BatchFunction,
    Row,
    Runtime,
    read_parts,
    read_table,
    write_table,
)

CODE_VERSION = 1


@dataclass(frozen=True)
class ReferenceJob:
    """Scores pairs with Q0's decoded weights, by the very code that training uses.

    The quantized checkpoint's own kernels may round otherwise; then the first DPO loss would not
    be ln 2.
    """

    q0: ModelInput

    def setup(self, device: str) -> BatchFunction:
        from qresafe.hf.answer_head import AnswerHead
        from qresafe.hf.checkpoint import load_frame
        from qresafe.hf.spread import place

        model, quantized = load_frame(self.q0.ref.on_this_machine().path)
        layers = attach_frozen(model, quantized)
        place(model, device)
        for layer in layers.values():
            layer.to(layer.packed.device)  # its grid, too
        head = AnswerHead(model)

        def score(rows: list[Row]) -> pa.Table:
            batch = collate([full_row(row, frozenset({"dpo"})) for row in rows], 0)
            batch = batch.to(model.device)
            with torch.no_grad():
                logits = head.logits(model, batch.ids, batch.positions)
            logps = answer_logps(logits, batch).double()
            columns = {
                "prompt_id": [row["prompt_id"] for row in rows],
                "chosen_logp": logps[batch.terms["dpo"]].tolist(),
                "rejected_logp": logps[batch.rejected].tolist(),
            }
            return pa.table(columns, schema=records.REFERENCE_LOGPS)

        return score


def reference(
    run: Run,
    *,
    q0: ModelInput,
    pairs: Artifact,
    batch_size: int,
    runtime: Runtime,
    progress: Progress,
) -> Artifact:
    """Make reference.parquet (`records.REFERENCE_LOGPS`): one row per preference pair.

    Args:
        run: Where the artefact goes.
        q0: The quantized checkpoint.
        pairs: From the pairs stage.
        batch_size: Pairs per forward pass.
        runtime: Where to compute.
        progress: Advances by pairs.
    """

    def work(folder: UPath) -> Mapping[str, Any]:
        table = read_table(pairs.path / "pairs.parquet")
        rows = table.filter(table["preference"]).to_pylist()
        progress.start("reference", len(rows), "pairs")
        needed = ("prompt_id", "prompt_ids", "chosen_ids", "rejected_ids")
        work_rows = [{name: row[name] for name in needed} for row in rows]
        plan = length_plan([_length(row) for row in rows], batch_size)
        batches = [Batch(i, [work_rows[j] for j in places]) for i, places in enumerate(plan)]
        found: dict[str, Row] = {}
        startup = 0.0
        if batches:
            parts = folder / "work" / "parts"
            spent = runtime.map_batches(ReferenceJob(q0), batches, parts, progress)
            startup = spent.startup_seconds
            made = read_parts(parts, len(batches)).to_pylist()
            found = {row["prompt_id"]: row for row in made}
        ordered = [found[row["prompt_id"]] for row in rows]
        write_table(
            folder / "reference.parquet", pa.Table.from_pylist(ordered, records.REFERENCE_LOGPS)
        )
        progress.finish(f"{len(rows)} pairs")
        return {"rows": len(rows), "startup_seconds": startup}

    made = run.stage(
        "reference",
        spec={"batch_size": batch_size},
        inputs={"q0": q0.key, "pairs": pairs.key},
        code_version=CODE_VERSION,
        work=work,
    )
    return made.shown(progress, "reference")


def _length(row: Row) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
