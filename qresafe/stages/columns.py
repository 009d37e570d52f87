"""One arm, read: what statistics need of every completion, in a few bytes each and without text."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa

from qresafe.artifacts import Artifact
from qresafe.errors import DataError
from qresafe.records import COMPLETION, VERDICT
from qresafe.stages.generate import FILE as COMPLETIONS
from qresafe.stages.judge import FILE as VERDICTS
from qresafe.stages.measures import (
    AXES,
    MEASURES,
    NOT_ASKED,
    OUTCOMES,
    UNDECIDED,
    Answers,
    answers,
    roles,
)
from qresafe.stages.runtime import Row
from qresafe.stages.streams import read_rows
from qresafe.stages.utility import exact_match, rouge_l

SPLITS = ("benchmark", "category", "lang")  # what results are split by
READ = pa.schema(
    COMPLETION.field(name)
    for name in (
        *("prompt_id", "sample", "axis", "prompt", "target", *SPLITS, "completion", "error"),
        *("target_logp", "target_tokens"),
    )
)
SAID = pa.schema(VERDICT.field(name) for name in ("prompt_id", "sample", "judge", "outcome"))


@dataclass(frozen=True)
class Labels:
    """A text column with few distinct values: int32 codes into `names`."""

    codes: Any
    names: list[str]

    def where(self, name: str) -> Any:
        return self.codes == self.names.index(name)


@dataclass(frozen=True)
class References:
    """Benign completions with a reference answer; arrays of the same length.

    Attributes:
        rows: Which completions they are (int64).
        rouge: ROUGE-L (float32); NaN where generation failed.
        logps: Sum of log p of the reference's tokens, nats (float64); NaN where not scored.
        tokens: How many tokens that are (int32); 0 where not scored.
    """

    rows: Any
    rouge: Any
    logps: Any
    tokens: Any

    def taken(self, chosen: Any) -> References:
        """Return those among completions `chosen` (indices), renumbered."""
        place = np.full(1 + max(self.rows.max(initial=-1), chosen.max(initial=-1)), -1)
        place[chosen] = np.arange(len(chosen))
        rows = place[self.rows]
        kept = np.flatnonzero(rows >= 0)
        kept = kept[np.argsort(rows[kept], kind="stable")]
        return References(rows[kept], self.rouge[kept], self.logps[kept], self.tokens[kept])


@dataclass(frozen=True)
class ArmRows:
    """One arm: parallel arrays, one entry per completion.

    Attributes:
        label: The arm's name.
        keys: A hash of (prompt_id, sample) (int64).
        prompts: A hash of prompt_id (int64).
        clusters: A hash of what the prompt asks for (int64); see `cluster_name`.
        samples: The sample's number (int32).
        axes: Index into `measures.AXES` (int8).
        splits: For each of `SPLITS`, the labels.
        exact: Whether a benign completion is its reference, as `measures.Answers`.
        references: The rest of what references tell.
        outcomes: Judge -> index into `measures.OUTCOMES` (int8).
    """

    label: str
    keys: Any
    prompts: Any
    clusters: Any
    samples: Any
    axes: Any
    splits: dict[str, Labels]
    exact: Answers
    references: References
    outcomes: dict[str, Any] = field(default_factory=dict)

    def answers(self) -> dict[str, Answers]:
        """Return measure name -> the answers of this arm, where the measure can be asked."""
        verdicts = {
            role: self.outcomes[judge] for role, judge in roles(list(self.outcomes)).items()
        }
        asked = {m.name: answers(m, self.axes, verdicts, self.exact) for m in MEASURES}
        return {name: found for name, found in asked.items() if found is not None}

    def parts(self, by: str) -> dict[str, ArmRows]:
        """Return the arm split by one of `SPLITS`; empty where there is only one part."""
        labels = self.splits[by]
        present = [name for name in labels.names if labels.where(name).any()]
        if len(present) < 2:
            return {}
        return {name: self.taken(np.flatnonzero(labels.where(name))) for name in present}

    def taken(self, chosen: Any) -> ArmRows:
        """Return the completions `chosen` (indices), in that order."""
        own: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("keys", "prompts", "clusters", "samples", "axes", "exact"):
            own[name] = own[name][chosen]
        own["splits"] = {k: Labels(v.codes[chosen], v.names) for k, v in self.splits.items()}
        own["outcomes"] = {judge: said[chosen] for judge, said in self.outcomes.items()}
        own["references"] = self.references.taken(chosen)
        return ArmRows(**own)

    def aligned(self, to: ArmRows) -> ArmRows:
        """Return this arm in the order of another one.

        Raises:
            DataError: They did not answer the same prompts.
        """
        order = matching(to.keys, self.keys)
        same = len(order) == len(self.keys) == len(to.keys)
        arm = self.taken(order) if same and not np.array_equal(self.keys, to.keys) else self
        if not same or not np.array_equal(arm.axes, to.axes):
            what = (
                f"{to.label} and {self.label} were measured with different prompts "
                f"({len(to.keys)} and {len(self.keys)} answers, {len(order)} to the same)"
            )
            remedy = "let all arms answer the same prompts, each on the same axis"
            raise DataError(what, where="the comparison", remedy=remedy)
        return arm


def matching(wanted: Any, keys: Any) -> Any:
    """Return the index in `keys` of each of `wanted`; shorter where some are missing."""
    order = np.argsort(keys, kind="stable")
    place = np.searchsorted(keys, wanted, sorter=order)
    found = order[np.minimum(place, max(0, len(keys) - 1))] if len(keys) else order[:0]
    return found[keys[found] == wanted[: len(found)]]


def cluster_name(row: Row) -> str:
    """Return what a completion's prompt asks for: equal for prompts that are not independent.

    The embedded set asks for each phrase in several wordings, so the phrase is the cluster;
    elsewhere every prompt stands alone. A category is none: it is a part that results are split
    by, not one of many that prompts were drawn from.
    """
    if row["benchmark"] == "embedded":
        from qresafe.embedded.corpus import phrase_of

        return f"{row['axis']}: {phrase_of(row['prompt'])}"
    return str(row["prompt_id"])


def benchmark_of(row: Row) -> str:
    """Return the benchmark that a completion's prompt comes from."""
    return row["benchmark"] or "prompts"


def hashed(*parts: object) -> int:
    """Return a signed 64-bit hash: among a million rows, two agree once in 10^7 times."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def read_arm(label: str, completions: Artifact, verdicts: Artifact) -> ArmRows:
    """Read an arm piece by piece, its verdicts in the order of its completions.

    Raises:
        DataError: A completion has no verdict.
    """
    columns = _Columns()
    for rows in read_rows(completions.path / COMPLETIONS, READ):
        for row in rows:
            columns.add(row)
    arm = columns.arm(label)
    arm.outcomes.update(_outcomes(arm, read_rows(verdicts.path / VERDICTS, SAID)))
    return arm


def _outcomes(arm: ArmRows, pieces: Iterator[Sequence[Row]]) -> Iterator[tuple[str, Any]]:
    said: dict[str, tuple[Any, Any]] = {}
    codes = {name: place for place, name in enumerate(OUTCOMES)}
    for rows in pieces:
        for row in rows:
            keys, outcomes = said.setdefault(row["judge"], (array("q"), array("b")))
            keys.append(hashed(row["prompt_id"], row["sample"]))
            outcomes.append(codes[row["outcome"]])
    for judge, (keys, outcomes) in said.items():
        order = matching(arm.keys, _numpy(keys))
        if len(order) < len(arm.keys):
            what = f"{len(arm.keys) - len(order)} completions have no verdict of {judge}"
            raise DataError(what, where=arm.label, remedy="judge again")
        yield judge, _numpy(outcomes)[order]


class _Columns:
    """Collects the arrays of an arm, row by row."""

    def __init__(self) -> None:
        self.keys, self.prompts, self.clusters = array("q"), array("q"), array("q")
        self.samples, self.axes, self.exact = array("i"), array("b"), array("b")
        self.codes = {name: array("i") for name in SPLITS}
        self.names: dict[str, dict[str, int]] = {name: {} for name in SPLITS}
        self.rows, self.tokens = array("q"), array("i")
        self.rouge, self.logps = array("f"), array("d")

    def add(self, row: Row) -> None:
        prompt = hashed(row["prompt_id"])
        self.keys.append(hashed(row["prompt_id"], row["sample"]))
        self.prompts.append(prompt)
        cluster = cluster_name(row)
        self.clusters.append(prompt if cluster == row["prompt_id"] else hashed("cluster", cluster))
        self.samples.append(row["sample"])
        self.axes.append(AXES.index(row["axis"]))
        for name, codes in self.codes.items():
            value = benchmark_of(row) if name == "benchmark" else row[name] or ""
            codes.append(self.names[name].setdefault(value, len(self.names[name])))
        if row["axis"] == "benign" and row["target"]:
            self._refer(row)
        else:
            self.exact.append(NOT_ASKED)

    def _refer(self, row: Row) -> None:
        failed = bool(row["error"])
        self.exact.append(UNDECIDED if failed else exact_match(row["completion"], row["target"]))
        scored = row["target_logp"] is not None and row["target_tokens"]
        self.rows.append(len(self.keys) - 1)
        self.rouge.append(np.nan if failed else rouge_l(row["completion"], row["target"]))
        self.logps.append(row["target_logp"] if scored else np.nan)
        self.tokens.append(row["target_tokens"] if scored else 0)

    def arm(self, label: str) -> ArmRows:
        return ArmRows(
            label=label,
            keys=_numpy(self.keys),
            prompts=_numpy(self.prompts),
            clusters=_numpy(self.clusters),
            samples=_numpy(self.samples),
            axes=_numpy(self.axes),
            splits={n: Labels(_numpy(c), list(self.names[n])) for n, c in self.codes.items()},
            exact=_numpy(self.exact),
            references=References(*map(_numpy, (self.rows, self.rouge, self.logps, self.tokens))),
        )


def _numpy(values: Any) -> Any:
    return (
        np.frombuffer(values, np.dtype(values.typecode)) if values else np.empty(0, values.typecode)
    )
