"""Calibration prompts that are evaluated too: counted and dropped, similar wording is not."""

import pyarrow as pa
import pytest

from qresafe.errors import DataError
from qresafe.records import PROMPT
from qresafe.specs import EvaluateSpec, PairsSpec
from qresafe.stages.contamination import decontaminate, grams, nearest, normalise
from qresafe.stages.prompts import calibration_prompts, evaluation_prompts


def table(texts: list[str], prefix: str) -> pa.Table:
    rows = [
        {"prompt_id": f"{prefix}{i}", "axis": "benign", "prompt": text}
        for i, text in enumerate(texts)
    ]
    return pa.Table.from_pylist(rows, schema=PROMPT)


def test_similarity_by_hand() -> None:
    # "abcdef" has the 5-grams abcde, bcdef; "abcdeg" abcde, bcdeg: 1 of 3 is shared.
    best, where = nearest(["abcdef", "zzzzz"], ["yyyyy", "abcdeg"])
    assert best.tolist() == pytest.approx([1 / 3, 0.0])
    assert where[0] == 1
    assert list(grams("abc")) == ["abc"]


def test_similarity_equals_a_plain_computation() -> None:
    texts = evaluation_prompts(EvaluateSpec().prompts)["prompt"].to_pylist()[:40]
    best, _ = nearest(texts[:20], texts[20:])
    sets = [set(grams(text)) for text in texts]
    plain = [max(len(a & b) / len(a | b) for b in sets[20:]) for a in sets[:20]]
    assert best.tolist() == pytest.approx(plain)


def test_duplicates_and_near_duplicates_are_counted_and_dropped() -> None:
    asked = table(["How do I kill a Python process?", "Where is my coat hanging today?"], "e")
    pool = table(
        [
            "how do i KILL a python process",  # the same but for case and punctuation
            "How do I kill the Python process?",  # 3 letters apart
            "Where is my coat hanging today then?",
            "Tell me about tea.",
        ],
        "c",
    )
    kept, found = decontaminate(pool, asked, 0.6)
    assert kept["prompt_id"].to_pylist() == ["c3"]
    assert (found.calibration, found.evaluation, found.exact, found.near) == (4, 2, 1, 2)
    assert (found.examples[0].calibration, found.examples[0].evaluation) == ("c0", "e0")
    assert found.highest_kept < 0.1
    kept, found = decontaminate(pool, asked, 1.0)
    assert (kept.num_rows, found.exact, found.near) == (3, 1, 0)


def test_a_text_without_letters_stays_itself() -> None:
    assert normalise(" ?! ") == "?!"
    assert normalise("L'été, déjà!") == "l été déjà"


def test_nothing_left_is_one_sentence() -> None:
    same = table(["one prompt"], "c")
    with pytest.raises(DataError, match="all 1 calibration prompts are evaluated"):
        decontaminate(same, same, 0.8)


def test_templates_of_the_embedded_prompts_are_not_near_duplicates() -> None:
    pool = calibration_prompts(PairsSpec())
    kept, found = decontaminate(pool, evaluation_prompts(EvaluateSpec().prompts), 0.8)
    assert kept.equals(pool)
    assert found.exact + found.near == 0
    assert 0.5 < found.highest_kept < 0.8  # they do share templates
