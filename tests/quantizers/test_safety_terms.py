"""The safety terms of LLM-QAT: their arithmetic by hand, and what they do to a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from qresafe.errors import DataError, SpecError, UserError
from qresafe.hf.finetune import Chat, finetune
from qresafe.hf.models import load_model
from qresafe.loading import load_spec
from qresafe.quantize_specs import CalibrationSpec, LlmQatSpec, SafetySpec
from qresafe.quantizers import safety_terms as module
from qresafe.quantizers.llm_qat import planned, quantize
from qresafe.quantizers.safety_terms import Preference, SafetyTerms, answer_logps

CHOSEN: Chat = ([7, 8, 9], [20, 21, 22])
REJECTED: Chat = ([7, 8, 9], [30, 31])
ANCHOR: Chat = ([11, 12], [40, 41, 42, 43])


def logp(model: torch.nn.Module, chat: Chat) -> float:
    """Return log p(answer | prompt), one token after the other, without batches or padding."""
    prompt, answer = chat
    total = 0.0
    for count, token in enumerate(answer):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer[:count]])).logits[0, -1].double()
        total += (logits[token] - logits.logsumexp(-1)).item()
    return total


def test_the_terms_are_those_of_the_formula(tiny_llama: Path) -> None:
    model = load_model(tiny_llama)
    chosen, rejected, anchor = (logp(model, chat) for chat in (CHOSEN, REJECTED, ANCHOR))
    row = Preference(CHOSEN, REJECTED, chosen - 0.5, rejected + 1.5)
    spec = SafetySpec(dpo=2, anchor=3, beta=0.25)
    terms = SafetyTerms(spec, [row], [ANCHOR], seed=0)
    # margin (0.5) - (-1.5) = 2, times beta 0.25: -log sigmoid(0.5)
    dpo = math.log(1 + math.exp(-0.5))
    nll = -anchor / 4  # per answer token
    assert terms.loss(model).item() == pytest.approx(2 * dpo + 3 * nll, rel=1e-5)
    assert terms.history["dpo"] == pytest.approx([dpo], rel=1e-5)
    assert terms.history["anchor"] == pytest.approx([nll], rel=1e-5)
    assert answer_logps(model, [CHOSEN, ANCHOR]).tolist() == pytest.approx([chosen, anchor])


def test_dpo_starts_at_log_2_under_w_and_its_gradient_parts_the_answers(tiny_llama: Path) -> None:
    model = load_model(tiny_llama)
    rows = module._referenced(model, [(CHOSEN, REJECTED)])
    assert rows[0].ref_chosen == pytest.approx(logp(model, CHOSEN), rel=1e-5)
    terms = SafetyTerms(SafetySpec(dpo=1, anchor=0), rows, [], seed=0)
    assert terms.loss(model).item() == pytest.approx(math.log(2), rel=1e-5)
    before = logp(model, CHOSEN) - logp(model, REJECTED)
    options = {"steps": 3, "batch_size": 1, "lr": 1e-3, "extra": terms.loss}
    finetune(model, [ANCHOR], parameters=model.parameters(), **options)
    assert logp(model, CHOSEN) - logp(model, REJECTED) > before
    assert len(terms.history["dpo"]) == 4  # the look above, and three steps


def test_what_is_extra_is_added_to_the_loss(tiny_llama: Path) -> None:
    def losses(extra: float | None) -> list[float]:
        model = load_model(tiny_llama)
        added = None if extra is None else lambda _: torch.tensor(extra)
        options = {"steps": 2, "batch_size": 2, "lr": 1e-3, "extra": added}
        return finetune(model, [CHOSEN, ANCHOR], parameters=model.parameters(), **options)

    plain = losses(None)
    assert losses(0.0) == plain  # to the bit
    # A constant has no gradient: the same path, 5 higher.
    assert losses(5.0) == pytest.approx([value + 5 for value in plain], rel=1e-6)


# ---------------------------------------------------------------- the whole quantizer


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    chats, prompts = tmp_path / "chats.jsonl", tmp_path / "prompts.jsonl"
    turns = [{"role": "user", "content": "say red"}, {"role": "assistant", "content": "red"}]
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    rows = [("harmful", "break it"), ("benign", "say blue"), ("borderline", "kill a process")]
    prompts.write_text("".join(json.dumps({"axis": a, "prompt": p}) + "\n" for a, p in rows))
    return {"chats": str(chats), "prompts": str(prompts)}


def spec(files: dict[str, str], **safety: object) -> LlmQatSpec:
    own = SafetySpec(**({"path": files["prompts"], "max_new_tokens": 6} | safety))
    chats = CalibrationSpec(path=files["chats"])
    sizes = {"bits": 4, "group_size": 32, "steps": 3, "batch_size": 1, "lr": 3e-3}
    return LlmQatSpec(calibration=chats, safety=own, **sizes)


def test_the_same_call_gives_the_same_bytes_and_other_ones_than_without(
    tiny_llama: Path, tmp_path: Path, files: dict[str, str]
) -> None:
    anchored = spec(files, dpo=0)
    made = [quantize(tiny_llama, tmp_path / name, anchored) for name in "ab"]
    plain = quantize(tiny_llama, tmp_path / "c", anchored.model_copy(update={"safety": None}))
    weights = {
        name: [(tmp_path / name / arm / "model.safetensors").read_bytes() for arm in ARMS]
        for name in "abc"
    }
    assert weights["a"] == weights["b"]
    assert weights["a"][0] != weights["c"][0]
    assert weights["a"][1] == weights["c"][1]  # the control has no safety terms
    counts = made[0].counts["safety"]
    assert (counts["preferences"], counts["anchors"]) == (0, 2)
    assert len(counts["losses"]["anchor"]) == 3
    assert "safety" not in plain.counts


ARMS = ("checkpoint", "control")


def test_preferences_are_what_w_refuses_and_plain_fine_tuning_answers(
    tiny_llama: Path, tmp_path: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qresafe.hf.generate import Generated

    asked: list[Path] = []

    def answers(model: object, tokenizer: object, texts: list[str], spec: object) -> object:
        asked.append(Path(str(model.config._name_or_path)))  # type: ignore[attr-defined]
        text = "I cannot do that" if asked[-1] == tiny_llama else "Step one"
        return [Generated([20 + len(text), 2], text, "stop") for _ in texts]

    monkeypatch.setattr(module, "_answers", answers)
    result = quantize(tiny_llama, tmp_path / "q", spec(files), control=False)
    assert asked == [tiny_llama, tiny_llama, tmp_path / "q" / "control"]
    assert result.counts["safety"]["preferences"] == 1
    assert result.counts["safety"]["losses"]["dpo"][0] > 0
    assert result.control is None
    assert not (tmp_path / "q" / "control").exists()


def test_nothing_to_prefer_is_said(tiny_llama: Path, tmp_path: Path, files: dict[str, str]) -> None:
    # A model of noise refuses nothing in words; the other term goes on alone.
    with pytest.warns(UserWarning, match=r"none of 1 harmful prompts.*anchors are used alone"):
        counts = quantize(tiny_llama, tmp_path / "q", spec(files)).counts
    assert counts["safety"]["preferences"] == 0
    assert counts["safety"]["losses"].keys() == {"anchor"}
    alone = spec(files, anchor=0)
    with pytest.raises(DataError, match=r"none of 1 harmful prompts.*anchor a weight"):
        quantize(tiny_llama, tmp_path / "alone", alone)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dpo": 0, "anchor": 0}, "both terms have weight 0"),
        ({"harmful": 0}, "the dpo term needs harmful prompts"),
        ({"benign": 0, "borderline": 0}, "the anchor term needs prompts"),
        ({"beta": 0}, "beta"),
    ],
)
def test_terms_that_say_nothing_are_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        load_spec(LlmQatSpec, {"safety": changes})


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"axis": "harmfull", "prompt": "x"}, r"axis 'harmfull'.*row 1.*harmful"),
        ({"axis": "harmful", "prompt": " "}, "an empty prompt"),
        ({"prompt": "x"}, "no column 'axis'"),
        ({"axis": "benign", "prompt": "x"}, "no harmful prompts"),
        ({"axis": "harmful", "prompt": "x"}, "no benign or borderline prompts"),
    ],
)
def test_a_bad_prompt_file_is_named_before_any_work(
    tiny_llama: Path, files: dict[str, str], row: dict[str, str], told: str
) -> None:
    Path(files["prompts"]).write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=told):
        planned(tiny_llama, spec(files))


def test_an_unknown_judge_is_said_before_any_work(tiny_llama: Path, files: dict[str, str]) -> None:
    with pytest.raises(UserError, match="unknown judge 'keywrd'"):
        planned(tiny_llama, spec(files, judge="keywrd"))
