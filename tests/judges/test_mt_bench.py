"""MT-Bench: which prompt, how it is filled, and how judgments of all shapes are read."""

from __future__ import annotations

import pytest

from qresafe.judges import mt_bench
from qresafe.judges.mt_bench import Question

PLAIN = Question(81, "writing", ("Write {answer}.", "Again."), None)
MATHS = Question(111, "math", ("1+1?", "And 2+2?"), ("2", "4"))
A, B = ("a one", "a two"), ("b one", "b two")


@pytest.mark.parametrize(
    ("answers", "question", "turn", "name"),
    [
        (1, PLAIN, 1, "single-v1"),
        (1, PLAIN, 2, "single-v1-multi-turn"),
        (1, MATHS, 1, "single-math-v1"),
        (1, MATHS, 2, "single-math-v1-multi-turn"),
        (2, PLAIN, 1, "pair-v2"),
        (2, PLAIN, 2, "pair-v2-multi-turn"),
        (2, MATHS, 1, "pair-math-v1"),
        (2, MATHS, 2, "pair-math-v1-multi-turn"),
    ],
)
def test_the_prompt_follows_kind_reference_and_turn(
    answers: int, question: Question, turn: int, name: str
) -> None:
    assert mt_bench.prompt_name(answers, question, turn) == name
    system, user = mt_bench.messages(question, turn, [A, B][:answers])
    assert (system["role"], user["role"]) == ("system", "user")
    assert "{question" not in user["content"]
    assert "{ref" not in user["content"]
    assert ("a two" in user["content"]) == (turn == 2)
    assert ("b one" in user["content"]) == (answers == 2)
    if question is MATHS:
        assert "\n2\n" in user["content"]
        assert ("\n4\n" in user["content"]) == (turn == 2)


def test_single_grading_word_for_word() -> None:
    _, user = mt_bench.messages(PLAIN, 1, [A])
    start, end = user["content"].split("[Question]")
    assert start.startswith("[Instruction]\nPlease act as an impartial judge and evaluate")
    assert start.endswith('for example: "Rating: [[5]]".\n\n')
    assert end == (  # a place's name inside a text is text
        "\nWrite {answer}.\n\n[The Start of Assistant's Answer]\na one\n"
        "[The End of Assistant's Answer]"
    )


def test_pairwise_second_turn_shows_both_conversations() -> None:
    _, user = mt_bench.messages(PLAIN, 2, [B, A])
    first, second = user["content"].split("<|The End of Assistant A's Conversation with User|>")
    assert "### Assistant A:\nb one\n\n### User:\nAgain.\n\n### Assistant A:\nb two" in first
    assert "### Assistant B:\na one\n\n### User:\nAgain.\n\n### Assistant B:\na two" in second


@pytest.mark.parametrize(
    ("judgment", "expected"),
    [
        ("Good. Rating: [[8]]", 8.0),
        ("Rating: [[7.5]] and no more", 7.5),
        ("Rating: [9]", 9.0),
        ("First [3] then Rating: [[4]]", 4.0),  # the double brackets win
        ("Rating: [[10]]", 10.0),
        ("Rating: [[0]]", None),
        ("Rating: [[11]]", None),
        ("Rating: [[5/10]]", None),
        ("Rating: 8", None),
        ("[[rating]]", None),
        ("", None),
    ],
)
def test_ratings(judgment: str, expected: float | None) -> None:
    assert mt_bench.rating(judgment) == expected


@pytest.mark.parametrize(
    ("judgment", "expected"),
    [
        ("... [[A]]", "A"),
        ("[[B]] because", "B"),
        ("[[C]]", "tie"),
        ("[[A]]. So it is [[A]]", "A"),
        ("[[A]] or [[B]]", None),
        ("[A]", None),
        ("", None),
    ],
)
def test_marks(judgment: str, expected: str | None) -> None:
    assert mt_bench.mark(judgment) == expected


@pytest.mark.parametrize(
    ("first", "swapped", "winner"),
    [
        ("A", "B", "model_1"),
        ("B", "A", "model_2"),
        ("A", "A", "tie"),  # always the first place: a matter of position
        ("B", "B", "tie"),
        ("A", "tie", "tie"),
        ("tie", "tie", "tie"),
        (None, "B", None),
        ("A", None, None),
    ],
)
def test_only_a_win_in_both_places_is_a_win(
    first: mt_bench.Mark | None, swapped: mt_bench.Mark | None, winner: str | None
) -> None:
    assert mt_bench.agreed(first, swapped) == winner


def test_averages_are_fastchats() -> None:
    scores = [(PLAIN, 1, 8.0), (PLAIN, 2, None), (MATHS, 1, 4.0), (MATHS, 2, 3.0)]
    found = mt_bench.grading_summary(scores)
    assert (found["first_turn"], found["second_turn"]) == (6.0, 3.0)  # (8 + 4) / 2; 3 alone
    assert found["average"] == 5.0  # (8 + 4 + 3) / 3: of judgments, not of turns
    assert found["by_category"] == {"writing": 8.0, "math": 3.5}
    assert (found["decided"], found["undecided"]) == (3, 1)


def test_rates_of_pairs() -> None:
    found = mt_bench.pair_summary(["model_1", "model_1", "model_2", "tie", None])
    assert (found["win"], found["loss"], found["tie"], found["undecided"]) == (2, 1, 1, 1)
    assert found["win_rate"] == 2 / 4
    assert found["win_rate_adjusted"] == (2 + 0.5) / 4
    assert mt_bench.pair_summary([None])["win_rate"] is None
