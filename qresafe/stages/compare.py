"""The stage that puts all arms side by side: checks that they are comparable, and reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from upath import UPath

from qresafe.artifacts import Artifact, Manifest, Run, write_text
from qresafe.errors import DataError
from qresafe.progress import Progress
from qresafe.stages.arms import STEPS, compare_arms, require_same
from qresafe.stages.columns import read_arm
from qresafe.stages.comparison import AttackResult, Comparison, Contamination, Source

CODE_VERSION = 2
FILE = "comparison.json"
ATTACK_FILE = "attack.json"  # of the attack_result stage
# What may differ between arms: neither changes which text a model prefers.
NOT_DECODING = {"dtype", "batch_size"}

Arms = Mapping[str, tuple[Artifact, Artifact]]


def compare(
    run: Run,
    arms: Arms,
    progress: Progress,
    steps: Sequence[tuple[str, str]] | None = None,
    *,
    contamination: Contamination | None = None,
    attacks: Sequence[Artifact] = (),
) -> Artifact:
    """Compare models that answered the same prompts.

    Args:
        run: Where the result goes.
        arms: Label -> (finished `generate`, finished `judge` of it), in the order of the tables.
            The labels of `stages.arms` make the usual steps and the attribution.
        progress: Told of every arm.
        steps: Pairs (before, after) whose flips are counted; None: those of `STEPS` that are
            there, and every pair if none is.
        contamination: What was found of the calibration prompts, to be told with the results.
        attacks: Finished `attack_result` stages, to be told with the results.

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
        more = {
            "contamination": contamination,
            "sources": _sources(arms),
            "attacks": [read_attack(made) for made in attacks],
        }
        comparison = compare_arms(read, chosen).model_copy(update=more)
        write_text(folder / FILE, comparison.model_dump_json(indent=1))
        progress.finish()
        return {"arms": len(arms), "prompts": comparison.prompts}

    keys = {f"{label}.{a.manifest.stage}": a.key for label, pair in arms.items() for a in pair}
    keys |= {f"attack {place}": made.key for place, made in enumerate(attacks)}
    made = run.stage(
        "compare",
        spec={"arms": list(arms), "steps": [list(step) for step in chosen]}
        | ({"contamination": contamination.model_dump()} if contamination else {}),
        inputs=keys,
        code_version=CODE_VERSION,
        work=work,
    )
    return made.shown(progress, "compare")


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
    # An imported file's hash and a generate stage's differ: these are compared when read.
    for stage in {m.stage for m in generated.values()}:
        alike = {k: m.inputs.get("prompts") for k, m in generated.items() if m.stage == stage}
        require_same("prompts", alike)
    require_same("decoding settings", {k: _decoding(m) for k, m in generated.items()})
    require_same("judges", {k: _judging(m) for k, m in judged.items()})
    templates = {k: m.counts.get("chat_template") for k, m in generated.items()}
    if known := {label: key for label, key in templates.items() if key}:
        require_same("chat templates", known)


def _judging(manifest: Manifest) -> dict[str, Any]:
    return {"judges": manifest.spec.get("judges"), "version": manifest.code_version}


def _sources(arms: Arms) -> dict[str, Source]:
    told = (completions.manifest.counts.get("sources", {}) for completions, _ in arms.values())
    return {name: Source.model_validate(data) for some in told for name, data in some.items()}


def read_attack(artifact: Artifact) -> AttackResult:
    """Read a finished `attack_result` stage."""
    return AttackResult.model_validate_json((artifact.path / ATTACK_FILE).read_text())


def _decoding(manifest: Manifest) -> dict[str, Any]:
    return {key: value for key, value in manifest.spec.items() if key not in NOT_DECODING}
