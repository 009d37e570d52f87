"""The stage that puts all arms side by side: checks that they are comparable, and reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from upath import UPath

from qresafe.artifacts import Artifact, Run, write_text
from qresafe.errors import DataError
from qresafe.progress import Progress
from qresafe.records import COMPLETION, VERDICT, require_columns
from qresafe.stages.arms import STEPS, ArmRows, compare_arms, require_same
from qresafe.stages.comparison import Comparison
from qresafe.stages.generate import FILE as COMPLETIONS
from qresafe.stages.judge import FILE as VERDICTS
from qresafe.stages.runtime import read_table

CODE_VERSION = 2
FILE = "comparison.json"
# What may differ between arms: neither changes which text a model prefers.
NOT_DECODING = {"dtype", "batch_size"}

Arms = Mapping[str, tuple[Artifact, Artifact]]


def compare(
    run: Run, arms: Arms, progress: Progress, steps: Sequence[tuple[str, str]] | None = None
) -> Artifact:
    """Compare models that answered the same prompts.

    Args:
        run: Where the result goes.
        arms: Label -> (finished `generate`, finished `judge` of it), in the order of the tables.
            The labels of `stages.arms` make the usual steps and the attribution.
        progress: Told of every arm.
        steps: Pairs (before, after) whose flips are counted; None: those of `STEPS` that are
            there, and every pair if none is.

    Returns:
        The artefact with comparison.json (`comparison.Comparison`).

    Raises:
        DataError: There is no arm; verdicts belong to other completions; or arms differ in
            prompts, judges or decoding.
    """
    check_comparable(arms)
    chosen = list(steps) if steps is not None else steps_of(list(arms))

    def work(folder: UPath) -> Mapping[str, Any]:
        progress.start("compare", len(arms), "arms")
        read = []
        for label, (completions, verdicts) in arms.items():
            read.append(read_arm(label, completions, verdicts))
            progress.advance()
        comparison = compare_arms(read, chosen)
        write_text(folder / FILE, comparison.model_dump_json(indent=1))
        progress.finish()
        return {"arms": len(arms), "prompts": comparison.prompts}

    keys = {f"{label}.{a.manifest.stage}": a.key for label, pair in arms.items() for a in pair}
    made = run.stage(
        "compare",
        spec={"arms": list(arms), "steps": [list(step) for step in chosen]},
        inputs=keys,
        code_version=CODE_VERSION,
        work=work,
    )
    if made.reused:
        progress.start("compare")
        progress.finish(reused=True)
    return made


def read_comparison(artifact: Artifact) -> Comparison:
    """Read a finished comparison."""
    return Comparison.model_validate_json((artifact.path / FILE).read_text())


def steps_of(labels: Sequence[str]) -> list[tuple[str, str]]:
    """Return the usual steps between `labels`, or every pair where none of them is usual."""
    usual = [step for step in STEPS if set(step) <= set(labels)]
    return usual or list(combinations(labels, 2))


def check_comparable(arms: Arms) -> None:
    """Refuse, from the manifests alone, to compare what cannot be compared.

    Raises:
        DataError: See `compare`.
    """
    if not arms:
        raise DataError("there is no arm to compare", remedy="give completions and their verdicts")
    for label, (completions, verdicts) in arms.items():
        if verdicts.manifest.inputs.get("completions") != completions.key:
            remedy = "judge these completions"
            raise DataError(f"the verdicts of {label} are of other completions", remedy=remedy)
    generated = {label: pair[0].manifest for label, pair in arms.items()}
    judged = {label: pair[1].manifest for label, pair in arms.items()}
    require_same("prompts", {k: m.inputs.get("prompts") for k, m in generated.items()})
    require_same("decoding settings", {k: _decoding(m.spec) for k, m in generated.items()})
    require_same("judges", {k: (m.spec.get("judges"), m.code_version) for k, m in judged.items()})


def _decoding(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key not in NOT_DECODING}


def read_arm(label: str, completions: Artifact, verdicts: Artifact) -> ArmRows:
    """Read an arm's tables and put its verdicts into the order of its completions.

    Raises:
        DataError: A completion has no verdict.
    """
    table = require_columns(read_table(completions.path / COMPLETIONS), COMPLETION, COMPLETIONS)
    said = require_columns(read_table(verdicts.path / VERDICTS), VERDICT, VERDICTS).to_pylist()
    rows = table.to_pylist()
    found = {(v["judge"], v["prompt_id"], v["sample"]): v["outcome"] for v in said}
    judges = list(dict.fromkeys(v["judge"] for v in said))
    try:
        outcomes = {
            judge: [found[judge, row["prompt_id"], row["sample"]] for row in rows]
            for judge in judges
        }
    except KeyError as error:
        remedy = "judge again"
        raise DataError(f"no verdict for {error.args[0]}", where=label, remedy=remedy) from None
    return ArmRows(label, rows, outcomes)
