"""Every cell of the table in docs/quantizers.md: method x architecture, on tiny random models.

"yes" is tried whole: quantize, a training step through the grid, export, reload in plain
transformers with the greedy tokens of the decoded weights. "refused" must be one UserError.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import save_tiny_tokenizer
from pydantic import TypeAdapter

from qresafe.core.masked_lora import attach
from qresafe.errors import UserError
from qresafe.hf.checkpoint import QuantizedCheckpoint, load_dense
from qresafe.hf.models import load_model
from qresafe.quantize_specs import QuantizeSpec
from qresafe.registry import planned_layers, quantizers

PAGE = Path(__file__).parents[2] / "docs" / "quantizers.md"
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", GROUPED),
    "Qwen2": ("Qwen2Config", GROUPED),
    "Qwen3": ("Qwen3Config", GROUPED | {"head_dim": 16}),
    "Gemma 2": ("Gemma2Config", GROUPED | {"head_dim": 16}),
    "Gemma 3 (text)": ("Gemma3TextConfig", GROUPED | {"head_dim": 16}),
    "Mistral": ("MistralConfig", GROUPED),
    "Phi-3": ("Phi3Config", GROUPED),
    "GPT-NeoX": ("GPTNeoXConfig", {}),
    "GPT-2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "Qwen3 MoE": ("Qwen3MoeConfig", GROUPED | EXPERTS | {"num_experts": 4, "head_dim": 16}),
}
FEW = {"sequences": 4, "max_length": 64}
METHODS: dict[str, dict[str, Any]] = {  # the rows of the page -> settings that fit 64 columns
    "rtn": {"method": "rtn", "group_size": 32},
    "bnb nf4": {"method": "bnb", "format": "nf4"},
    "bnb int8": {"method": "bnb", "format": "int8"},
    "gptq": {"method": "gptq", "group_size": 32} | FEW,
    "awq": {"method": "awq", "group_size": 32, "grid_points": 3} | FEW,
    "fp8": {"method": "fp8", "activations": "none"},
    "aqlm": {"method": "aqlm", "codebook_bits": 4, "rounds": 1, "finetune_steps": 0, "beam": 2}
    | FEW,
    "qlora": {"method": "qlora", "steps": 1, "batch_size": 2, "rank": 2},
}

# Methods whose deployed kernels round more than the weights: the largest difference of a logit,
# in standard deviations. bitsandbytes: bfloat16 products on some CPUs; int8 inputs of LLM.int8().
RUNTIME = {"bnb nf4": 0.2, "bnb int8": 0.3, "qlora": 0.2}


def cells() -> list[tuple[str, str, str]]:
    """Return (method, architecture, what the page says) for every cell of its table."""
    table = next(part for part in PAGE.read_text().split("\n\n") if "| method | Llama" in part)
    lines = table.splitlines()
    head = split(lines[0])[1:]
    found = []
    for line in lines[2:]:
        method, *said = split(line)
        found += [(method, name, cell) for name, cell in zip(head, said, strict=True)]
    return found


def split(line: str) -> list[str]:
    return [cell.strip().strip("`") for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: saved(name, tmp_path_factory.mktemp("w")) for name in ARCHITECTURES}


def saved(architecture: str, folder: Path) -> Path:
    kind, settings = ARCHITECTURES[architecture]
    sizes = SIZES | {"vocab_size": save_tiny_tokenizer(folder)} | settings
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**sizes)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_the_page_has_every_method_and_architecture() -> None:
    table = cells()
    assert {method for method, _, _ in table} == set(METHODS)
    assert [name for method, name, _ in table if method == "rtn"] == list(ARCHITECTURES)
    assert {said for _, _, said in table} <= {"yes", "refused"}
    tried = {settings["method"] for settings in METHODS.values()}
    # llm_qat writes rtn's files; critical16 and checkpoint are what their base or file is.
    assert tried == set(quantizers.names) - {"llm_qat", "critical16", "checkpoint"}


@pytest.mark.parametrize(("method", "architecture", "said"), cells())
def test_a_cell(
    models: dict[str, Path], tmp_path: Path, method: str, architecture: str, said: str
) -> None:
    spec = TypeAdapter(QuantizeSpec).validate_python(METHODS[method])
    run = quantizers.get(spec.method)
    if said == "refused":
        with pytest.raises(UserError):
            run(models[architecture], tmp_path, spec, control=False)
        return
    run(models[architecture], tmp_path, spec, control=False)
    before = QuantizedCheckpoint.open(tmp_path / "checkpoint")
    assert set(planned_layers.get(spec.method)(models[architecture], spec)) == set(before.names)
    codes = one_step(tmp_path / "checkpoint")
    assert any(not torch.equal(codes[name], before[name].codes) for name in codes)
    q = before.rewrite(tmp_path / "q", codes)
    sizes = [sum(f.stat().st_size for f in folder.iterdir()) for folder in (before.folder, q)]
    assert sizes[0] == sizes[1]
    dense, _ = load_dense(q)
    # qresafe runs AQLM decoded on a CPU; here the package's own layers have to agree.
    plain = transformers.AutoModelForCausalLM.from_pretrained
    deployed = plain(q, dtype="float32").eval() if method == "aqlm" else load_model(q)
    if method not in RUNTIME:
        assert greedy(deployed) == greedy(dense)
    expected = logits(dense)
    gap = (logits(deployed) - expected).abs().max() / expected.std()
    assert gap <= RUNTIME.get(method, 1e-3)


def one_step(folder: Path) -> dict[str, torch.Tensor]:
    """Return the codes after one large step of masked LoRA through the grid."""
    model, quantized = load_dense(folder, torch.float32)
    options = {"rank": 2, "alpha": 4.0, "on": "weight", "through_grid": True, "seed": 0}
    layers = attach(model, quantized, **options)  # type: ignore[arg-type]
    factors = [layer.B for layer in layers.values()]
    ids = torch.arange(10, 30)[None]
    loss = model(input_ids=ids, labels=ids).loss
    gradients = torch.autograd.grad(loss, factors)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    with torch.no_grad():
        for factor, gradient in zip(factors, gradients, strict=True):
            factor -= 0.3 * gradient / (gradient.abs().max() + 1e-12)
    return {name: layer.codes() for name, layer in layers.items()}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(10, 30)[None]).logits.float()


def greedy(model: Any) -> list[int]:
    ids = torch.arange(10, 30)[None]
    made = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    return list(made[0, 20:].tolist())
