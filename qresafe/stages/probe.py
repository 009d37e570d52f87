"""Questions that a patch answers while it is trained: a small, fixed set of validation prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qresafe.artifacts import content_key
from qresafe.records import COMPLETION
from qresafe.registry import judges as registry
from qresafe.specs import GenerateSpec
from qresafe.stages.arms import Q, share_of
from qresafe.stages.columns import arm_of
from qresafe.stages.engines import answer_row
from qresafe.stages.judge import verdict_on
from qresafe.stages.runtime import Row

Tell = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Probe:
    """What to ask, and when; picklable, so that a worker can ask it.

    Attributes:
        every: Steps between two looks.
        prompts: `records.PROMPT`.
        generate: How they are answered; one batch holds them all.
        judges: Names of the registry.
        tell: Hears of each step's {"step": ..., measure: share, ...}; picklable. None: nobody.
    """

    every: int
    prompts: pa.Table
    generate: GenerateSpec
    judges: tuple[str, ...]
    tell: Tell | None = None

    @property
    def key(self) -> str:
        """A hash of what is asked: figures of other questions are not comparable."""
        spec = self.generate.model_dump(mode="json")
        return content_key([self.every, self.prompts.to_pylist(), spec, list(self.judges)])

    def watch(self, folder: str) -> ProbeWatch:
        """Return the probe with the tokenizer of a model folder, for the patch loop."""
        from qresafe.hf.models import load_tokenizer

        return ProbeWatch(self, load_tokenizer(folder))

    def curve(self, history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return {"step": ..., measure: share, ...} of each of this probe's looks in a history."""
        looks = [(r["step"], r["probe"]) for r in history if "probe" in r]
        return [{"step": step} | look["shares"] for step, look in looks if look["of"] == self.key]


def choose_prompts(prompts: pa.Table, axes: Sequence[str], count: int) -> pa.Table:
    """Return `count` prompts of each axis, by a hash of their names: the same ones every time."""
    chosen = [prompts.schema.empty_table()]
    for axis in axes:
        found = prompts.filter(pc.equal(prompts["axis"], axis))
        order = [content_key(name) for name in found["prompt_id"].to_pylist()]
        taken = sorted(sorted(range(len(order)), key=order.__getitem__)[:count])
        chosen.append(found.take(pa.array(taken, pa.int64())))
    return pa.concat_tables(chosen)


class ProbeWatch:
    """A `patch_loop.Watch` that asks a probe's questions."""

    def __init__(self, probe: Probe, tokenizer: Any) -> None:
        from qresafe.hf.chat import prompt_ids

        self.every, self._probe, self._tokenizer = probe.every, probe, tokenizer
        self._key, self._rows = probe.key, probe.prompts.to_pylist()
        system = probe.generate.system_prompt
        self._prompts = [prompt_ids(tokenizer, row["prompt"], system) for row in self._rows]

    def look(self, model: Any) -> dict[str, Any]:
        """Return the probe's key, the share of each measure, and the seconds that it took."""
        from qresafe.hf.generate import generate_batch

        began = time.perf_counter()
        keys = [row["prompt_id"] for row in self._rows]
        spec = self._probe.generate
        made = generate_batch(model, self._tokenizer, self._prompts, keys, spec)
        asked = [
            dict.fromkeys(COMPLETION.names) | row | {"sample": 0, "prompt_ids": ids}
            for row, ids in zip(self._rows, self._prompts, strict=True)
        ]
        answered: list[Row] = [
            row | answer_row(row, text=answer.text, ids=answer.ids, finish=answer.finish)
            for row, answer in zip(asked, made, strict=True)
        ]
        outcomes = {
            name: [verdict_on(registry.get(name), row).outcome for row in answered]
            for name in self._probe.judges
        }
        arm = arm_of(Q, answered, outcomes)
        shares = {name: share_of(a, arm.clusters).share for name, a in arm.answers().items()}
        seconds = round(time.perf_counter() - began, 3)
        return {"of": self._key, "shares": shares, "seconds": seconds}

    def tell(self, record: Mapping[str, Any]) -> None:
        if self._probe.tell and record["probe"]["of"] == self._key:
            self._probe.tell({"step": record["step"]} | record["probe"]["shares"])
