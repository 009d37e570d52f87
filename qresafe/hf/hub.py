"""Models of the Hugging Face hub, in its local cache: whole ones, or one .gguf file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qresafe.errors import ModelError
from qresafe.hf.gguf_folder import refuse_split

# Never *.bin or *.pt: those are pickles, and unpickling runs code.
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "tokenizer*"]
NOT_THE_MODEL = ["*/*", "consolidated*"]  # other formats of the same weights


def hub_snapshot(name: str, revision: str | None) -> tuple[Path, str]:
    """Return the folder of a model, downloaded once, and its commit.

    Raises:
        ModelError: The hub cannot be reached, or has no such model for this user.
    """
    from huggingface_hub import snapshot_download

    with _explained(name, name, revision):
        found = snapshot_download(
            name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=NOT_THE_MODEL
        )
    return Path(found), Path(found).name  # the cache names snapshots by commit


def is_hub_gguf(path: str) -> bool:
    """Return whether a path that is not here may be "owner/name/file.gguf"."""
    local = path.startswith((".", "/", "~")) or ".." in path.split("/")
    return path.endswith(".gguf") and path.count("/") > 1 and not local


def hub_gguf(path: str, revision: str | None) -> tuple[Path, str]:
    """Return the file of "owner/name/file.gguf", downloaded once, and its commit.

    Raises:
        ModelError: The hub cannot be reached, has no such file, or has it in parts.
    """
    from huggingface_hub import hf_hub_download

    owner, name, file = path.split("/", 2)
    refuse_split(Path(file))
    with _explained(f"{owner}/{name}", path, revision):
        found = Path(hf_hub_download(f"{owner}/{name}", file, revision=revision))
    return found, found.parents[file.count("/")].name


@contextmanager
def _explained(name: str, path: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import errors

    where = f"the Hugging Face hub ({path})"
    try:
        yield
    except errors.GatedRepoError:
        remedy = f"accept its licence at https://huggingface.co/{name} and set HF_TOKEN"
        raise ModelError("the model is gated", where=where, remedy=remedy) from None
    except errors.RevisionNotFoundError:
        remedy = "leave model.revision empty for the newest"
        raise ModelError(f"no revision {revision!r}", where=where, remedy=remedy) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        remedy = "check the spelling; a private or gated model also needs HF_TOKEN"
        raise ModelError(f"no model {name!r}", where=where, remedy=remedy) from None
    except errors.RemoteEntryNotFoundError:
        remedy = "check the spelling of the file"
        raise ModelError("the model has no such file", where=where, remedy=remedy) from None
    except (OSError, errors.HfHubHTTPError, errors.EntryNotFoundError):
        remedy = "connect, or copy the model here and give its folder as model.path"
        raise ModelError(
            "cannot reach the hub, and no copy is cached", where=where, remedy=remedy
        ) from None
