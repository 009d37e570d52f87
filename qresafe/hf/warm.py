"""The model that a process loaded last, so that its next stage need not load it again."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from upath import UPath

from qresafe.artifacts import is_local
from qresafe.hf.models import ModelRef, fingerprint, load_model, load_tokenizer

# A chat model renders its own chats; a guard's prompt may be rendered for it; a classifier has
# labels instead of tokens.
Kind = Literal["chat", "guard", "classifier"]


@dataclass(frozen=True)
class ModelInput:
    """A model as a stage's input: where it is, and what identifies its content.

    Attributes:
        ref: Where to find it, on any machine of the cluster.
        key: A content hash: `fingerprint` of a folder, or the key of the artefact that holds it.
        kind: What it is used as.
    """

    ref: ModelRef
    key: str
    kind: Kind = "chat"

    @classmethod
    def of(cls, ref: ModelRef, kind: Kind = "chat") -> ModelInput:
        """Return the input for a resolved model, keyed by its files' content."""
        return cls(ref, fingerprint(ref.path), kind)

    @classmethod
    def in_folder(cls, path: str | Path | UPath, key: str, dtype: str = "auto") -> ModelInput:
        """Return the input for a checkpoint inside an artefact with this key."""
        folder = UPath(path)
        text = str(Path(str(folder)).absolute()) if is_local(folder) else str(folder)
        return cls(ModelRef(text, text, dtype=dtype), key)


class Shelf:
    """Room for one loaded model; the old one leaves before the new one is loaded."""

    def __init__(self) -> None:
        self._held: tuple[ModelInput, str] | None = None
        self._loaded: tuple[Any, Any] = (None, None)

    def load(self, wanted: ModelInput, device: str) -> tuple[Any, Any]:
        """Return (model, tokenizer); callers must not change the model."""
        if self._held != (wanted, device):
            self.clear()
            ref, kind = wanted.ref.on_this_machine(), wanted.kind
            trust = ref.trust_remote_code
            model = load_model(
                ref.path,
                dtype=ref.dtype,
                device=device,
                trust_remote_code=trust,
                classifier=kind == "classifier",
            )
            tokenizer = load_tokenizer(ref.path, trust_remote_code=trust, chat=kind == "chat")
            self._loaded = model, tokenizer
            self._held = wanted, device
        return self._loaded

    def clear(self) -> None:
        """Give the held model's memory back."""
        import torch

        self._held, self._loaded = None, (None, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@functools.cache
def shelf() -> Shelf:
    """Return this process's shelf."""
    return Shelf()
