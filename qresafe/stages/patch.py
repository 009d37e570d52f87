"""Stage: the safety patch of Q0, here or on a cluster: Algorithm 1, code flips, or a baseline."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from upath import UPath

from qresafe.artifacts import Artifact, Run
from qresafe.errors import DataError
from qresafe.hf.warm import ModelInput
from qresafe.progress import Progress
from qresafe.specs import PatchSpec
from qresafe.stages import patch_state
from qresafe.stages.baseline import BaselineJob
from qresafe.stages.patch_data import Pool
from qresafe.stages.patchable import no_latents
from qresafe.stages.probe import Probe
from qresafe.stages.runtime import Runtime, read_table
from qresafe.stages.train_engine import LocalEngine, TrainEngine
from qresafe.storage import local_folder

CODE_VERSION = 1


@dataclass(frozen=True)
class PatchJob:
    """A patch to train, by names: small, and loaded anew by every worker.

    Attributes:
        q0: The quantized checkpoint.
        pairs: Path of pairs.parquet.
        reference: Path of reference.parquet; None where no term needs it.
        spec: All hyper-parameters.
        probe: Questions that the model answers on the way; they change no trained bit.
        latents: Folder of the weights that Q0's were rounded from; needed with `start: latent`.
    """

    q0: ModelInput
    pairs: str
    reference: str | None
    spec: PatchSpec
    probe: Probe | None = None
    latents: str | None = None

    def run(self, engine: TrainEngine, folder: UPath, progress: Progress) -> None:
        """Train as one rank of `engine`; see `train_patch`."""
        from qresafe.hf.checkpoint import QuantizedCheckpoint, load_dense, load_frame
        from qresafe.hf.writing import read_latents
        from qresafe.stages.flip_loop import flip_codes
        from qresafe.stages.patch_loop import PatchInputs, train_patch

        pool = self.rows()  # first: it is what a user's mistake shows in
        path = self.q0.ref.on_this_machine().path
        if self.spec.trains != "codes":
            QuantizedCheckpoint.open(path).require_scales()
        flips = self.spec.method == "flips"
        load, make = (load_dense, flip_codes) if flips else (load_frame, train_patch)
        model, quantized = load(path)
        latents = read_latents(local_folder(self.latents)) if self.latents else None
        inputs = PatchInputs(model, quantized, pool, latents)
        watch = self.probe.watch(path) if self.probe else None
        make(engine, inputs, self.spec, folder, progress, watch)

    def run_local(self, folder: UPath, progress: Progress) -> None:
        """Train in this process, on its GPU if it has one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.run(LocalEngine(device), folder, progress)

    def rows(self) -> Pool:
        """Read the training rows."""
        reference = read_table(UPath(self.reference)) if self.reference else None
        return Pool(read_table(UPath(self.pairs)), reference, self.spec.objective)


def patch(
    run: Run,
    *,
    q0: ModelInput,
    pairs: Artifact,
    reference: Artifact | None,
    spec: PatchSpec,
    runtime: Runtime,
    progress: Progress,
    probe: Probe | None = None,
    start: UPath | None = None,
    latents: UPath | None = None,
) -> Artifact:
    """Train the patch and leave adapter, masks, codes, delta and history (`patch_output`).

    Flips and baselines leave codes, delta and history alone.

    Args:
        run: Where the artefact goes.
        q0: The quantized checkpoint.
        pairs: From the pairs stage.
        reference: From the reference stage; needed with a `dpo` weight or a `dpo` mask score.
        spec: All hyper-parameters.
        runtime: Trains here or on a cluster.
        progress: Shows the steps.
        probe: Questions to ask on the way; the answers stand in history.jsonl.
        start: Folder of a patch whose last step is a step of this one too, to go on from; only
            time is saved by it.
        latents: Folder of the weights that Q0's were rounded from; needed with `start: latent`.

    Raises:
        DataError: No row serves the objective, or reference log-probs are missing.
        SpecError: The patch is to start from latent weights, and there are none.
        UserError: Training diverged.
    """
    if reference is None and needs_reference(spec):
        raise DataError("no reference log-probs", where="patch", remedy="run the reference stage")
    if spec.start == "latent" and (latents is None or not latents.exists()):
        raise no_latents()

    def work(folder: UPath) -> Mapping[str, Any]:
        from qresafe.stages.patch_data import total_steps

        job = _job(q0, pairs, reference, spec, probe, latents)
        if start is not None:
            patch_state.adopt(folder, start)
        steps = None if spec.method == "flips" else total_steps(len(job.rows()), spec)
        progress.start("patch", steps, "steps")
        began = time.perf_counter()
        if isinstance(job, PatchJob):
            runtime.train(job, folder, progress)
        else:
            job.run_local(folder, progress)
        counts = summary(folder)
        # What was not a step: processes, imports, loading Q0. A resumed run did fewer steps.
        spent = time.perf_counter() - began - counts["seconds"]
        counts["startup_seconds"] = round(max(0.0, spent), 3)
        changed = f"{counts['codes_changed']:.2%} of codes"
        if "scales_changed" in counts:
            changed += f" and {counts['scales_changed']:.2%} of scales"
        progress.finish(f"loss {counts['loss']:.4f}, {changed} changed")
        return counts

    inputs = {"q0": q0.key, "pairs": pairs.key}
    made = run.stage(
        "patch",
        spec=key_spec(spec),
        inputs=inputs | ({"reference": reference.key} if reference else {}),
        code_version=CODE_VERSION,
        work=work,
    )
    return made.shown(progress, "patch")


def key_spec(spec: PatchSpec) -> dict[str, Any]:
    """Return the part of a patch's spec that its bits depend on."""
    left_out = {"checkpoint_every", "gradient_checkpointing", "offload"}
    if not spec.changes:
        left_out.add("changes")
    if spec.method != "flips":
        left_out.add("flips")
    if spec.trains == "codes":
        left_out.add("scale_lr")
    return spec.key_data(exclude=left_out)


def needs_reference(spec: PatchSpec) -> bool:
    """Return whether a patch with this spec reads Q0's own log-probs of the answers."""
    if spec.is_baseline:
        return False  # TRL takes its own
    return spec.objective.dpo > 0 or (spec.scores_by_gradient and spec.mask.loss == "dpo")


def _job(
    q0: ModelInput,
    pairs: Artifact,
    reference: Artifact | None,
    spec: PatchSpec,
    probe: Probe | None,
    latents: UPath | None,
) -> PatchJob | BaselineJob:
    rows = str(pairs.path / "pairs.parquet")
    if spec.is_baseline:
        return BaselineJob(q0, rows, spec)
    where = str(reference.path / "reference.parquet") if reference else None
    started = str(latents) if latents is not None and spec.start == "latent" else None
    return PatchJob(q0, rows, where, spec, probe, started)


def summary(folder: UPath) -> dict[str, Any]:
    """Return the manifest's counts of a finished patch: last loss, time, tokens, masks."""
    lines = (folder / "history.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    last = history[-1]
    counts = {
        "steps": len(history),
        "loss": last["loss"],
        "parts": last["parts"],
        "seconds": round(sum(record["seconds"] for record in history), 3),
        "tokens": sum(record["tokens"] for record in history),
        "masks": [record["mask"] for record in history if "mask" in record],
        "codes_changed": last["codes_changed"],
    }
    return counts | {name: last[name] for name in ("scales_changed",) if name in last}
