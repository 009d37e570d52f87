"""Which answers become training rows, and what is counted of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from upath import UPath

from qresafe import records
from qresafe.artifacts import Artifact, Run
from qresafe.errors import DataError
from qresafe.hf.models import load_model, load_tokenizer
from qresafe.hf.warm import ModelInput, ModelRef
from qresafe.progress import Silent
from qresafe.specs import PairsSpec
from qresafe.stages.pairs import pairs, select
from qresafe.stages.runtime import InProcessRuntime, read_table, write_table

REFUSAL, ANSWER = "I'm sorry, but I can't help with that.", "Step one: tba."


def completion(prompt_id: str, axis: str, text: str, **changes: Any) -> dict[str, Any]:
    row = dict.fromkeys(records.COMPLETION.names) | {
        "prompt_id": prompt_id,
        "axis": axis,
        "prompt": f"prompt {prompt_id}",
        "sample": 0,
        "completion": text,
        "completion_ids": [ord(c) % 200 + 6 for c in text],
        "prompt_tokens": 3,
        "new_tokens": len(text),
        "finish": "stop",
    }
    return row | changes


def refused(row: dict[str, Any]) -> bool:
    return row["completion"] == REFUSAL


# (id, axis, W's answer, Q0's answer) and what must become of it.
CASES = [
    ("flip", "harmful", REFUSAL, ANSWER, "preference"),
    ("same", "harmful", REFUSAL, REFUSAL, "identical answers"),
    ("comply", "harmful", "Sure.", ANSWER, "W does not refuse"),
    ("reworded", "harmful", REFUSAL, REFUSAL + " ", "preference"),  # not equal, not "refused"
    ("blank", "harmful", REFUSAL, " ", "empty answers"),
    ("benign", "benign", "Yes.", "Yes.", "anchor"),
    ("border", "borderline", REFUSAL, ANSWER, "anchor"),
    ("cross", "recombined", REFUSAL, REFUSAL, "anchor"),
    ("silent", "benign", "", "Yes.", "empty answers"),
]


def test_every_row_is_a_preference_an_anchor_or_counted_by_reason() -> None:
    w = [completion(i, axis, w) for i, axis, w, _, _ in CASES]
    q0 = [completion(i, axis, q) for i, axis, _, q, _ in CASES]
    w.append(completion("lost", "benign", "Yes."))
    w.append(completion("failed", "benign", "Yes.", error="out of memory"))
    q0.append(completion("failed", "benign", "Yes."))
    kept, counts = select(w, q0, PairsSpec(), refused)
    verdicts = {row["prompt_id"]: "preference" if row["preference"] else "anchor" for row in kept}
    for prompt_id, _, _, _, expected in CASES:
        if expected in ("preference", "anchor"):
            assert verdicts.pop(prompt_id) == expected
    assert not verdicts
    assert counts["dropped"] == {
        "W does not refuse": 1,
        "empty answers": 2,
        "failed generations": 1,
        "identical answers": 1,
        "not answered by Q0": 1,
    }
    assert counts["rows"] + sum(counts["dropped"].values()) == len(w)
    assert (counts["rows"], counts["preferences"]) == (5, 2)
    assert counts["kinds"] == {"benign": 1, "borderline": 1, "harmful": 2, "recombined": 1}


def test_keep_different_takes_any_pair_of_unequal_answers() -> None:
    w = [completion("a", "harmful", "Sure."), completion("b", "harmful", REFUSAL)]
    q0 = [completion("a", "harmful", ANSWER), completion("b", "harmful", REFUSAL)]
    kept, counts = select(w, q0, PairsSpec(keep="different"), refused)
    assert [row["prompt_id"] for row in kept] == ["a"]
    assert counts["dropped"] == {"identical answers": 1}


def test_benign_chats_become_preferences_where_asked_for() -> None:
    """The paper's pairs: W's and Q0's answers to benign chats, whoever refuses."""
    answers = [("a", "benign", "Yes.", "No."), ("b", "benign", "Yes.", "Yes."),
               ("c", "borderline", "Well.", "So."), ("h", "harmful", REFUSAL, ANSWER)]  # fmt: skip
    w = [completion(i, axis, w) for i, axis, w, _ in answers]
    q0 = [completion(i, axis, q) for i, axis, _, q in answers]
    kept, counts = select(w, q0, PairsSpec(prefer=("benign",)), refused)
    assert {row["prompt_id"]: row["preference"] for row in kept} == {
        "a": True, "c": False, "h": False
    }  # fmt: skip
    assert counts["dropped"] == {"identical answers": 1}
    kept, _ = select(w, q0, PairsSpec(prefer=("benign",), max_preferences=1), refused)
    assert sum(row["preference"] for row in kept) == 1


def test_pairs_made_before_there_was_a_choice_are_found() -> None:
    assert "prefer" not in PairsSpec().key_data()
    assert PairsSpec(prefer=("benign",)).key_data()["prefer"] == ["benign"]


def test_max_preferences_draws_by_seed_and_keeps_anchors() -> None:
    w = [completion(f"h{i}", "harmful", REFUSAL) for i in range(9)]
    q0 = [completion(f"h{i}", "harmful", ANSWER) for i in range(9)]
    for rows in (w, q0):
        rows.append(completion("b", "benign", "Yes."))

    def drawn(seed: int) -> list[str]:
        kept, counts = select(w, q0, PairsSpec(max_preferences=4, seed=seed), refused)
        assert counts["dropped"] == {"over max_preferences": 5}
        assert kept[-1]["prompt_id"] == "b"
        return [row["prompt_id"] for row in kept[:-1]]

    assert drawn(0) == drawn(0)
    assert drawn(0) == sorted(drawn(0))  # W's order
    assert len({tuple(drawn(seed)) for seed in range(5)}) > 1


def test_no_flip_leaves_a_warning_and_no_row_at_all_is_an_error() -> None:
    same = [completion("h", "harmful", REFUSAL)]
    anchor = [completion("b", "benign", "Yes.")]
    kept, counts = select(same + anchor, same + anchor, PairsSpec(), refused)
    assert (len(kept), counts["preferences"]) == (1, 0)
    assert "Q0 refuses wherever W does" in counts["warning"]
    with pytest.raises(DataError, match=r"nothing to repair \(1 identical answers\) in pairs"):
        select(same, same, PairsSpec(), refused)


def _artifact(folder: Path, rows: list[dict[str, Any]]) -> Artifact:
    run = Run(str(folder), "made")
    table = pa.Table.from_pylist(rows, records.COMPLETION)
    return run.stage(
        "generate",
        spec={"rows": rows},
        inputs={},
        code_version=1,
        work=lambda place: write_table(place / "completions.parquet", table) or {},
    )


def made_table(
    folder: Path, w: list[Any], q0: list[Any], tokenizer: Any, teacher: Any, spec: PairsSpec
) -> Any:
    """Return the pairs stage's table of W's and Q0's completions."""
    made = pairs(
        Run(str(folder), "t"),
        teacher_completions=_artifact(folder, w),
        q0_completions=_artifact(folder, q0),
        tokenizer=tokenizer,
        teacher=teacher,
        spec=spec,
        runtime=InProcessRuntime(),
        progress=Silent(),
    )
    return read_table(UPath(made.path) / "pairs.parquet")


def test_a_text_that_was_cut_does_not_end(tmp_path: Path, tiny_llama: Path) -> None:
    """An endpoint's answers have no ids: the end token is learned of those that did stop."""
    texts = {"h": ("stop", REFUSAL), "b": ("length", "Yes, of")}
    w = [
        completion(name, axis, texts[name][1], completion_ids=[], finish=texts[name][0])
        for name, axis in (("h", "harmful"), ("b", "benign"))
    ]
    q0 = [completion("h", "harmful", ANSWER), completion("b", "benign", "Yes.")]
    tokenizer = load_tokenizer(tiny_llama)
    rows = made_table(tmp_path, w, q0, tokenizer, None, PairsSpec()).to_pylist()
    learned = {row["prompt_id"]: tokenizer.decode(row["chosen_ids"]) for row in rows}
    assert learned == {"h": REFUSAL + "</s>", "b": "Yes, of"}


def test_stage_stores_ids_and_the_teachers_own_distribution(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """The stored log-probs are W's: checked against one plain forward pass per row."""
    w = [completion("h", "harmful", REFUSAL), completion("b", "benign", "Yes, of course.")]
    q0 = [completion("h", "harmful", ANSWER), completion("b", "benign", "Yes.")]
    tokenizer = load_tokenizer(tiny_llama)
    teacher = ModelInput(ModelRef(str(tiny_llama), "tiny"), "w")
    few = PairsSpec(teacher_tokens=3, teacher_top_k=5, batch_size=1)
    table = made_table(tmp_path, w, q0, tokenizer, teacher, few)
    assert table.schema.equals(records.PAIR)
    model = load_model(tiny_llama)
    for row, wrote in zip(table.to_pylist(), w, strict=True):
        assert row["chosen_ids"] == wrote["completion_ids"]
        assert tokenizer.decode(row["prompt_ids"]) == (
            f"<s><|user|>{wrote['prompt']}</s><|assistant|>"
        )
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        with torch.no_grad():
            logps = model(ids).logits[0].log_softmax(-1)[len(row["prompt_ids"]) - 1 :][:3]
        top = logps.topk(5)
        assert row["teacher_top_k"] == 5
        assert row["teacher_ids"] == top.indices.flatten().tolist()
        assert row["teacher_logps"] == pytest.approx(top.values.flatten().tolist(), abs=1e-5)
