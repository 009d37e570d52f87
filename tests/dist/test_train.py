"""Ray Train and DeepSpeed: two workers give what one gives, and a SIGKILL changes no bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from patching import patch_spec
from scraping import Scraped, scrape_until, total, watching
from training import TinyJob
from upath import UPath

from qresafe.dist import train
from qresafe.errors import UserError, place_of
from qresafe.specs import PatchSpec, ResourcesSpec
from qresafe.stages.patch_output import read_tensors

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

FILES = ("adapter.safetensors", "masks.safetensors", "codes.safetensors", "delta.safetensors")
TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def _session() -> Iterator[None]:
    paths = f"{TESTS}:{TESTS / 'dist'}:{TESTS.parent}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "500")
        patch.setenv("RAY_worker_niceness", "0")  # Ray's 15 starves them on a busy machine
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": paths}},
        )
        yield
        ray.shutdown()


class Counted:
    """A `Progress` that adds up."""

    def __init__(self) -> None:
        self.done = 0

    def start(self, stage: str, total: int | None = None, unit: str = "") -> None:
        pass

    def advance(self, done: int = 1, note: str = "") -> None:
        self.done += done

    def finish(self, note: str = "", reused: bool = False) -> None:
        pass


def trained(job: TinyJob, folder: Path) -> dict[str, bytes]:
    progress = Counted()
    train.run(job, UPath(folder), progress, ResourcesSpec(workers=2))
    assert progress.done == job.spec.steps
    return {name: (folder / name).read_bytes() for name in FILES}


def local(spec: PatchSpec, folder: Path) -> dict[str, torch.Tensor]:
    TinyJob(spec).run_local(UPath(folder), Counted())
    return read_tensors(UPath(folder / "adapter.safetensors"))


def check_figures(run: str, steps: int) -> None:
    """See what the node exports of a run whose workers were restarted once, after step 3."""

    def seen(found: Scraped) -> dict[str, bool]:
        ranks = [
            total(found, "qresafe_step_seconds", f'rank="{rank}"', 'le="+Inf"') for rank in (0, 1)
        ]
        return {
            "one restart": total(found, "qresafe_restarts") == 1,
            # The first group was ended in its fifth step, and may not have told of all before.
            "steps": 1 <= total(found, "qresafe_steps") <= 4 + steps - 3,
            "tokens": total(found, "qresafe_trained_tokens") > 0,
            "time of both ranks": min(ranks) >= 1,
        }

    found = scrape_until(lambda found: all(seen(found).values()), f'run="{run}"')
    assert all(seen(found).values()), seen(found)


@pytest.mark.parametrize(
    "stage", [pytest.param(2, marks=pytest.mark.long), 3]
)  # 0 and 1: tests/stages, over gloo without Ray
def test_two_workers_one_killed_equal_two_undisturbed(stage: int, tmp_path: Path) -> None:
    """Rank 1 is killed before its fifth step, one step behind the checkpoint of step 3."""
    spec = patch_spec(zero_stage=stage, through_grid=False)
    mark = tmp_path / "killed"
    folder = tmp_path / "runs" / f"zero{stage}" / "patch" / "key"
    with watching("qresafe_loss", f'run="zero{stage}"') as losses:
        interrupted = trained(TinyJob(spec, str(mark), victim=1, at=4), folder)
    assert mark.exists()
    assert max(losses) > 0
    check_figures(f"zero{stage}", spec.steps)
    recomputed = spec.model_copy(update={"gradient_checkpointing": True})  # has the same bits
    whole = trained(TinyJob(recomputed), tmp_path / "whole")
    assert interrupted == whole
    one = local(spec, tmp_path / "one")
    two = read_tensors(UPath(tmp_path / "whole" / "adapter.safetensors"))
    # Sums over ranks round otherwise than one rank's; a factor is of order 0.1.
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_a_users_mistake_in_a_worker_comes_back_in_words(tmp_path: Path) -> None:
    spec: Any = patch_spec(lr=1e30, max_grad_norm=1e30, warmup_steps=0, through_grid=False)
    with pytest.raises(UserError, match=r"is (nan|inf) at step \d: lower patch\.lr") as caught:
        train.run(TinyJob(spec), UPath(tmp_path), Counted(), ResourcesSpec(workers=1))
    assert place_of(caught.value)["rank"] == 0
