"""One arm, read: what statistics need of every completion, in a few bytes each and without text."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa

from qresafe.artifacts import Artifact
from qresafe.errors import DataError
from qresafe.records import COMPLETION, OUTCOMES, VERDICT
from qresafe.stages.generate import FILE as COMPLETIONS
from qresafe.stages.judge import FILE as VERDICTS
from qresafe.stages.measures import (
    AXES,
    MEASURES,
    NOT_ASKED,
    UNDECIDED,
    Answers,
    answers,
    roles,
)
from qresafe.stages.runtime import Row
from qresafe.stages.streams import read_rows
from qresafe.stages.utility import exact_match, rouge_l

_ODD = np.int64(0x51_7C_C1_B7_27_22_0A_95)  # spreads sample numbers over 64 bits, wrapping around
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

    def of(self, rows: Any) -> References:
        """Return those of completions `rows` (indices), in their order."""
        kept = np.flatnonzero(np.isin(self.rows, rows))
        kept = kept[np.argsort(self.rows[kept], kind="stable")]
        return References(self.rows[kept], self.rouge[kept], self.logps[kept], self.tokens[kept])

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
    prompts: Any
    clusters: Any
    samples: Any
    axes: Any
    splits: dict[str, Labels]
    exact: Answers
    references: References
    outcomes: dict[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> Any:
        """A hash of (prompt_id, sample) (int64)."""
        return keys_of(self.prompts, self.samples)

    def answers(self) -> dict[str, Answers]:
        """Return measure name -> the answers of this arm, where the measure can be asked."""
        verdicts = {
            role: self.outcomes[judge] for role, judge in roles(list(self.outcomes)).items()
        }
        asked = {m.name: answers(m, self.axes, verdicts, self.exact) for m in MEASURES}
        return {name: found for name, found in asked.items() if found is not None}

    def parts(self, by: str) -> dict[str, ArmRows]:
        """Return the arm split by one of `SPLITS`; empty where there is only one part.

        What has no label is in no part.
        """
        labels = self.splits[by]
        present = [name for name in labels.names if name and labels.where(name).any()]
        if len(present) < 2:
            return {}
        return {name: self.taken(np.flatnonzero(labels.where(name))) for name in present}

    def taken(self, chosen: Any) -> ArmRows:
        """Return the completions `chosen` (indices), in that order."""
        own: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("prompts", "clusters", "samples", "axes", "exact"):
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
        if np.array_equal(self.keys, to.keys):
            arm, same, shared = self, True, len(self.prompts)
        else:
            order = matching(to.keys, self.keys)
            shared = len(order)
            same = shared == len(self.prompts) == len(to.prompts)
            arm = self.taken(order) if same else self
        if not same or not np.array_equal(arm.axes, to.axes):
            what = (
                f"{to.label} and {self.label} were measured with different prompts "
                f"({len(to.prompts)} and {len(self.prompts)} answers, {shared} to the same)"
            )
            remedy = "let all arms answer the same prompts, each on the same axis"
            raise DataError(what, where="the comparison", remedy=remedy)
        return arm


def keys_of(prompts: Any, samples: Any) -> Any:
    """Return a hash of each prompt and sample, from the prompts' hashes; sample 0 keeps its own."""
    return prompts if not samples.any() else prompts + samples.astype(np.int64) * _ODD


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


def part_of(row: Row, by: str) -> str:
    """Return the part of a split that a completion's prompt belongs to; "" where it has none."""
    if by == "benchmark":
        return benchmark_of(row)
    name = row[by] or ""
    return f"{benchmark_of(row)}: {name}" if by == "category" and name else name


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


def arm_of(label: str, rows: Sequence[Row], outcomes: Mapping[str, Sequence[str]]) -> ArmRows:
    """Return an arm whose completions are in memory.

    Args:
        label: The arm's name.
        rows: Of `records.COMPLETION`.
        outcomes: Judge -> outcome of every row, in the same order.
    """
    columns = _Columns()
    for row in rows:
        columns.add(row)
    arm = columns.arm(label)
    for judge, said in outcomes.items():
        arm.outcomes[judge] = np.array([OUTCOMES.index(name) for name in said], np.int8)
    return arm


def _outcomes(arm: ArmRows, pieces: Iterator[Sequence[Row]]) -> Iterator[tuple[str, Any]]:
    said: dict[str, tuple[Any, Any, Any]] = {}
    codes = {name: place for place, name in enumerate(OUTCOMES)}
    for rows in pieces:
        for row in rows:
            kept = said.setdefault(row["judge"], (array("q"), array("i"), array("b")))
            kept[0].append(hashed(row["prompt_id"]))
            kept[1].append(row["sample"])
            kept[2].append(codes[row["outcome"]])
    for judge, kept in said.items():
        prompts, samples, outcomes = map(_numpy, kept)
        keys = keys_of(prompts, samples)
        if not np.array_equal(keys, arm.keys):
            order = matching(arm.keys, keys)
            if missing := len(arm.prompts) - len(order):
                what = f"{missing} completions have no verdict of {judge}"
                raise DataError(what, where=arm.label, remedy="judge again")
            outcomes = outcomes[order]
        yield judge, outcomes


class _Columns:
    """Collects the arrays of an arm, row by row."""

    def __init__(self) -> None:
        self.prompts, self.clusters = array("q"), array("q")
        self.samples, self.axes, self.exact = array("i"), array("b"), array("b")
        self.codes = {name: array("i") for name in SPLITS}
        self.names: dict[str, dict[str, int]] = {name: {} for name in SPLITS}
        self.rows, self.tokens = array("q"), array("i")
        self.rouge, self.logps = array("f"), array("d")

    def add(self, row: Row) -> None:
        prompt = hashed(row["prompt_id"])
        self.prompts.append(prompt)
        cluster = cluster_name(row)
        self.clusters.append(prompt if cluster == row["prompt_id"] else hashed("cluster", cluster))
        self.samples.append(row["sample"])
        self.axes.append(AXES.index(row["axis"]))
        for name, codes in self.codes.items():
            value = part_of(row, name)
            codes.append(self.names[name].setdefault(value, len(self.names[name])))
        if row["axis"] == "benign" and row["target"]:
            self._refer(row)
        else:
            self.exact.append(NOT_ASKED)

    def _refer(self, row: Row) -> None:
        failed = bool(row["error"])
        self.exact.append(UNDECIDED if failed else exact_match(row["completion"], row["target"]))
        scored = row["target_logp"] is not None and row["target_tokens"]
        self.rows.append(len(self.prompts) - 1)
        self.rouge.append(np.nan if failed else rouge_l(row["completion"], row["target"]))
        self.logps.append(row["target_logp"] if scored else np.nan)
        self.tokens.append(row["target_tokens"] if scored else 0)

    def arm(self, label: str) -> ArmRows:
        prompts, clusters = _numpy(self.prompts), _numpy(self.clusters)
        return ArmRows(
            label=label,
            prompts=prompts,
            clusters=prompts if np.array_equal(prompts, clusters) else clusters,
            samples=_constant(_numpy(self.samples)),
            axes=_numpy(self.axes),
            splits={
                name: Labels(_constant(_numpy(codes)), list(self.names[name]))
                for name, codes in self.codes.items()
            },
            exact=_numpy(self.exact),
            references=References(*map(_numpy, (self.rows, self.rouge, self.logps, self.tokens))),
        )


def _constant(values: Any) -> Any:
    """Return `values`, in no memory if all of them are 0."""
    return values if values.any() else np.broadcast_to(np.int8(0), len(values))


def _numpy(values: Any) -> Any:
    return (
        np.frombuffer(values, np.dtype(values.typecode)) if values else np.empty(0, values.typecode)
    )
