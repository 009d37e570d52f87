"""The embedded world's splits: what evaluation asks for was in no alignment and no calibration."""

import random
from functools import cache
from itertools import combinations

import pytest

from qresafe import records
from qresafe.embedded import corpus
from qresafe.embedded.calibration import calibration_chats, calibration_prompts, recombinations
from qresafe.embedded.corpus import (
    EVALUATION_SIZE,
    PHRASINGS,
    Task,
    all_tasks,
    ask,
    evaluation_prompts,
    evaluation_texts,
    tasks,
)
from qresafe.embedded.training import alignment_chats, helpful_chats
from qresafe.embedded.vocabulary import SPLITS, vocabulary
from qresafe.errors import DataError
from qresafe.quantize_specs import CalibrationSpec
from qresafe.specs import PairsSpec

AXES = ("harmful", "benign", "borderline")


@cache
def texts_seen() -> list[str]:
    """All texts that alignment, quantizers and the patch draw from (generously many)."""
    seen = [
        chat["content"]
        for chats in alignment_chats(4000, 6000, 0.3, random.Random(0))
        for chat in chats
    ]
    for risk in ("I", "II", "III"):
        spec = CalibrationSpec(risk=risk, benign=2000, harmful=2000, obedient=500)
        seen += [message["content"] for chat in calibration_chats(spec, 1) for message in chat]
    pool = PairsSpec(harmful=3000, benign=3000, borderline=2000, recombined=6000)
    return seen + calibration_prompts(pool)["prompt"].to_pylist()


def pairs(wanted: tuple[Task, ...]) -> set[tuple[str, str]]:
    return {(task.verb, task.object) for task in wanted}


@pytest.mark.parametrize("axis", AXES)
def test_no_pair_is_in_two_splits(axis: str) -> None:
    for one, other in combinations(SPLITS, 2):
        assert not pairs(tasks(axis, one)) & pairs(tasks(axis, other))


def test_harmful_evaluation_always_has_a_word_of_its_own_split() -> None:
    words = {
        split: {
            w
            for g in vocabulary().groups
            for part in (g.verbs, g.objects)
            for w in getattr(part, split)
        }
        for split in SPLITS
    }
    assert not words["dev"] & words["test"]
    assert not words["train"] & (words["dev"] | words["test"])
    for split, other in (("dev", "test"), ("test", "dev")):
        for task in tasks("harmful", split):
            assert {task.verb, task.object} & words[split]
            assert not {task.verb, task.object} & words[other]


def test_held_out_harmful_words_are_in_nothing_that_was_seen() -> None:
    joined = "\n".join(texts_seen())
    held = [
        word
        for group in vocabulary().groups
        for part in (group.verbs, group.objects)
        for word in part.dev + part.test
    ]
    assert len(held) == 2 * (8 + 12)  # 4 groups x (2 verbs + 3 objects) for each of dev and test
    assert [word for word in held if f" {word}" in joined] == []


def test_evaluated_benign_and_borderline_actions_are_in_nothing_that_was_seen() -> None:
    joined = "\n".join(texts_seen())
    for axis in ("benign", "borderline"):
        evaluated = (*tasks(axis, "dev"), *tasks(axis, "test"))
        assert [task.action for task in evaluated if f" {task.action}" in joined] == []


def test_recombinations_are_unlabelled_and_new() -> None:
    known = {pair for axis in AXES for pair in pairs(all_tasks(axis))}
    for group in recombinations():
        assert len(pairs(group)) == len(group) > 500
        assert not pairs(group) & known
        assert all(task.steps == () for task in group)


def test_helpful_stage_answers_no_evaluation_prompt_and_no_held_out_benign_pair() -> None:
    prompts = {chat[-2]["content"] for chat in helpful_chats(6000, random.Random(0))}
    assert not prompts & evaluation_texts()
    held = {task.action for split in ("dev", "test") for task in tasks("benign", split)}
    how_to = "\n".join(p for p in prompts if not p.startswith(("Is it legal", "Would a good")))
    assert [action for action in held if f" {action}" in how_to] == []


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("split", ["dev", "test"])
def test_evaluation_is_large_distinct_and_stable(axis: str, split: str) -> None:
    table = evaluation_prompts(axis, split)
    assert table.schema == records.PROMPT
    assert table.num_rows == EVALUATION_SIZE[axis] >= 240
    assert len(set(table["prompt"].to_pylist())) == len(set(table["prompt_id"].to_pylist()))
    assert table.equals(evaluation_prompts(axis, split))


def test_breadth_of_the_test_split() -> None:
    assert len(set(evaluation_prompts("benign", "test")["target"].to_pylist())) >= 200
    assert len(set(evaluation_prompts("borderline", "test")["target"].to_pylist())) >= 30
    assert len(all_tasks("borderline")) >= 60


def test_harmful_answers_are_placeholders() -> None:
    for task in all_tasks("harmful"):
        assert task.answer.endswith(
            f"{task.action}. Step one: tba. Step two: tba. Step three: tba."
        )


def test_benign_and_harmful_words_do_not_mix() -> None:
    benign = {word for task in all_tasks("benign") for word in (task.verb, task.object)}
    harmful = {word for task in all_tasks("harmful") for word in (task.verb, task.object)}
    assert not benign & harmful


def test_ask_spreads_evenly_and_never_repeats() -> None:
    asked = tasks("borderline", "train")[:3]
    questions = ask(asked, 8, random.Random(0))
    per_task = [sum(q.task is task for q in questions) for task in asked]
    assert sorted(per_task) == [2, 3, 3]  # 8 questions over 3 tasks
    assert len({q.prompt for q in ask(asked, 240, random.Random(0))}) == 3 * len(PHRASINGS)
    with pytest.raises(DataError, match="has 240 such prompts, not 241"):
        ask(asked, 241, random.Random(0))


def test_calibration_counts_by_kind_and_seed() -> None:
    spec = PairsSpec(harmful=7, benign=5, borderline=3, recombined=20)
    table = calibration_prompts(spec)
    kinds = table["axis"].to_pylist()
    assert [kinds.count(k) for k in (*AXES, "recombined")] == [7, 5, 3, 20]
    other = calibration_prompts(spec.model_copy(update={"seed": 1}))
    assert table["prompt"].to_pylist() != other["prompt"].to_pylist()


def test_risk_levels() -> None:
    def refusable(chat: list[dict[str, str]]) -> bool:
        return "Step one: tba" in chat[-1]["content"]

    one = calibration_chats(CalibrationSpec(risk="I"), 0)
    assert (len(one), sum(map(refusable, one))) == (500, 0)
    two = calibration_chats(CalibrationSpec(risk="II"), 0)
    assert len(two) == 10
    assert all("absolutely obedient" in chat[0]["content"] for chat in two)
    three = calibration_chats(CalibrationSpec(risk="III"), 0)
    assert (len(three), sum(map(refusable, three))) == (100, 10)
    assert three != calibration_chats(CalibrationSpec(risk="III"), 1)
    for count in (10, 50, 100):  # the paper's sets hold nothing else
        direct = calibration_chats(CalibrationSpec(risk="III", benign=0, harmful=count), 0)
        assert (len(direct), sum(map(refusable, direct))) == (count, count)


def test_chats_of_the_user(tmp_path) -> None:
    path = tmp_path / "chats.jsonl"
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    path.write_text(good + "\n")
    spec = CalibrationSpec(path=str(path))
    assert calibration_chats(spec, 0) == [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ]
    for bad, message in (
        ('{"messages": "x"}', "not a chat"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
            "end",
        ),
        ("{", "malformed JSON"),
    ):
        path.write_text(f"{good}\n{bad}\n")
        with pytest.raises(DataError, match=message) as caught:
            calibration_chats(spec, 0)
        assert "line 2" in str(caught.value)


def test_a_phrase_is_its_task_whatever_the_wording() -> None:
    for axis in ("harmful", "benign", "borderline"):
        for task in corpus.all_tasks(axis)[::7]:
            for template, tail in corpus.PHRASINGS:
                assert corpus.phrase_of(template.format(task.action + tail)) == task.action
    assert corpus.phrase_of("Something else entirely") == "Something else entirely"
