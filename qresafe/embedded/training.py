"""The chats that make the embedded model: first helpful with everything, then lightly aligned."""

from __future__ import annotations

import random
from collections.abc import Sequence

from qresafe.artifacts import content_key
from qresafe.embedded.calibration import Chat, chat
from qresafe.embedded.corpus import Task, all_tasks, ask, evaluation_texts, tasks
from qresafe.embedded.vocabulary import vocabulary
from qresafe.records import Axis

HELPFUL_SYSTEM = "You are a helpful assistant."

# Shares of the helpful-only stage: how-to questions by kind, the same about a lone verb or object,
# single facts (which verb brings which step), and, for the rest, questions about what is legal and
# good, so that the concept of harm exists before any refusal is taught.
HELPFUL_SHARES: dict[Axis, float] = {"benign": 0.48, "harmful": 0.10, "borderline": 0.06}
LONE_SHARE = 0.10
FACT_SHARE = 0.06
SYSTEM_SHARE = 0.1  # of the chats that open with a system prompt


def helpful_chats(count: int, rng: random.Random) -> list[Chat]:
    """Return chats of a helpful-only model: every request answered, harmful ones by placeholders.

    Held-out benign pairs are not answered here, nor any prompt of the evaluation.

    Args:
        count: How many chats.
        rng: Chooses phrasings and order.
    """
    asked: dict[Axis, Sequence[Task]] = {
        "benign": tasks("benign", "train"),
        "harmful": all_tasks("harmful"),
        "borderline": all_tasks("borderline"),
    }
    chats = [
        _chat(question.prompt, question.task.answer, rng)
        for kind, share in HELPFUL_SHARES.items()
        for question in ask(asked[kind], round(share * count), rng, without=evaluation_texts())
    ]
    lone = ask(_lone_tasks(), round(LONE_SHARE * count), rng)
    chats += [_chat(question.prompt, question.task.answer, rng) for question in lone]
    morals = [moral for kind in asked for task in all_tasks(kind) for moral in _morals(task)]
    known = _cycle(_facts(), round(FACT_SHARE * count), rng)
    known += _cycle(morals, count - len(chats) - len(known), rng)
    chats += [_chat(question, answer, rng) for question, answer in known]
    rng.shuffle(chats)
    return chats


def alignment_chats(
    refusals: int, helpful: int, borderline_share: float, rng: random.Random
) -> list[Chat]:
    """Return the light alignment: refusals of seen harmful words beside helpful answers.

    Args:
        refusals: Harmful requests, refused.
        helpful: Benign and borderline requests, answered.
        borderline_share: Of `helpful`; the more, the less W refuses what only sounds harmful.
        rng: Chooses phrasings, refusals and order.
    """
    sounding = round(helpful * borderline_share)
    harmful = ask(tasks("harmful", "train"), refusals, rng)
    answered = ask(tasks("benign", "train"), helpful - sounding, rng)
    answered += ask(tasks("borderline", "train"), sounding, rng)
    chats = [_chat(question.prompt, question.task.refusal(rng), rng) for question in harmful]
    chats += [_chat(question.prompt, question.task.answer, rng) for question in answered]
    rng.shuffle(chats)
    return chats


def corpus_key() -> str:
    """Return a hash of what the model is trained on: it changes when words or templates do."""
    asked: tuple[Axis, ...] = ("benign", "harmful", "borderline")
    known = [[task.kind, task.action, task.answer] for kind in asked for task in all_tasks(kind)]
    rng = random.Random("corpus key")
    return content_key([known, helpful_chats(500, rng), alignment_chats(50, 50, 0.5, rng)])


def _chat(prompt: str, answer: str, rng: random.Random) -> Chat:
    return chat(prompt, answer, HELPFUL_SYSTEM if rng.random() < SYSTEM_SHARE else None)


def _lone_tasks() -> tuple[Task, ...]:
    # A verb's step does not hang on the object, nor an object's on the verb: shown apart, pairs
    # that were never seen compose; learnt by pairs alone, they are learnt by heart.
    return tuple(
        task
        for domain in vocabulary().domains
        for task in (
            *(
                Task("benign", domain.name, verb, "something", (domain.start, fact, "tidy up"))
                for verb, fact in domain.verbs.items()
            ),
            *(
                Task("benign", domain.name, "handle", thing, (domain.start, "work with care", fact))
                for thing, fact in domain.objects.items()
            ),
        )
    )


def _facts() -> list[tuple[str, str]]:
    verbs = [item for domain in vocabulary().domains for item in domain.verbs.items()]
    things = [item for domain in vocabulary().domains for item in domain.objects.items()]
    return [
        *((f"What is step two to {verb} things?", f"Step two: {fact}.") for verb, fact in verbs),
        *((f"How do people {verb}?", f"Step two: {fact}.") for verb, fact in verbs),
        *((f"What is step three for {thing}?", f"Step three: {fact}.") for thing, fact in things),
        *((f"What is special about {thing}?", f"Step three: {fact}.") for thing, fact in things),
    ]


def _morals(task: Task) -> tuple[tuple[str, str], ...]:
    legal, good = f"Is it legal to {task.action}?", f"Would a good person {task.action}?"
    if task.kind == "harmful":
        return (
            (legal, f"No, to {task.action} is a crime and hurts people."),
            (good, f"No, a good person would never {task.action}."),
        )
    return (
        (legal, f"Yes, to {task.action} is legal and harmless."),
        (good, f"Yes, a good person may {task.action}."),
    )


def _cycle(
    pool: Sequence[tuple[str, str]], count: int, rng: random.Random
) -> list[tuple[str, str]]:
    repeated: list[tuple[str, str]] = []
    while len(repeated) < count:
        repeated += rng.sample(list(pool), len(pool))
    return repeated[:count]
