"""Clusters, plans and what would fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ray_jobs
from qresafe.dist import capacity
from qresafe.embedded.corpus import evaluation_prompts
from qresafe.errors import ResourceError, SpecError
from qresafe.planning.bases import bases
from qresafe.planning.fitting import require_fit, what_would_fit
from qresafe.planning.hardware import GIB, hardware, nearest_kind, parse_cluster
from qresafe.planning.plan import Plan, StagePlan, make_plan
from qresafe.planning.rows import need
from qresafe.planning.shapes import shape_of
from qresafe.planning.workload import workload
from qresafe.presets import load_experiment, preset_names
from qresafe.specs import ExperimentSpec, ResourcesSpec

PRESET = "llama2-7b-chat-int4-4xa100"
WIDER = ("patch.micro_batch_size=2", "patch.zero_stage=2")  # settings for GPUs of 80 GB
GPU_PRESETS = [n for n in preset_names() if load_experiment(n).resources.gpus_per_worker]


def planned(cluster: str, *overrides: str) -> tuple[ExperimentSpec, Plan]:
    spec = load_experiment(PRESET, overrides)
    return spec, make_plan(spec, shape_of(spec.model), parse_cluster(cluster))


def test_a_cluster_is_nodes_times_gpus_of_a_kind() -> None:
    one, many = parse_cluster("4xA100-40"), parse_cluster("2x8xh100-80")
    assert (one.count, many.count) == (4, 16)
    assert one.memory == (39.4 - 1.5) * GIB
    assert many.price == hardware().gpus["H100-80"].price_per_hour


@pytest.mark.parametrize("text", ["A100-40", "0xA100-40", "4x", "0x8xH100-80", "4 x A100-40", ""])
def test_a_cluster_that_is_written_otherwise_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="4xA100-40"):
        parse_cluster(text)


def test_an_unknown_gpu_names_its_neighbours() -> None:
    with pytest.raises(SpecError, match="A100-80"):
        parse_cluster("4xA100-81")


def test_names_of_devices() -> None:
    assert nearest_kind("NVIDIA A100-SXM4-40GB", 39.4 * GIB) == "A100-40"
    assert nearest_kind("NVIDIA H100 80GB HBM3", 79.1 * GIB) == "H100-80"
    assert nearest_kind("NVIDIA GeForce RTX 4090", 23.6 * GIB) == "RTX4090-24"
    assert nearest_kind("NVIDIA Mystery", 10 * GIB) is None


@pytest.mark.parametrize("name", GPU_PRESETS)
def test_a_gpu_preset_fits_what_its_file_names(name: str) -> None:
    text = (Path(ray_jobs.__path__[0]) / "presets" / f"{name}.yaml").read_text()
    named = set(re.findall(r"\b(?:\d+x)+[A-Z]\w*-\d+\b", text))
    assert len(named) == 1, named
    spec, cluster = load_experiment(name), parse_cluster(named.pop())
    assert cluster.count == spec.resources.workers * spec.resources.gpus_per_worker
    assert make_plan(spec, shape_of(spec.model), cluster).misfits == ()


def test_settings_for_larger_gpus_do_not_fit_the_smaller_ones() -> None:
    _, large = planned("4xA100-80", *WIDER)
    assert large.misfits == ()
    spec, small = planned("4xA10G-24", *WIDER)
    assert [stage.name for stage in small.misfits] == ["patch"]
    with pytest.raises(ResourceError, match=r"patch needs .* would fit: --set") as refused:
        require_fit(spec, small)
    settings = re.findall(r"--set (\S+)", str(refused.value))
    _, mended = planned("4xA10G-24", *WIDER, *(text.rstrip(",.") for text in settings))
    assert mended.misfits == ()  # the advice is true


def test_advice_names_a_cluster_where_settings_do_not_do() -> None:
    spec, plan = planned("1xL4-24")
    advice = what_would_fit(spec, plan.shape, plan.cluster)
    found = re.search(r"GPUs such as (\S+?)[,. ]*$", advice)
    assert found is not None, advice
    assert planned(found[1])[1].misfits == ()


def test_activations_that_are_computed_again_make_a_7b_fit_one_24_gb_gpu() -> None:
    spec, plan = planned("1xRTX4090-24")
    assert [stage.name for stage in plan.misfits] == ["patch"]
    setting = "patch.gradient_checkpointing=True"
    assert f"--set {setting}" in what_would_fit(spec, plan.shape, plan.cluster)
    again = planned("1xRTX4090-24", setting)[1]
    assert again.misfits == ()
    before, after = (next(s for s in p.stages if s.name == "patch") for p in (plan, again))
    assert after.seconds > before.seconds  # a forward pass more


def test_packed_codes_make_the_patch_of_a_70b_fit_80_gb() -> None:
    settings = ["patch.gradient_checkpointing=true", "patch.micro_batch_size=1"]
    settings.append("patch.zero_stage=2")  # all of them on every GPU
    _, plan = planned("8xH100-80", "model.path=meta-llama/Llama-2-70b-chat-hf", *settings)
    patch = next(stage for stage in plan.stages if stage.name == "patch")
    assert patch.fits
    weights = plan.shape.quantized
    scales = (2 + 1) * weights / 128
    assert patch.parts["codes and scales"] == pytest.approx(weights / 2 + scales)  # 4 bits each
    decoded = 2 * weights
    assert not patch.available > patch.bytes + decoded  # and would not if they were decoded


def test_codes_lie_whole_on_every_gpu_or_sharded() -> None:
    settings = ("model.path=meta-llama/Llama-2-70b-chat-hf", "patch.gradient_checkpointing=true")
    spec, plan = planned("8xA100-40", *settings, "patch.micro_batch_size=1")
    both = bases(spec, plan)
    assert both is not None
    assert both.chosen  # as the preset says
    # A share of one in eight, and one block's codes while they are gathered: 79 of 80 blocks saved.
    codes = plan.shape.quantized / 2
    assert both.replicated - both.sharded > codes * (1 - 1 / 8 - 1 / 80)
    assert both.sharded < both.available < both.replicated
    assert "(4 bits) in the patch: sharded over the GPUs, " in both.text
    assert "; whole on every GPU (--set patch.zero_stage=2), " in both.text
    assert bases(*planned("1xA100-80", *settings)) is None


def patch_of(plan: Plan) -> StagePlan:
    return next(stage for stage in plan.stages if stage.name == "patch")


def test_off_load_takes_its_parts_off_the_device() -> None:
    again = ("patch.gradient_checkpointing=true", "patch.zero_stage=3")
    kept, optimizer, parameters = (
        patch_of(planned("4xA100-80", *again, f"patch.offload={where}")[1])
        for where in ("none", "optimizer", "parameters")
    )
    shape = planned("4xA100-80")[1].shape
    factors = shape.factors(128)
    # Of 4 GPUs each holds a quarter: 8 bytes a factor of moments; a flat copy of 4.
    assert kept.parts["optimizer"] == pytest.approx(8 * factors / 4)
    assert "optimizer" not in optimizer.parts
    less = kept.parts["LoRA factors"] - optimizer.parts["LoRA factors"]
    assert less == pytest.approx(4 * factors / 4)
    assert optimizer.parts["weights"] == kept.parts["weights"]
    # What stays is the block that is gathered: one of 32, of 4 bits a weight.
    assert parameters.parts["weights"] == pytest.approx(shape.quantized / 2 / 32)
    assert "LoRA factors" not in parameters.parts
    assert parameters.bytes < optimizer.bytes < kept.bytes


def test_off_load_is_proposed_where_checkpointing_is_not_enough() -> None:
    wide = "patch.rank=1024"
    spec, plan = planned("1xRTX4090-24", wide)
    settings = re.findall(
        r"--set (\S+?)[,.]*(?= |$)", what_would_fit(spec, plan.shape, plan.cluster)
    )
    assert settings == ["patch.gradient_checkpointing=True", "patch.offload=optimizer"]
    assert planned("1xRTX4090-24", wide, *settings)[1].misfits == ()
    assert planned("1xRTX4090-24", wide, settings[0])[1].misfits


def test_a_70b_is_refused_where_nothing_helps() -> None:
    spec, plan = planned(
        "8xA100-40", "model.path=meta-llama/Llama-2-70b-chat-hf", "quantize.method=llm_qat"
    )
    assert plan.misfits
    with pytest.raises(ResourceError, match="no change that we know"):
        require_fit(spec, plan)


def test_a_model_that_answers_is_spread_over_the_gpus_of_a_worker() -> None:
    """13 B weights on GPUs of 24 GB: the patch is sharded over them, answering is not by itself."""
    small = ("patch.zero_stage=3", "patch.micro_batch_size=1", "patch.gradient_checkpointing=true")
    thirteen = ("model.path=meta-llama/Llama-2-13b-chat-hf", "patch.rank=16", *small)
    spec, alone = planned("8xRTX4090-24", *thirteen)
    assert "generate W, calibration" in {stage.name for stage in alone.misfits}
    advice = what_would_fit(spec, alone.shape, alone.cluster)
    assert advice.startswith("would fit: --set resources.gpus_per_worker=2"), advice
    settings = re.findall(r"--set (\S+?)[,.]*(?= |$)", advice)
    assert planned("8xRTX4090-24", *thirteen, *settings)[1].misfits == ()
    _, two = planned("8xRTX4090-24", *thirteen, "resources.gpus_per_worker=2")
    one, half = (p.stages[1].parts["weights"] for p in (alone, two))
    assert half == pytest.approx(one * (1 / 2 + 1.25 / 40))  # 40 blocks
    assert two.stages[1].seconds > alone.stages[1].seconds  # one of two GPUs waits
    patches = [next(s for s in p.stages if s.name == "patch") for p in (alone, two)]
    assert patches[0].parts == patches[1].parts  # on all eight GPUs either way


def test_w_and_q0_answer_at_the_same_time_on_pools() -> None:
    _, alone = planned("4xA100-80")
    _, pools = planned("4xA100-80", "resources.teacher_workers=1")
    w, q0 = (s for s in pools.stages if s.name.endswith(", calibration"))
    assert (w.devices, q0.devices) == (1, 3)
    assert (w.beside, q0.beside) == (False, True)
    others = sum(s.seconds for s in alone.stages if not s.name.endswith(", calibration"))
    assert pools.seconds == pytest.approx(others + max(w.seconds, q0.seconds))
    _, one = planned("1xA100-80", "resources.teacher_workers=1")
    assert not any(stage.beside for stage in one.stages)  # there is nobody to share with


def test_scoring_w_for_critical16_is_planned_too() -> None:
    _, plan = planned("4xA100-40", "quantize={method: critical16}")
    scored = plan.stages[0]
    assert scored.name == "score W (critical16)"
    assert scored.parts["weights"] == 2 * plan.shape.parameters
    assert not scored.measured


def test_gpus_of_a_worker_are_trained_on_one_by_one() -> None:
    given = ResourcesSpec(workers=2, gpus_per_worker=4, cpus_per_worker=8)
    assert given.training == ResourcesSpec(workers=8, gpus_per_worker=1, cpus_per_worker=2)
    for same in (ResourcesSpec(workers=3), ResourcesSpec(workers=2, gpus_per_worker=0.5)):
        assert same.training == same
    with pytest.raises(ValueError, match="whole number"):
        ResourcesSpec(gpus_per_worker=1.5)


def test_time_and_cost_are_arithmetic() -> None:
    spec, plan = planned("4xA100-80")
    patch = next(stage for stage in plan.stages if stage.name == "patch")
    # 300 preferences in 10 steps of 32 rows, two answers each of 128 + 256 tokens; 6 operations
    # per weight and token, and the product of the factors (rank 128) in 8 micro-batches per GPU;
    # SNIP reads 256 rows once.
    weights, quantized = plan.shape.parameters, plan.shape.quantized
    trained = 10 * 32 * 2 * 384 * 6 * weights + 10 * 4 * 8 * 6 * 128 * quantized
    scored = 256 * 384 * 6 * weights
    seconds = (trained + scored) / (4 * 312e12 * 0.35) + 2 * weights / 1e9
    assert patch.seconds == pytest.approx(seconds)
    assert patch.device_hours == pytest.approx(4 * seconds / 3600)
    whole = sum(stage.seconds for stage in plan.stages)
    assert plan.cost == pytest.approx(4 * 5.1 * whole / 3600)
    assert spec.patch.batch_size == 32


def test_more_gpus_take_less_time_and_no_more_memory() -> None:
    _, four = planned("4xA100-80")
    _, eight = planned("8xA100-80")
    assert eight.seconds < four.seconds
    assert eight.peak.bytes <= four.peak.bytes


def test_trl_trains_on_one_gpu() -> None:
    """So its patch takes the memory of one of four, and the hours of one."""
    four, one = (
        next(stage for stage in planned(cluster, "patch.method=sft")[1].stages
             if stage.name == "patch")
        for cluster in ("4xA100-80", "1xA100-80")
    )  # fmt: skip
    assert four.devices == one.devices == 1
    assert (four.bytes, four.seconds) == (one.bytes, one.seconds)


def test_all_weights_are_trained_in_float32() -> None:
    """4 bytes of the weight, 4 of its gradient and 8 of AdamW's moments, 7 B times: over 80 GB."""
    spec, plan = planned("1xH200-141", "patch.method=sft", "patch.updates=full")
    (stage,) = (stage for stage in plan.stages if stage.name == "patch")
    assert stage.bytes > 16 * shape_of(spec.model).quantized


def test_a_set_difference_scores_twice() -> None:
    """Every other setting alike, it costs SNIP's passes once more, on benign answers."""
    seconds = {
        score: next(
            stage.seconds
            for stage in planned("4xA100-80", f"patch.mask.score={score}")[1].stages
            if stage.name == "patch"
        )
        for score in ("random", "snip", "set_difference")
    }
    once = seconds["snip"] - seconds["random"]
    assert seconds["set_difference"] - seconds["random"] == pytest.approx(2 * once)


def test_rows_that_are_not_patched_need_less() -> None:
    spec = load_experiment(PRESET)
    whole = need(spec, parse_cluster("4xA100-80"))
    part = need(spec, parse_cluster("4xA100-80"), patched=False)
    assert whole.stage == "patch"
    assert part.device_hours < whole.device_hours
    assert part.gib < whole.gib
    assert whole.fits
    assert not need(spec, parse_cluster("4xA10G-24")).fits


def test_rows_of_the_demo_are_those_that_it_has() -> None:
    spec = ExperimentSpec()
    rows = workload(spec)
    held = [evaluation_prompts(prompts.axis, "test") for prompts in spec.evaluate.prompts]
    assert rows.evaluation == sum(table.num_rows for table in held)
    assert rows.harmful == held[0].num_rows
    assert rows.arms == 5


def test_a_model_of_unknown_shape_is_not_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(capacity, "machine_memory", lambda: 0.6 * GIB)
    (tmp_path / "config.json").write_text('{"model_type": "rwkv", "attention_hidden_size": 64}')
    capacity.require_room(load_experiment("demo"), str(tmp_path), connected=False)


def test_a_run_that_cannot_fit_is_refused_before_it_starts(monkeypatch) -> None:
    from qresafe.embedded.build import embedded_model_path

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    spec, model = load_experiment("demo"), str(embedded_model_path())
    capacity.require_room(spec, model, connected=False)
    monkeypatch.setattr(capacity, "machine_memory", lambda: 0.6 * GIB)
    with pytest.raises(ResourceError, match=r"GiB per device.*would fit"):
        capacity.require_room(spec, model, connected=False)
    unchecked = load_experiment("demo", ["resources.check_memory=false"])
    capacity.require_room(unchecked, model, connected=False)
    elsewhere = load_experiment("demo", ["resources.address=auto"])
    capacity.require_room(elsewhere, model, connected=False)  # asked once it is joined
