"""Fine-tuning through rounded weights, on a tiny model and a user's chats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qresafe.core.grids import fit_uniform
from qresafe.embedded.calibration import read_chats
from qresafe.errors import DataError
from qresafe.hf.checkpoint import QuantizedCheckpoint, load_dense
from qresafe.hf.finetune import finetune
from qresafe.hf.models import load_model
from qresafe.hf.recompute import recompute_blocks
from qresafe.hf.writing import read_latents
from qresafe.quantize_specs import CalibrationSpec, LlmQatSpec, QloraSpec
from qresafe.quantizers.calibrated import learned
from qresafe.quantizers.llm_qat import quantize, round_tokens
from qresafe.registry import quantizers

IDS = torch.arange(10, 40)[None]


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    rows = [
        [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]
        for word in ("red", "green", "blue", "white")
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


def spec(chats: Path, **changes: object) -> LlmQatSpec:
    plain = {"bits": 3, "group_size": 32, "steps": 6, "batch_size": 4, "lr": 3e-3}
    return LlmQatSpec(calibration=CalibrationSpec(path=str(chats)), **(plain | changes))


def test_both_arms_learn_and_share_what_is_not_trained(
    tiny_llama: Path, tmp_path: Path, chats: Path
) -> None:
    result = quantize(tiny_llama, tmp_path, spec(chats, steps=12))
    assert result.control == tmp_path / "control"
    for losses in (result.counts["losses"], result.counts["control_losses"]):
        assert losses[-1] < 0.8 * losses[0]
    source = load_file(tiny_llama / "model.safetensors")
    control = load_file(tmp_path / "control" / "model.safetensors")
    checkpoint = QuantizedCheckpoint.open(tmp_path / "checkpoint")
    moved = {name for name in source if not torch.equal(source[name], control[name])}
    assert moved == {f"{name}.weight" for name in checkpoint.names}
    for name in checkpoint.plain_names():
        assert torch.equal(checkpoint.files[name], source[name])


def test_the_trained_forward_pass_is_the_deployed_one(
    tiny_llama: Path, tmp_path: Path, chats: Path
) -> None:
    # No step's update is applied after the last loss but the last one: with lr 0 the loss that
    # training saw is the loss of the checkpoint, roundings of activations and KV included.
    quiet = spec(chats, lr=1e-12, steps=1, activation_bits=8, kv_bits=4)
    losses = quantize(tiny_llama, tmp_path, quiet, control=False).counts["losses"]
    from qresafe.hf.chat import chat_ids
    from qresafe.hf.finetune import answer_logits
    from qresafe.hf.models import load_tokenizer

    tokenizer = load_tokenizer(tiny_llama)
    batch = [chat_ids(tokenizer, chat) for chat in read_chats(chats)]
    deployed = load_model(tmp_path / "checkpoint")
    with torch.no_grad():
        logits, targets = answer_logits(deployed, batch)
    loss = torch.nn.functional.cross_entropy(logits.float(), targets)
    assert loss.item() == pytest.approx(losses[0], rel=1e-5)
    plain, _ = load_dense(tmp_path / "checkpoint")
    with torch.no_grad():
        other, _ = answer_logits(plain, batch)
    assert not torch.allclose(other, logits, rtol=1e-3)  # the roundings are really deployed


def test_the_same_call_gives_the_same_bytes(tiny_llama: Path, tmp_path: Path, chats: Path) -> None:
    for name in ("a", "b"):
        quantize(tiny_llama, tmp_path / name, spec(chats, loss="self_distill", adam_eps=1e-4))
    for arm in ("checkpoint", "control"):
        made = [tmp_path / n / arm / "model.safetensors" for n in ("a", "b")]
        assert made[0].read_bytes() == made[1].read_bytes()


@pytest.mark.parametrize("changes", [{}, {"activation_bits": 8}, {"loss": "self_distill"}])
def test_activations_computed_again_change_no_byte(
    tiny_llama: Path, tmp_path: Path, chats: Path, changes: dict[str, object]
) -> None:
    for name, again in (("plain", False), ("again", True)):
        wanted = spec(chats, gradient_checkpointing=again, **changes)
        quantize(tiny_llama, tmp_path / name, wanted)
    for arm in ("checkpoint", "control"):
        made = [tmp_path / n / arm / "model.safetensors" for n in ("plain", "again")]
        assert made[0].read_bytes() == made[1].read_bytes()


def test_dropout_is_drawn_alike_when_activations_are_computed_again() -> None:
    """With other draws in the second pass, a block's gradient is not that of its output."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def trained(again: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2)
        )
        if again:
            recompute_blocks(model, random=True)
        assert model.config.resid_pdrop == 0.1
        finetune(model, [([1, 2], [3, 4, 5])] * 4, parameters=model.parameters(), steps=3,
                 batch_size=4, lr=1e-2)  # fmt: skip
        return dict(model.state_dict())

    plain, again = trained(again=False), trained(again=True)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_moments_of_8_bits_end_near_those_of_32() -> None:
    """The change of a weight differs from full AdamW's, by less than a fifth of itself."""

    def trained(optimizer: str, steps: int = 20) -> torch.Tensor:
        torch.manual_seed(0)
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                        num_attention_heads=2)
        )  # fmt: skip
        weight = model.model.layers[
            0
        ].mlp.up_proj.weight  # 8192 weights: below 4096 none has 8 bits
        before = weight.detach().clone()
        chats = [([1, 2, 3], [4 + i, 5 + i, 6 + i]) for i in range(8)]
        finetune(model, chats, parameters=model.parameters(), steps=steps, batch_size=8, lr=1e-3,
                 optimizer=optimizer)  # fmt: skip
        return weight.detach() - before

    full, small = trained("adamw"), trained("adamw8bit")
    assert not torch.equal(full, small)
    assert float((full - small).norm() / full.norm()) < 0.2


def test_a_checkpoint_of_8_bit_moments_has_a_key_of_its_own() -> None:
    from qresafe.stages.quantize import _key_spec

    plain, again, small = (
        _key_spec(LlmQatSpec(**given))
        for given in ({}, {"gradient_checkpointing": True}, {"optimizer": "adamw8bit"})
    )
    assert plain == again != small


def test_epochs_stand_for_steps(tiny_llama: Path, tmp_path: Path, chats: Path) -> None:
    wanted = spec(chats, epochs=3, steps=50, batch_size=3)
    losses = quantize(tiny_llama, tmp_path, wanted, control=False).counts["losses"]
    assert len(losses) == 6  # four chats are two batches of at most three


def test_tokens_are_rounded_as_compressed_tensors_does() -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    for bits in (4, 8):
        args = QuantizationArgs(num_bits=bits, symmetric=True, strategy="token", dynamic=True)
        scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1))
        expected = fake_quantize(x, scale, zero, args)
        assert torch.equal(round_tokens(x, bits), expected)


def test_the_checkpoint_holds_the_grid_of_the_last_latent(
    tiny_llama: Path, tmp_path: Path, chats: Path
) -> None:
    # With a vanishing rate the latent is W itself, so Q0 must be W rounded to nearest.
    quantize(tiny_llama, tmp_path, spec(chats, lr=1e-30, steps=1), control=False)
    source = load_file(tiny_llama / "model.safetensors")
    checkpoint = QuantizedCheckpoint.open(tmp_path / "checkpoint")
    for name in checkpoint.names:
        grid = fit_uniform(source[f"{name}.weight"], 3, 32, symmetric=False)
        assert torch.equal(checkpoint.read(name).codes, grid.encode(source[f"{name}.weight"]))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_kept_latents_round_to_the_checkpoint_code_for_code(
    tiny_llama: Path, tmp_path: Path, chats: Path, bits: int, stored: torch.dtype
) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "w"))
    tensors = {n: t.to(stored) for n, t in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    kept = spec(chats, bits=bits, keep_latent=True)
    for folder, asked in (("kept", kept), ("plain", spec(chats, bits=bits))):
        quantize(source, tmp_path / folder, asked, control=False)
    latents = read_latents(tmp_path / "kept" / "latent")
    checkpoint = QuantizedCheckpoint.open(tmp_path / "kept" / "checkpoint")
    assert list(latents) == sorted(checkpoint.names)
    moved = 0
    for name in latents:
        tensor, latent = checkpoint.read(name), latents[name]
        assert latent.dtype == torch.float32
        assert torch.equal(tensor.grid.encode(latent), tensor.codes)
        moved += int((latent != tensors[f"{name}.weight"].float()).sum())
    assert moved > 0  # it is the trained weight, not W
    # the checkpoint is the one that is made without them
    made = [tmp_path / n / "checkpoint" / "model.safetensors" for n in ("kept", "plain")]
    assert made[0].read_bytes() == made[1].read_bytes()
    assert not (tmp_path / "plain" / "latent").exists()


@pytest.mark.parametrize(("words", "fits"), [(250, True), (251, False)])
def test_a_chat_longer_than_the_context_is_named_before_any_work(
    tiny_llama: Path, tmp_path: Path, chats: Path, words: int, fits: bool
) -> None:
    # of 256 positions, five hold the prompt and one the end token
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * words}]
    with chats.open("a") as file:
        file.write(json.dumps({"messages": turns}) + "\n")
    for method in (LlmQatSpec, QloraSpec):
        own = method(calibration=CalibrationSpec(path=str(chats)))
        if fits:
            learned(tiny_llama, own.calibration, own.seed)
            continue
        quantize = quantizers.get(own.method)
        with pytest.raises(DataError, match=r"chat 5 has 257 tokens, more than the 256 .*chats"):
            quantize(tiny_llama, tmp_path / "q", own)
        assert not (tmp_path / "q").exists()


def test_a_malformed_chat_is_named_before_any_work(
    tiny_llama: Path, tmp_path: Path, chats: Path
) -> None:
    with chats.open("a") as file:
        file.write('\n{"messages": []}\n')  # line 5 is blank, line 6 is no chat
    with pytest.raises(DataError, match=r"not a chat.*line 6"):
        quantize(tiny_llama, tmp_path / "q", spec(chats))
    assert not (tmp_path / "q").exists()
