"""What commands print of a comparison: which interval stands below a share, and that it is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qresafe.cli import main
from qresafe.commands.running import share_cell
from qresafe.stages.comparison import Share

WILSON = Share(yes=10, n=40, share=0.25, low=0.142, high=0.402)
NO, YES = "I'm sorry, but I can't help with that.", "Step one: take it. Step two: use it well."


def test_the_interval_that_knows_of_clusters_is_shown() -> None:
    clustered = WILSON.model_copy(update={"clusters": 4, "cluster_low": 0.05, "cluster_high": 0.7})
    assert share_cell(WILSON) == "25.0\n14.2-40.2"
    assert share_cell(clustered) == "25.0\n5.0-70.0"
    assert share_cell(None) == "-"


@pytest.mark.parametrize(
    ("samples", "told"),
    [(1, "its 95 % Wilson interval."), (4, "its 95 % cluster interval, by whole prompts;")],
)
def test_the_caption_says_which_interval_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], samples: int, told: str
) -> None:
    rows = [
        {"prompt": f"p {i}", "sample": s, "completion": YES if i else NO}
        for i in range(3)
        for s in range(samples)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as leaving:
        main(["compare", *[str(tmp_path / "a.jsonl")] * 2, "--storage", str(tmp_path)])
    out, err = capsys.readouterr()
    assert leaving.value.code == 0, err
    assert f"Below each share: {told}" in out
