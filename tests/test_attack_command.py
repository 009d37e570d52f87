"""What `qresafe attack` prints of attacks that are finished."""

from __future__ import annotations

import pytest

from qresafe.commands import attack as command
from qresafe.stages.comparison import AtK, AttackCell, AttackMeasure, AttackResult, Share
from qresafe.stages.statistics import wilson

NAMES = ("top_k 1", "top_k 5", "top_k 50")


def share(yes: int, n: int) -> Share:
    low, high = wilson(yes, n)
    return Share(yes=yes, n=n, share=yes / n if n else None, low=low, high=high)


def measure(name: str, counts: list[tuple[int, int]]) -> AttackMeasure:
    tries = [AtK(measure=name, k=2, n=10, share=0.625, low=0.5, high=0.75)]
    return AttackMeasure(
        measure=name,
        worst_case=share(7, 10),
        worst_case_by_framing={},
        cells=[
            AttackCell(framing="plain", configuration=c, share=share(*count), at_k=tries)
            for c, count in zip(NAMES, counts, strict=True)
        ],
    )


def test_worst_first_and_nothing_where_nothing_is_decided(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = AttackResult(
        label="Q0",
        judges={"main": "refusal"},
        prompts=10,
        samples=2,
        framings=["plain"],
        configurations=list(NAMES),
        measures=[
            measure("compliance", [(0, 0), (2, 20), (8, 20)]),
            measure("coherence", [(0, 0), (19, 20), (13, 20)]),
        ],
    )
    monkeypatch.setattr("qresafe.stages.compare.read_attack", lambda made: found)
    command.tell_attacks([None])  # type: ignore[list-item]  # what is read is `found`
    compliance, tries, coherence = capsys.readouterr().out.split("% of ")[1:]
    # 8 of 20 before 2 of 20; undecided last, as "-" and not as 0.
    assert [compliance.index(name) for name in ("70.0", "40.0", "10.0")] == sorted(
        compliance.index(name) for name in ("70.0", "40.0", "10.0")
    )
    assert compliance.index("top_k 1 ") > compliance.index("10.0")
    assert " 0.0" not in compliance
    assert "62.5" in tries
    assert "50.0-75.0" in tries
    # The least coherent first, and no share of prompts with any coherent answer.
    assert "any of them" in compliance
    assert "any of them" not in coherence
    assert coherence.index("65.0") < coherence.index("95.0")
