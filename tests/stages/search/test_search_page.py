"""The page and the files of a search, from made-up rows: complete, self-contained, escaped."""

from __future__ import annotations

import random
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pyarrow.parquet as pq
import pytest
import yaml
from searching import SPACE, made_up, make_search
from test_search_queue import simulate

from qresafe.presets import load_experiment
from qresafe.search_spec import Search
from qresafe.stages.search import plots
from qresafe.stages.search.confirm import Confirmed, write_confirmation
from qresafe.stages.search.folder import CONFIRMATION, search_folder, write_results
from qresafe.stages.search.ledger import Row
from qresafe.stages.search.report import write_report

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


class Elements(HTMLParser):
    """Collects tags with their attributes, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def confirmed(winner: dict[str, float]) -> list[Confirmed]:
    models = {"default": made_up({}), "winner": winner, "W": made_up({}), "Q0": made_up({})}
    return [
        Confirmed(model=model, seed=seed, split=split, metrics=metrics)
        for seed in (0, 1, 2)
        for split in ("validation", "test")
        for model, metrics in models.items()
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Search, list[Row]]:
    folder = tmp_path_factory.mktemp("page")
    search = make_search(
        folder,
        space=SPACE | {"patch.mask.score": {"choice": ["snip", "random"]}},
        scheduler={"name": "asha", "grace": 20, "factor": 2},
        budget={"trials": 20},
    )
    rows = simulate(search, Path(str(search_folder(search))), random.Random(0)).ordered()
    rows[5] = Row(index=5, params=rows[5].params, status="failed", kind="x", reason=HOSTILE)
    best = write_results(search, rows)
    assert best is not None
    write_confirmation(search_folder(search) / CONFIRMATION, confirmed(made_up(best.params)))
    write_report(search, rows)
    return search, rows


@pytest.fixture(scope="module")
def page(finished: tuple[Search, list[Row]]) -> str:
    return (search_folder(finished[0]) / "report.html").read_text()


def test_the_page_loads_nothing_and_hostile_text_stays_text(page: str) -> None:
    for tag, attributes in Elements(page).tags:
        assert tag not in {"script", "link", "iframe", "img", "object", "embed"}
        for name, value in attributes.items():
            assert name not in {"src", "srcset", "action"}
            assert not name.startswith("on")
            assert name not in {"href", "xlink:href"} or str(value).startswith("#")
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "default-src 'none'" in page
    assert "&lt;script&gt;alert(1)" in page


def test_the_page_tells_what_was_found(finished: tuple[Search, list[Row]], page: str) -> None:
    text = " ".join(Elements(page).text.split())
    for heading in ("The winner, confirmed", "What was tried", "What mattered", "On the way",
                    "All trials", "Provenance"):  # fmt: skip
        assert heading in text
    assert "20 trials:" in text
    assert "1 failed" in text
    assert "lead over the default" in text
    assert finished[0].key in text
    for row in finished[1]:
        if row.status == "stopped":
            assert str(row.reason) in text


def test_the_headline_claims_no_more_than_the_test_split_shows(
    finished: tuple[Search, list[Row]], tmp_path: Path
) -> None:
    search, rows = finished
    from qresafe.stages.search.report import tell
    from qresafe.stages.search.selection import winner

    best = winner(rows, search.spec)
    assert best is not None
    assert "better than the default spec on the untouched test" in tell(search, rows)["headline"]
    path = search_folder(search) / CONFIRMATION
    kept = path.read_text()
    worse = {name: value + 0.5 for name, value in made_up({}).items()}
    write_confirmation(path, confirmed(worse))
    assert tell(search, rows)["headline"].startswith("None was found")
    path.unlink()
    assert "was not confirmed" in tell(search, rows)["headline"]
    path.write_text(kept)
    alone = [row for row in rows if row.index == 0]
    assert "No trial is better than the default" in tell(search, alone)["headline"]


def test_files_of_a_search(finished: tuple[Search, list[Row]]) -> None:
    search, rows = finished
    folder = search_folder(search)
    table = pq.read_table(str(folder / "trials.parquet"))
    assert table["trial"].to_pylist() == list(range(20))
    assert table["patch.mask.tau"].to_pylist()[0] == 0.3  # trial 0 has the experiment's own
    done = [row for row in rows if row.status == "completed"]
    assert [v for v in table["over_refusal"].to_pylist() if v is not None] == [
        row.metrics["over_refusal"] for row in done
    ]
    for path in (folder / "front").iterdir():
        index = int(path.stem.split("-")[1])
        assert load_experiment(str(path)) == search.best(rows[index].params)
    assert yaml.safe_load((folder / "best.yaml").read_text())["patch"]["mask"]


PLOTS = {
    "scatter": lambda: plots.scatter_plot(
        "s <&>", [plots.Point(1, 2, "a<b", "front"), plots.Point(2, 1, "0", "")], "x", "y"
    ),
    "parallel": lambda: plots.parallel_plot(
        "p", [plots.Axis("tau", "0", "1"), plots.Axis("lr", "1", "2")],
        [plots.Polyline([0.1, None], ""), plots.Polyline([0.2, 1.0], "winner")],
    ),
    "importance": lambda: plots.importance_plot("i", {"tau": 0.7, "lr": 0.3}),
    "curves": lambda: plots.curve_plot("c", [([1, 2], [0.5, 0.2], "stopped"), ([1], [1], "")]),
}  # fmt: skip


@pytest.mark.parametrize("name", PLOTS)
def test_plots_take_their_colours_from_the_page(name: str) -> None:
    text = PLOTS[name]()
    ElementTree.fromstring(text.replace("xlink:href", "href"))
    assert not re.search(r"#[0-9a-fA-F]{6}\b(?![^<]*url)", text.replace("url(#", ""))
    assert "var(--" in text
    assert text == PLOTS[name]()


def test_importance_names_the_key_that_matters(tmp_path: Path) -> None:
    from qresafe.stages.search.optuna_proposer import importance

    search = make_search(tmp_path, budget={"trials": 60})
    rows = simulate(search, tmp_path / "a", random.Random(0)).ordered()
    attack = importance(search, rows, 0)  # made of lr alone
    over = importance(search, rows, 1)  # made of tau alone
    assert max(attack, key=lambda key: attack[key]) == "patch.lr"
    assert max(over, key=lambda key: over[key]) == "patch.mask.tau"
    assert sum(attack.values()) == pytest.approx(1)
    assert importance(search, rows[:3], 0) == {}
