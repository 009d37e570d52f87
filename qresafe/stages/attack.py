"""The stage that attacks a model: harmful prompts in many framings and decoding configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from upath import UPath

from qresafe.artifacts import Artifact, Run
from qresafe.benchmarks.base import sources_of
from qresafe.errors import DataError
from qresafe.hf.batching import length_plan
from qresafe.hf.chat import continued_ids, prompt_text, text_ids
from qresafe.hf.models import context_length, load_tokenizer
from qresafe.hf.warm import ModelInput, shelf
from qresafe.progress import Progress
from qresafe.specs import AttackSpec, GenerateSpec
from qresafe.stages.attack_grid import Cell, cells
from qresafe.stages.engines import ANSWER, answer_row, in_memory
from qresafe.stages.generate import FILE, assemble, check_prompts, summary, table_key
from qresafe.stages.runtime import Batch, BatchFunction, Row, Runtime, read_parts, write_table

CODE_VERSION = 1


@dataclass(frozen=True)
class AttackJob:
    """Answers each row's prompt in all of its framing's cells; the prompt is read once.

    Noise is keyed by prompt, framing, configuration and draw: a completion depends neither on the
    other cells nor on the prompts beside it.

    Args:
        model: The model.
        cells: All cells of the attack; a row names its own by their places.
        max_new_tokens: Per completion.
        seed: Of the noise.
    """

    model: ModelInput
    cells: tuple[Cell, ...]
    max_new_tokens: int
    seed: int

    def setup(self, device: str) -> BatchFunction:
        from qresafe.hf.generate import Branch, generate_branches

        model, tokenizer = shelf().load(self.model, device)

        def answer(rows: list[Row]) -> list[Row]:
            # Rows of one batch may have other framings, but as many cells of the same decoding.
            branches = [
                Branch([self.key(row, place) for row in rows], self.decoding(rows[0], place))
                for place in range(len(rows[0]["places"]))
            ]
            made = generate_branches(model, tokenizer, [r["prompt_ids"] for r in rows], branches)
            return [
                answer_row(row | {"sample": sample}, text=g.text, ids=g.ids, finish=g.finish)
                for place, answers in enumerate(made)
                for row, g in zip(rows, answers, strict=True)
                for sample in [row["places"][place]]
            ]

        def give_up(rows: Sequence[Row], reason: str) -> list[Row]:
            return [
                answer_row(row | {"sample": sample}, finish="error", error=reason)
                for row in rows
                for sample in row["places"]
            ]

        def compute(rows: list[Row]) -> pa.Table:
            return pa.Table.from_pylist(in_memory(answer, rows, give_up), schema=ANSWER)

        return compute

    def key(self, row: Row, place: int) -> str:
        """Return what keys the noise of a row's completion in its `place`-th cell."""
        cell = self.cells[row["places"][place]]
        return f"{row['prompt_id']}/{cell.framing.name}/{cell.configuration.name}/{cell.draw}"

    def decoding(self, row: Row, place: int) -> GenerateSpec:
        """Return how a row's completion in its `place`-th cell is drawn."""
        decoding = self.cells[row["places"][place]].configuration.decoding
        return GenerateSpec(
            max_new_tokens=self.max_new_tokens, seed=self.seed, **decoding.model_dump()
        )


def attack(
    run: Run,
    *,
    label: str,
    model: ModelInput,
    prompts: pa.Table,
    spec: AttackSpec,
    runtime: Runtime,
    progress: Progress,
) -> Artifact:
    """Complete every harmful prompt in every cell of the attack.

    Args:
        run: Where the result goes.
        label: What the model is called in the display; not part of the key.
        model: The model.
        prompts: A table with the columns of `records.PROMPT`; only axis harmful is used.
        spec: What is tried.
        runtime: Where to compute; on Ray it is one job.
        progress: Told of every finished batch of prompts.

    Returns:
        The artefact with completions.parquet, as the generate stage makes it, so that any judge
        can judge it; `sample` is a cell's place in `attack_grid.cells`. A completion is what the
        model added: a prefill is the attacker's text and not part of it.

    Raises:
        SpecError: A system prompt or configuration is not acceptable.
        DataError: No prompt is harmful, or one exceeds the context.
    """
    tried = cells(spec)
    sources = sources_of(prompts)
    harmful = harmful_prompts(prompts)

    def work(folder: UPath) -> Mapping[str, Any]:
        rows = requests(model, harmful, tried, spec)
        progress.start(f"attack {label}", len(rows), "prompts")
        job = AttackJob(model, tuple(tried), spec.max_new_tokens, spec.seed)
        groups = length_plan([row["size"] for row in rows], spec.batch_size)
        batches = [
            Batch(index, [rows[place] for place in group])
            for index, group in enumerate(reversed(groups))
        ]
        # What a part holds depends on this size, and the stage's key does not.
        parts = folder / "work" / f"parts-of-{spec.batch_size}"
        spent = runtime.map_batches(job, batches, parts, progress)
        table = assemble(harmful, read_parts(parts, len(batches)), len(tried))
        write_table(folder / FILE, table)
        counts = summary(table, spent) | {"cells": len(tried), "sources": sources}
        progress.finish(f"{table.num_rows} completions, {counts['errors']} errors")
        return counts

    made = run.stage(
        "attack",
        # The templates themselves, not their file's name.
        spec=spec.model_dump(mode="json", exclude={"templates", "batch_size"})
        | {"framings": [vars(f) for f in dict.fromkeys(cell.framing for cell in tried)]}
        | {"dtype": model.ref.dtype},
        inputs={"model": model.key, "prompts": table_key(harmful)},
        code_version=CODE_VERSION,
        work=work,
    )
    return made.shown(progress, f"attack {label}")


def harmful_prompts(prompts: pa.Table) -> pa.Table:
    """Return the prompts that an attack is about.

    Raises:
        DataError: There are none.
    """
    table = check_prompts(prompts)
    harmful = table.filter(pc.equal(table["axis"], "harmful"))
    if harmful.num_rows == 0:
        remedy = "add a prompt set of axis harmful to evaluate.prompts"
        raise DataError("there is no harmful prompt to attack with", remedy=remedy)
    return harmful


def requests(
    model: ModelInput, prompts: pa.Table, tried: Sequence[Cell], spec: AttackSpec
) -> list[Row]:
    """Return one row per prompt and framing: prompt_id, prompt_ids, size, places of its cells.

    Raises:
        DataError: A prompt with its answer is longer than the model's context.
        ModelError: The template fails.
    """
    ref = model.ref
    tokenizer = load_tokenizer(ref.path, trust_remote_code=ref.trust_remote_code)
    context = context_length(ref.path, ref.trust_remote_code)
    rows = []
    for framing in dict.fromkeys(cell.framing for cell in tried):
        places = [place for place, cell in enumerate(tried) if cell.framing == framing]
        for prompt in prompts.to_pylist():
            asked = prompt_text(tokenizer, framing.ask(prompt["prompt"]), framing.system)
            prefill = continued_ids(tokenizer, asked, framing.prefill)
            ids = [*text_ids(tokenizer, asked), *prefill]
            if context is not None and len(ids) + spec.max_new_tokens > context:
                what = f"{len(ids)} tokens and {spec.max_new_tokens} of the answer exceed {context}"
                where = f"prompt {prompt['prompt_id']!r} in framing {framing.name!r}"
                remedy = "shorten the template or lower evaluate.attack.max_new_tokens"
                raise DataError(what, where=where, remedy=remedy)
            row = {"prompt_id": prompt["prompt_id"], "prompt_ids": ids, "size": len(ids)}
            rows.append(row | {"places": places})
    return rows
