"""How many rows and tokens an experiment's stages see, as far as its spec tells."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_args

from pydantic import BaseModel, ConfigDict

from qresafe.loading import read_yaml
from qresafe.spec_base import Kind
from qresafe.specs import AttackSpec, ExperimentSpec, PatchSpec, PromptSetSpec

FILE = Path(__file__).with_name("assumptions.yaml")
HUANG, PAPER = 49, 6  # decoding configurations of an attack


class Assumptions(BaseModel):
    """assumptions.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_tokens: int
    train_utilisation: float
    score_utilisation: float
    decode_bandwidth: float
    load_gbs: float
    search_bytes: float
    default_rows: int
    rows: dict[str, int]


@cache
def assumptions() -> Assumptions:
    """Return what is assumed where a spec does not say."""
    return Assumptions.model_validate(read_yaml(FILE.read_text("utf-8")))


@dataclass(frozen=True)
class Workload:
    """Rows of an experiment.

    Attributes:
        calibration: Prompts that W and Q0 answer.
        pool: Rows that the patch learns from, at most.
        preferences: Of these, the ones with two answers, at most.
        evaluation: Prompts that every arm answers.
        arms: Models that answer them.
        attacks: Answers of an attack per harmful prompt and arm; 0: none.
        harmful: Harmful evaluation prompts.
    """

    calibration: int
    pool: int
    preferences: int
    evaluation: int
    arms: int
    attacks: int
    harmful: int


def workload(spec: ExperimentSpec) -> Workload:
    """Return how many rows the stages of an experiment see; upper bounds where data decides."""
    prompts = _calibration(spec)
    preferred = sum(prompts.get(kind, 0) for kind in spec.pairs.prefer)
    preferences = min(preferred, spec.pairs.max_preferences)
    weights = spec.patch.objective
    anchored = prompts.total() - preferred if weights.kl or weights.anchor else 0
    sets = spec.evaluate.prompts
    tunes = spec.control and spec.quantize.method in {"llm_qat", "qlora"}
    return Workload(
        calibration=prompts.total(),
        pool=preferences + anchored,
        preferences=preferences,
        evaluation=sum(map(rows_of, sets)),
        arms=3 + tunes + spec.evaluate.adapter,
        attacks=_tries(spec.evaluate.attack) if spec.evaluate.attack else 0,
        harmful=sum(rows_of(each) for each in sets if each.axis in {None, "harmful"}),
    )


def rows_of(prompts: PromptSetSpec) -> int:
    """Return how many prompts a set gives: its limit, else the known or the assumed number."""
    known = assumptions()
    by_axis = f"{prompts.benchmark} {prompts.axis or 'harmful'}"
    count = known.rows.get(by_axis) or known.rows.get(prompts.benchmark, known.default_rows)
    return min(count, prompts.limit) if prompts.limit else count


def steps_of(spec: PatchSpec, pool: int) -> int:
    """Return the optimizer steps of a patch."""
    return spec.steps or max(1, math.ceil(spec.epochs * pool / spec.batch_size))


def _calibration(spec: ExperimentSpec) -> Counter[str]:
    """Return how many calibration prompts there are of each kind."""
    pairs = spec.pairs
    if pairs.prompts:
        found: Counter[str] = Counter()
        for prompts in pairs.prompts:
            found[prompts.axis or "harmful"] += rows_of(prompts)
        return found
    if pairs.path:  # what it holds is not known before it is read
        return Counter(harmful=assumptions().default_rows, benign=assumptions().default_rows)
    return Counter({kind: getattr(pairs, kind) for kind in get_args(Kind)})


def _tries(attack: AttackSpec) -> int:
    decoding = {"huang": HUANG, "paper": PAPER}
    configurations = (
        decoding[attack.decoding] if isinstance(attack.decoding, str) else len(attack.decoding)
    )
    return configurations * len(attack.systems) * len(attack.prefills) * attack.samples
