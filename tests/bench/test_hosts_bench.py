"""The page of `bench.hosts`: what it calls equal is equal, and what differs is shouted."""

from __future__ import annotations

from dataclasses import replace

from bench.hosts import LOAD, Made, page

FILES = {"generate/k/completions.parquet": b"a", "pairs/k/pairs.parquet": b"b"}
ALONE = Made(0, 0, 0.0, 20.0, {"patch": 5.0}, 1.0, FILES | {"patch/k/codes.safetensors": b"1"})
ONE = replace(ALONE, hosts=1, workers=2, start=9.0, whole=32.0)
TWO = replace(ONE, hosts=2, files=FILES | {"patch/k/codes.safetensors": b"2"})


def test_equal_files_and_extra_time() -> None:
    told = page([ALONE, ONE, replace(ONE, hosts=2)], LOAD)
    assert "Answers and pairs of all rows equal to the byte: yes." in told
    assert "+12.0 s with 1 host with 2 workers, +12.0 s with 2 hosts." in told  # 32 - 20
    assert "of 2 hosts equal to that of 1 host with 2 workers, to the byte: yes" in told
    assert "| 1 host with 2 workers | 9.0 | 5.0 | 32.0 | 1.0 |" in told


def test_a_difference_is_told() -> None:
    assert "equal to that of 1 host with 2 workers, to the byte: **no**" in page(
        [ALONE, ONE, TWO], LOAD
    )
    other = replace(TWO, files=TWO.files | {"pairs/k/pairs.parquet": b"c"})
    assert "Answers and pairs of all rows equal to the byte: **no**" in page(
        [ALONE, ONE, other], LOAD
    )


def test_nothing_made_is_not_equal() -> None:
    assert not replace(ALONE, files={}).equals(replace(ONE, files={}), "patch")
