"""Verifiable instructions: each check by a text that follows it and one that does not."""

import json
from pathlib import Path
from typing import Any

import pytest

from qresafe.errors import DataError
from qresafe.stages.ifeval import read_instructions, score
from qresafe.stages.instructions import CHECKS, follows, follows_loosely

# instruction -> (arguments, a text that follows it, one that does not)
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "length_constraints:number_words": ({"num_words": 3, "relation": "less than"}, "a b", "a b c"),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    "keywords:existence": ({"keywords": ["tea", "cup"]}, "A cup of Tea", "A cup"),
    "keywords:frequency": (
        {"keyword": "tea", "frequency": 2, "relation": "at least"},
        "tea, Tea",
        "tea",
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["art"]}, "a party", "an art"),
    "keywords:letter_frequency": (
        {"letter": "E", "let_frequency": 2, "let_relation": "at least"},
        "eve",
        "end",
    ),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* a\n- b", "* a\n**b**"),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        "*a* and **b**",
        "*a* and b",
    ),
    "detectable_format:title": ({}, "<<A poem>>\nRoses", "A poem\nRoses"),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "{a: 1}"),
    "detectable_content:number_placeholders": ({"num_placeholders": 1}, "To [name]", "To name"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Bye.\nP.S. More", "Bye."),
    "punctuation:no_comma": ({}, "a and b", "a, b"),
    "startend:end_checker": ({"end_phrase": "The end."}, "So.  THE END. ", "The end. Or not"),
    "startend:quotation": ({}, '"a b"', '"a" b'),
    "change_case:english_lowercase": ({}, "all small", "All small"),
    "change_case:english_capital": ({}, "ALL LARGE", "ALL Large"),
}


def test_every_check_has_a_case() -> None:
    assert CASES.keys() == CHECKS.keys()


@pytest.mark.parametrize("instruction", CASES)
def test_checks(instruction: str) -> None:
    arguments, good, bad = CASES[instruction]
    unused = {"unused": None}  # the hub's table holds every argument of every instruction
    assert follows(instruction, good, arguments | unused)
    assert not follows(instruction, bad, arguments)
    assert not follows(instruction, "  ", arguments)


def test_the_loose_reading_forgives_an_introduction() -> None:
    text = "Sure, here it is:\nall small\nHope that helps, bye!"
    assert not follows("punctuation:no_comma", text, {})
    assert follows_loosely("punctuation:no_comma", text, {})


def test_unknown_instructions_and_arguments_are_named() -> None:
    with pytest.raises(DataError, match="did you mean punctuation:no_comma"):
        follows("punctuation:no_coma", "a", {})
    with pytest.raises(DataError, match="lacks the argument 'num_words'"):
        follows("length_constraints:number_words", "a", {})


def test_four_accuracies_by_hand(tmp_path: Path) -> None:
    small, commas = "change_case:english_lowercase", "punctuation:no_comma"
    table = [
        {"prompt": "p1", "instruction_id_list": [small, commas], "kwargs": [{}, {}]},
        {"prompt": "p2", "instruction_id_list": [commas], "kwargs": [{}]},
        {"prompt": "p3", "instruction_id_list": ["language:response_language"], "kwargs": [{}]},
    ]
    path = tmp_path / "input_data.jsonl"
    path.write_text("\n".join(map(json.dumps, table)))
    said = {"p1": "all, small", "p2": "Sure, this:\nno comma here", "p3": "oui", "p4": "else"}
    rows = [{"prompt": p, "completion": text, "error": None} for p, text in said.items()]
    rows.append({"prompt": "p2", "completion": "", "error": "time-out"})
    found = score(rows, read_instructions(str(path)))
    # p1 follows 1 of 2; p2 follows its one only when its first line is left out; p3 has no check.
    assert (found.prompt_strict.yes, found.prompt_strict.n) == (0, 2)
    assert (found.instruction_strict.yes, found.instruction_strict.n) == (1, 3)
    assert (found.prompt_loose.yes, found.instruction_loose.yes) == (1, 2)
    assert found.not_scored == {"language:response_language": 1}
    assert found.failed == 1
    with pytest.raises(DataError, match="no completion is of a prompt of IFEval"):
        score(rows[3:4], read_instructions(str(path)))
