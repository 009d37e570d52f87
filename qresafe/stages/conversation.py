"""Prompts of several turns: a follow-up is asked after the model's own answer to the one before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qresafe.hf.chat import Message
from qresafe.stages.runtime import Row

# Answers requests that hold `messages`; the number is the turn's, for the key of its noise.
Ask = Callable[[list[Row], int], list[Row]]


def converse(requests: Sequence[Row], answers: Sequence[Row], system: str | None, ask: Ask) -> None:
    """Have every request's follow-ups answered, turn by turn over all requests.

    Args:
        requests: Rows with `prompt` and `follow_ups`; rows of one turn lack the latter.
        answers: Their answers to the first turn, rows of `engines.ANSWER`; each that has
            follow-ups gains `follow_up_answers`, or an error if a turn fails.
        system: The system message, if any.
        ask: What answers.
    """
    pairs = [(r, a) for r, a in zip(requests, answers, strict=True) if r.get("follow_ups")]
    for _, answer in pairs:
        answer["follow_up_answers"] = []
    for turn in range(max((len(request["follow_ups"]) for request, _ in pairs), default=0)):
        going = [(r, a) for r, a in pairs if len(r["follow_ups"]) > turn and not a["error"]]
        if not going:
            return
        asked = [request | {"messages": messages(request, a, system)} for request, a in going]
        for (_, answer), said in zip(going, ask(asked, turn + 1), strict=True):
            _note(answer, said, turn + 1)


def messages(request: Row, answer: Row, system: str | None) -> list[Message]:
    """Return the chat up to the next follow-up: all that was said, and what the user says now."""
    said = [answer["completion"], *answer["follow_up_answers"]]
    asked = [request["prompt"], *request["follow_ups"][: len(said)]]
    chat = [{"role": "system", "content": system}] if system else []
    for question, reply in zip(asked, said, strict=False):
        chat += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return [*chat, {"role": "user", "content": asked[-1]}]


def _note(answer: Row, said: Row, turn: int) -> None:
    if said["error"]:
        answer |= {"finish": "error", "error": f"{said['error']} (turn {turn + 1})"}
        return
    answer["follow_up_answers"].append(said["completion"])
    answer["new_tokens"] += said["new_tokens"]
