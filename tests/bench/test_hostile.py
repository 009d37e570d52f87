"""A slice of the hostile-input bench, by another seed than the published one; and its judgement."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bench import hostile
from bench.hostile import Kind, kinds, measure
from qresafe.errors import DataError

CASES = 40  # of each kind; a chat template starts a process each
FEW = {"Chat template": 4}


@pytest.fixture(scope="module")
def all_kinds(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Kind]:
    return kinds(tmp_path_factory.mktemp("hostile"), tiny_llama)


def test_the_whole_bench_is_large_enough(all_kinds: list[Kind]) -> None:
    assert sum(kind.cases for kind in all_kinds) >= 10_000
    assert len({kind.name for kind in all_kinds}) == len(all_kinds)


def test_every_case_ends_in_a_result_or_a_sentence(all_kinds: list[Kind]) -> None:
    for kind in all_kinds:
        cases = FEW.get(kind.name, CASES)
        outcome = measure(kind, cases, seed=7)
        assert list(outcome.defects) == [], kind.name
        assert outcome.accepted + outcome.refused == cases


def test_cases_are_the_same_every_time(all_kinds: list[Kind]) -> None:
    for kind in all_kinds:
        if kind.name != "Patch file":  # the patch's own bytes differ by model folder alone
            assert kind.make(random.Random("5")) == kind.make(random.Random("5"))


def ends(how: str) -> Kind:
    """Return a kind whose cases all end in a certain way."""

    def feed(data: bytes) -> None:
        if how == "refused":
            raise DataError("no such thing", where="here")
        if how == "bug":
            raise KeyError("x")
        if how == "hang":
            while True:
                pass
        if how == "memory":
            bytearray(4 * hostile.ROOM)

    return Kind(how, "feed", 3, lambda chance: chance.randbytes(4), feed)


@pytest.mark.parametrize(
    ("how", "counts", "defect"),
    [
        ("accepted", (3, 0), ""),
        ("refused", (0, 3), ""),
        ("bug", (0, 0), "KeyError at "),
        ("hang", (0, 0), "takes more than"),
        ("memory", (0, 0), "MemoryError at "),
    ],
)
def test_the_bench_tells_a_result_a_refusal_and_a_defect_apart(
    monkeypatch: pytest.MonkeyPatch, how: str, counts: tuple[int, int], defect: str
) -> None:
    monkeypatch.setattr(hostile, "SECONDS", 0.2)
    monkeypatch.setattr(hostile, "ROOM", 1 << 28)
    outcome = measure(ends(how), 3)
    assert (outcome.accepted, outcome.refused) == counts
    assert [found.startswith(defect) for found in outcome.defects] == [True] * bool(defect)
    assert outcome.row().figures == (3, *counts, 3 - sum(counts))
