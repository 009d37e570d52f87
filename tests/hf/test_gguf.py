"""GGUF files as plain transformers decodes them; Q8_0 and Q4_0 patched within the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import save_tiny_llama, save_tiny_tokenizer
from foreign import write_gguf
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from transformers import AutoModelForCausalLM
from transformers.integrations.gguf.kernels import dequantize_blocks

from qresafe.errors import CorruptArtifactError, ModelError
from qresafe.hf.checkpoint import QuantizedCheckpoint, load_dense
from qresafe.hf.gguf_folder import check_gguf
from qresafe.hf.models import load_model, load_tokenizer, resolve
from qresafe.hf.writing import write_dense
from qresafe.specs import ModelSpec

IDS = torch.arange(10, 40)[None]
COMMIT = "c" * 40
# K-quants, with 256 weights to a block -> where its float16 scales lie, in bytes
HALVES = {Kind.Q4_K: (0, 2), Kind.Q3_K: (108,), Kind.Q2_K: (80, 82)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QRESAFE_CACHE", str(tmp_path / "cache"))


def rounded(kind: Kind) -> Any:
    return lambda values: (quants.quantize(values, kind), kind)


def random_blocks(kind: Kind) -> Any:
    """Return what makes blocks of random bytes, but with small positive scales."""
    draw = np.random.default_rng(0)

    def blocks(values: np.ndarray) -> tuple[np.ndarray, Kind]:
        size = gguf.GGML_QUANT_SIZES[kind][1]
        made = draw.integers(0, 256, (values.size // 256, size), dtype=np.uint8)
        for place in HALVES[kind]:
            scale = draw.uniform(1e-4, 1e-3, (len(made), 1)).astype(np.float16)
            made[:, place : place + 2] = scale.view(np.uint8)
        return made.reshape(len(values), -1), kind

    return blocks


def half(block: np.ndarray, place: int) -> float:
    return float(block[place : place + 2].view(np.float16)[0])


def q2_k(block: np.ndarray) -> list[float]:
    """Decode a block, weight by weight: 16 scales and minima of 4 bits, 64 bytes of codes."""
    scale, least = half(block, 80), half(block, 82)
    values = []
    for place in range(256):
        upper, inside = divmod(place, 128)
        code = int(block[16 + 32 * upper + inside % 32]) >> (2 * (inside // 32)) & 3
        pair = int(block[place // 16])
        values.append(scale * (pair & 15) * code - least * (pair >> 4))
    return values


def q3_k(block: np.ndarray) -> list[float]:
    """Decode a block, weight by weight: third bits, 64 bytes of codes, 16 scales of 6 bits."""
    values = []
    for place in range(256):
        upper, inside = divmod(place, 128)
        code = int(block[32 + 32 * upper + inside % 32]) >> (2 * (inside // 32)) & 3
        third = int(block[place % 32]) >> (place // 32) & 1
        group = place // 16
        low = int(block[96 + group % 8]) >> (4 * (group // 8)) & 15
        high = int(block[104 + group % 4]) >> (2 * (group // 4)) & 3
        values.append(half(block, 108) * ((high << 4 | low) - 32) * (code + 4 * third - 4))
    return values


def q4_k(block: np.ndarray) -> list[float]:
    """Decode a block by transformers' torch kernel, which does not know the other two."""
    raw = torch.from_numpy(block.copy())[None]
    return dequantize_blocks(raw, int(Kind.Q4_K), 1, 256, torch.float32)[0].tolist()


DECODE = {Kind.Q4_K: q4_k, Kind.Q3_K: q3_k, Kind.Q2_K: q2_k}


def plain(file: Path) -> Any:
    """Return the model as transformers itself makes it of a .gguf file."""
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)


@torch.no_grad()
@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0], ids=lambda kind: kind.name)
def test_codes_stand_for_what_transformers_decodes(
    tiny_llama: Path, tmp_path: Path, kind: Kind
) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(file, tiny_llama, rounded(kind))
    folder = Path(resolve(ModelSpec(path=str(file))).path)
    reference = plain(file)
    assert torch.equal(load_model(folder)(IDS).logits, reference(IDS).logits)
    dense, layers = load_dense(folder)
    assert len(layers) == 14  # seven linear layers in each of two blocks; the head is tied
    assert torch.equal(dense(IDS).logits, reference(IDS).logits)
    checkpoint = QuantizedCheckpoint.open(folder)
    for name, tensor in layers.items():
        assert torch.equal(tensor.dense(), reference.get_submodule(name).weight)
        assert torch.equal(tensor.grid.encode(tensor.dense()), tensor.codes)
        stored, packed = checkpoint.codec.pack(name, tensor.codes)
        assert torch.equal(packed, checkpoint.files[stored])


@torch.no_grad()
@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0], ids=lambda kind: kind.name)
def test_a_patched_file_is_as_large_and_runs_in_plain_transformers(
    tiny_llama: Path, tmp_path: Path, kind: Kind
) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(file, tiny_llama, rounded(kind))
    q0 = QuantizedCheckpoint.open(resolve(ModelSpec(path=str(file))).path)
    codes = {name: q0.read(name).codes.clone() for name in q0.names[::3]}
    for changed in codes.values():
        changed[1::4] = -1 - changed[1::4]
    assert any("q_proj" in name for name in codes)  # whose rows the file re-orders
    made = q0.rewrite(tmp_path / "q", codes)
    assert (made / file.name).stat().st_size == file.stat().st_size
    q, weights = load_dense(made)
    for name in q0.names:
        assert torch.equal(weights[name].codes, codes.get(name, q0.read(name).codes))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    deployed = plain(made / file.name)
    assert torch.equal(deployed.generate(IDS, **options), q.generate(IDS, **options))
    assert not torch.equal(deployed(IDS).logits, plain(file)(IDS).logits)
    write_dense(tmp_path / "plain", QuantizedCheckpoint.open(made), lambda _, weight: weight)
    assert not list((tmp_path / "plain").glob("*.gguf"))
    assert torch.equal(load_model(tmp_path / "plain")(IDS).logits, q(IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", HALVES, ids=lambda kind: kind.name)
def test_k_quants_are_assessed_and_not_patched(tmp_path: Path, kind: Kind) -> None:
    source = save_tiny_llama(tmp_path / "w", hidden=256)
    file = tmp_path / "m.gguf"
    blocks = random_blocks(kind)
    stored: dict[tuple[int, ...], np.ndarray] = {}

    def kept(values: np.ndarray) -> tuple[np.ndarray, Kind]:
        made, _ = blocks(values)
        stored[values.shape] = made
        return made, kind

    write_gguf(file, source, kept)
    folder = resolve(ModelSpec(path=str(file))).path
    model = load_model(folder)
    assert torch.isfinite(model(IDS).logits).all()
    # the last row of the last layer's down_proj: 512 weights, two blocks
    row = np.split(stored[256, 512][-1], 2)
    expected = torch.tensor([value for block in row for value in DECODE[kind](block)])
    torch.testing.assert_close(model.model.layers[1].mlp.down_proj.weight[-1], expected)
    with pytest.raises(ModelError, match=rf"{kind.name} can be assessed, not patched"):
        QuantizedCheckpoint.open(folder)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Mistral", "Qwen2", "Qwen3"])
def test_other_architectures(tmp_path: Path, name: str) -> None:
    """Biases (Qwen2), norms of q and k (Qwen3); llama.cpp calls a Mistral a llama."""
    source = save_tiny(name, tmp_path / "w")
    file = tmp_path / "m.gguf"
    architecture = "llama" if name == "Mistral" else name.lower()
    write_gguf(file, source, rounded(Kind.Q8_0), architecture)
    folder = resolve(ModelSpec(path=str(file))).path
    dense, layers = load_dense(folder)
    assert len(layers) == 15  # with the head, which is not tied here
    assert torch.equal(dense(IDS).logits, plain(file)(IDS).logits)
    exact = load_model(source)(IDS).logits
    # 8 bits cost 2 %; a wrong order of rows would cost everything
    assert (dense(IDS).logits - exact).norm() < 0.1 * exact.norm()


def save_tiny(name: str, folder: Path) -> Path:
    """Save a random two-layer model of a Llama-like architecture."""
    size = save_tiny_tokenizer(folder)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=size,
        hidden_size=64,
        head_dim=128 if name == "Qwen3" else 16,  # transformers 5.17 reads no other from a file
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_vocabulary_and_chat_template_come_with_the_file(tmp_path: Path) -> None:
    from qresafe.embedded.build import embedded_model_path

    source = Path(embedded_model_path())
    write_gguf(tmp_path / "m.gguf", source, rounded(Kind.Q8_0))
    made = load_tokenizer(resolve(ModelSpec(path=str(tmp_path / "m.gguf"))).path)
    own = load_tokenizer(source)
    chat = [{"role": "user", "content": "How do I bake bread, please?"}]
    options = {"add_generation_prompt": True, "tokenize": False}
    text = own.apply_chat_template(chat, **options)
    assert made.apply_chat_template(chat, **options) == text
    assert made.eos_token_id == own.eos_token_id
    assert made.decode(made.encode(text)) == own.decode(own.encode(text))


def test_mistakes_end_in_a_sentence(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    with pytest.raises(ModelError, match="no model file"):
        resolve(ModelSpec(path=str(file)))
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(CorruptArtifactError, match="not a GGUF file"):
        resolve(ModelSpec(path=str(file)))
    write_gguf(file, tiny_llama, rounded(Kind.Q8_0))
    whole = file.read_bytes()
    for length in (6, 40, 1000, len(whole) - 1000):
        file.write_bytes(whole[:length])
        with pytest.raises(CorruptArtifactError, match="damaged GGUF file"):
            resolve(ModelSpec(path=str(file)))
    file.write_bytes(whole)
    assert resolve(ModelSpec(path=str(tmp_path))).path == resolve(ModelSpec(path=str(file))).path
    (tmp_path / "n.gguf").write_bytes(whole)
    with pytest.raises(ModelError, match=r"several \.gguf files"):
        resolve(ModelSpec(path=str(tmp_path)))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> Path:
    """A hub cache as huggingface_hub lays it out, of owner/name with one .gguf file; offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = tmp_path / "hub" / "models--owner--name"
    for part in ("blobs", "refs", f"snapshots/{COMMIT}/q8"):
        (model / part).mkdir(parents=True)
    blob = model / "blobs" / ("e" * 64)
    write_gguf(tmp_path / "m.gguf", tiny_llama, rounded(Kind.Q8_0))
    (tmp_path / "m.gguf").rename(blob)
    (model / "refs" / "main").write_text(COMMIT)
    snapshot = model / "snapshots" / COMMIT
    (snapshot / "m.gguf").symlink_to(Path("../../blobs") / blob.name)
    (snapshot / "q8" / "m.gguf").symlink_to(Path("../../../blobs") / blob.name)
    return model


@torch.no_grad()
@pytest.mark.parametrize("file", ["m.gguf", "q8/m.gguf"])
@pytest.mark.parametrize("revision", [None, COMMIT])
def test_a_file_of_the_hub_is_found_by_its_id(hub: Path, file: str, revision: str | None) -> None:
    found = resolve(ModelSpec(path=f"owner/name/{file}", revision=revision))
    assert (found.name, found.revision) == (f"owner/name/{file}", COMMIT)
    assert (Path(found.path) / "m.gguf").is_file()
    reference = plain(hub / "snapshots" / COMMIT / file)
    assert torch.equal(load_model(found.path)(IDS).logits, reference(IDS).logits)
    assert len(QuantizedCheckpoint.open(found.path)) == 14


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("owner/name/absent.gguf", r"cannot reach the hub.*\(owner/name/absent\.gguf\)"),
        ("owner/name/m-00001-of-00003.gguf", "one of 3 parts of a split GGUF model"),
        ("./owner/name/m.gguf", "no model file"),
        ("owner/name/../m.gguf", "no model file"),
        ("owner/name/m.safetensors", "no model folder"),
    ],
)
def test_a_file_that_the_hub_cannot_give_is_named(hub: Path, path: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        resolve(ModelSpec(path=path))


def test_parts_of_a_model_are_refused_and_a_single_part_is_whole(
    tiny_llama: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "m-00001-of-00001.gguf"
    write_gguf(whole, tiny_llama, rounded(Kind.Q8_0))
    resolve(ModelSpec(path=str(whole)))
    parts = [tmp_path / "parts" / f"m-0000{part}-of-00002.gguf" for part in (1, 2)]
    parts[0].parent.mkdir()
    for part in parts:
        part.write_bytes(whole.read_bytes())
    for path in (*parts, parts[0].parent):
        with pytest.raises(ModelError, match=r"one of 2 parts of a split .* llama-gguf-split"):
            resolve(ModelSpec(path=str(path)))


@pytest.mark.parametrize("factors", [(1.0, 1.0), (1.0, 8.0)])
def test_positions_that_would_be_wrong_are_refused(
    tmp_path: Path, factors: tuple[float, float]
) -> None:
    """Llama 3.1's file divides its lower frequencies, which transformers does not read."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if factors == (1.0, 1.0):
        check_gguf(tmp_path / "m.gguf")
        return
    with pytest.raises(ModelError, match=r"stretches its positions \(rope_freqs\.weight\)"):
        check_gguf(tmp_path / "m.gguf")


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "zebra")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="transformers cannot read this GGUF file"):
        resolve(ModelSpec(path=str(tmp_path / "m.gguf")))
