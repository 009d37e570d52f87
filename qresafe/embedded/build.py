"""Building the embedded chat model from nothing: corpus -> tokenizer -> helpful -> aligned W."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from upath import UPath

from qresafe.artifacts import content_key, hash_folder, write_text
from qresafe.embedded.calibration import Chat
from qresafe.embedded.scoring import development_figures
from qresafe.embedded.tokenizer import train_tokenizer
from qresafe.embedded.training import alignment_chats, corpus_key, helpful_chats
from qresafe.errors import CorruptArtifactError
from qresafe.integrity import damage, tell
from qresafe.progress import Progress, Silent
from qresafe.provenance import versions

SHIPPED_SEED = 0


@dataclass(frozen=True)
class Recipe:
    """Every number that the built model depends on, beside the corpus and the seed."""

    vocab_size: int = 1024
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    ffn_size: int = 384  # a multiple of the usual group sizes, 32, 64 and 128
    max_positions: int = 512
    initializer_range: float = 0.05
    helpful_chats: int = 33600
    helpful_steps: int = 1000
    helpful_batch: int = 48
    helpful_lr: float = 3e-3
    refusals: int = 1400
    helpful_beside: int = 1400
    borderline_share: float = 0.12
    align_steps: int = 200
    align_batch: int = 32
    align_lr: float = 5e-4
    weight_decay: float = 0.01


def embedded_model_path(seed: int = SHIPPED_SEED, progress: Progress | None = None) -> Path:
    """Return the folder of a built embedded model, building it once if it is not shipped.

    Models of other seeds live under $QRESAFE_CACHE, else $XDG_CACHE_HOME/qresafe, else
    ~/.cache/qresafe, in a folder named by recipe, corpus and seed.

    Args:
        seed: 0 is shipped with the package.
        progress: Shows the steps of a build.

    Raises:
        CorruptArtifactError: The shipped model is not as it was built.
    """
    shipped = Path(str(files("qresafe.embedded"))) / "model"
    if seed == SHIPPED_SEED and (shipped / "manifest.json").is_file():
        if wrong := damaged_file(shipped):
            remedy = "install the package again"
            raise CorruptArtifactError(wrong, where=str(shipped), remedy=remedy)
        return shipped
    key = content_key([asdict(Recipe()), corpus_key()])
    target = cache_folder() / f"embedded-{key}-seed{seed}"
    if wrong := damaged_file(target):
        if target.exists():
            tell(f"{wrong} in {target}: the model is built again")
        build(seed, target, progress=progress)
    return target


def damaged_file(folder: Path) -> str:
    """Return what is wrong with a built model's folder; empty: nothing."""
    try:
        hashes = json.loads((folder / "manifest.json").read_text())["files"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return "unreadable manifest"
    found = ((damage(UPath(folder / name), digest, None), name) for name, digest in hashes.items())
    return next((f"{wrong} file {name}" for wrong, name in found if wrong), "")


def cache_folder() -> Path:
    """Return where built models are kept between runs."""
    if chosen := os.environ.get("QRESAFE_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "qresafe"


def build(
    seed: int,
    target: Path,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build the embedded model and write it as a plain transformers folder.

    The same seed, recipe, versions, machine and thread count give the same bytes. The folder
    appears whole or not at all.

    Args:
        seed: Of the initial weights, the choice of chats and their order; the tokenizer and the
            evaluation do not depend on it.
        target: The folder to write; an existing one is replaced.
        recipe: Every number of the training; None for the shipped one.
        progress: Advances with the training steps.

    Returns:
        The manifest.
    """
    import torch

    recipe, shown = recipe or Recipe(), progress or Silent()
    began = time.perf_counter()
    shown.start("build", recipe.helpful_steps + recipe.align_steps, "step")
    tokenizer = train_tokenizer(_tokenizer_texts(), recipe.vocab_size, recipe.max_positions)
    model, losses = _train(recipe, tokenizer, seed, shown)
    staging = target.with_name(f"{target.name}.building-{os.getpid()}")
    _save(model, tokenizer, staging)
    manifest = {
        "recipe": asdict(recipe),
        "corpus": corpus_key(),
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "losses": losses,
        "development": development_figures(model, tokenizer),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - began, 1),
        "files": hash_folder(staging),  # type: ignore[arg-type]
    }
    write_text(staging / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(staging, target)
    shown.finish(f"{manifest['seconds']} s")
    return manifest


def new_model(recipe: Recipe, seed: int) -> Any:
    """Return the untrained Llama of a recipe; its weights depend on `seed` alone."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.ffn_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.max_positions,
        initializer_range=recipe.initializer_range,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random state is not ours to move
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=1, do_sample=False)
    return model


def _tokenizer_texts() -> list[str]:
    # One fixed sample for all seeds: every word occurs, and models differ in weights only.
    rng = random.Random("tokenizer")
    chats = helpful_chats(12000, rng) + alignment_chats(2000, 400, 0.5, rng)
    return [message["content"] for messages in chats for message in messages]


def _train(
    recipe: Recipe, tokenizer: Any, seed: int, progress: Progress
) -> tuple[Any, dict[str, float]]:
    from qresafe.hf.finetune import finetune

    rng = random.Random(f"build {seed}")
    helpful = helpful_chats(recipe.helpful_chats, rng)
    aligned = alignment_chats(recipe.refusals, recipe.helpful_beside, recipe.borderline_share, rng)
    model = new_model(recipe, seed)
    stages = {
        "helpful": (helpful, recipe.helpful_steps, recipe.helpful_batch, recipe.helpful_lr, 20),
        "aligned": (aligned, recipe.align_steps, recipe.align_batch, recipe.align_lr, 5),
    }
    losses = {}
    for name, (chats, steps, batch_size, lr, warmup) in stages.items():
        history = finetune(
            model,
            _encode(tokenizer, chats),
            parameters=model.parameters(),
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            warmup_steps=warmup,
            weight_decay=recipe.weight_decay,
            seed=seed,
            progress=progress,
        )
        losses[name] = round(sum(history[-10:]) / len(history[-10:]), 4)
    return model.eval(), losses


def _encode(tokenizer: Any, chats: Sequence[Chat]) -> list[tuple[list[int], list[int]]]:
    from qresafe.hf.chat import chat_ids

    return [chat_ids(tokenizer, messages) for messages in chats]


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
