"""Checkpoints as AutoGPTQ, AutoAWQ and llama.cpp write them, packed the slow and obvious way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from qresafe.core.grids import UniformGrid, fit_uniform
from qresafe.hf.tensor_files import TensorFiles
from qresafe.hf.writing import linear_layers

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of AutoAWQ's gemm, as its from_linear shifts them in


def stream(column: list[int], bits: int) -> list[int]:
    """Pack codes into 32-bit words as one long number, lowest bits first; signed words."""
    number = sum(code << (bits * place) for place, code in enumerate(column))
    words = [(number >> (32 * w)) & 0xFFFFFFFF for w in range(-(-len(column) * bits // 32))]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


def packed_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack (n, columns) codes down the columns."""
    columns = [stream(column, bits) for column in codes.T.tolist()]
    return torch.tensor(columns, dtype=torch.int32).T.contiguous()


def gptq_layer(weight: Tensor, bits: int, group: int, order: Tensor, offset: int) -> dict[str, Any]:
    """Return a layer's tensors; `order` is the order in which GPTQ went through the inputs."""
    half = 1 << (bits - 1)
    grid = fit_uniform(weight[:, order].half(), bits, group, False)
    codes = torch.empty(weight.shape, dtype=torch.int16)
    codes[:, order] = grid.encode(weight[:, order]).to(torch.int16) + half
    group_of = torch.empty(len(order), dtype=torch.int32)
    group_of[order] = torch.arange(len(order), dtype=torch.int32) // group
    # v1 stores the zero point less one and cannot hold a zero point of 0
    zero = (grid.zero.to(torch.int16) + half).clamp(min=offset)
    return {
        "qweight": packed_rows(codes.T, bits),
        "qzeros": packed_rows((zero - offset), bits).T.contiguous(),
        "scales": grid.scale.T.contiguous(),
        "g_idx": group_of,
        "expected": (codes - zero[:, group_of.long()]) * grid.scale[:, group_of.long()],
    }


def awq_words(rows: Tensor) -> Tensor:
    """Interleave eight 4-bit codes of a row into each word."""
    words = []
    for row in rows.tolist():
        blocks = [row[i : i + 8] for i in range(0, len(row), 8)]
        words.append([stream([block[place] for place in AWQ_ORDER], 4)[0] for block in blocks])
    return torch.tensor(words, dtype=torch.int32)


def awq_layer(weight: Tensor, group: int) -> dict[str, Any]:
    """Return a layer's tensors in AutoAWQ's gemm version."""
    grid: UniformGrid = fit_uniform(weight.half(), 4, group, False)
    codes, zero = grid.encode(weight).to(torch.int16) + 8, grid.zero.to(torch.int16) + 8
    wide = [part.repeat_interleave(group, dim=1) for part in (zero, grid.scale)]
    return {
        "qweight": awq_words(codes.T),
        "qzeros": awq_words(zero.T),
        "scales": grid.scale.T.contiguous(),
        "expected": (codes - wide[0]) * wide[1],
    }


def write(
    target: Path, source: Path, config: dict[str, Any], layer: Callable[[Tensor], dict[str, Any]]
) -> dict[str, Tensor]:
    """Write `source` with every linear layer but the head made by `layer`; return its weights."""
    target.mkdir(parents=True)
    files = TensorFiles(source)
    names = [name for name in linear_layers(source) if name != "lm_head"]
    expected: dict[str, Tensor] = {}
    tensors = {n: files[n] for n in files if n.removesuffix(".weight") not in names}
    tensors = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
    for name in names:
        parts = layer(files[f"{name}.weight"].float())
        expected[name] = parts.pop("expected")
        tensors |= {f"{name}.{part}": value for part, value in parts.items()}
    save_file(tensors, str(target / "model.safetensors"), metadata={"format": "pt"})
    stored = json.loads((source / "config.json").read_text())
    stored |= {"dtype": "float16", "quantization_config": config}
    (target / "config.json").write_text(json.dumps(stored))
    for file in source.iterdir():
        if file.suffix in {".json", ".jinja"} and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)
    return expected


def write_gptq(
    target: Path,
    source: Path,
    *,
    bits: int = 4,
    group: int = 32,
    desc_act: bool = False,
    packing: str = "gptq",
) -> dict[str, Tensor]:
    """Write a GPTQ checkpoint (rounded to nearest); return the weights that it stands for."""
    generator = torch.Generator().manual_seed(0)

    def layer(weight: Tensor) -> dict[str, Any]:
        inputs = weight.shape[1]
        order = torch.randperm(inputs, generator=generator) if desc_act else torch.arange(inputs)
        return gptq_layer(weight, bits, group, order, 1 if packing == "gptq" else 0)

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": desc_act}
    return write(target, source, config | {"checkpoint_format": packing, "sym": False}, layer)


def write_awq(target: Path, source: Path, *, group: int = 32) -> dict[str, Tensor]:
    """Write an AutoAWQ checkpoint; return the weights that it stands for."""
    config = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group}
    return write(
        target, source, config | {"zero_point": True}, lambda weight: awq_layer(weight, group)
    )


def write_gguf(
    target: Path,
    source: Path,
    blocks: Callable[[np.ndarray], tuple[Any, Any]],
    architecture: str = "llama",
) -> None:
    """Write a model as a .gguf file, as llama.cpp's convert_hf_to_gguf.py lays it out.

    Args:
        target: The file.
        source: The model's folder.
        blocks: Given a float32 matrix, returns (uint8 blocks, ggml type), or (floats, None).
        architecture: llama.cpp's name of it; one that needs no more metadata than a Llama.
    """
    import gguf

    config = json.loads((source / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(target, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    add_vocabulary(writer, source, config["vocab_size"])
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[architecture.upper()], config["num_hidden_layers"]
    )
    for name, tensor in TensorFiles(source).items():
        values = tensor.float().numpy()
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if (
                architecture == "llama" and part in name
            ):  # from two halves of a head (transformers) to pairs (llama.cpp)
                halves = values.reshape(count, 2, len(values) // count // 2, -1)
                values = halves.swapaxes(1, 2).reshape(values.shape)
        data, kind = blocks(values) if values.ndim == 2 else (values, None)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(stored, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: Any, source: Path, size: int) -> None:
    """Write a byte-level BPE vocabulary, its merges and its chat template."""
    stored = json.loads((source / "tokenizer.json").read_text())["model"]
    tokens = sorted(stored["vocab"], key=stored["vocab"].get)
    tokens += [f"<unused{i}>" for i in range(size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in stored["merges"]]
    if merges:
        writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template((source / "chat_template.jinja").read_text())
