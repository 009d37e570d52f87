"""`qresafe doctor`: what would stop a run later, found in seconds, each with its remedy."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from upath import UPath

import qresafe
from qresafe.artifacts import is_local, write_text
from qresafe.memory import free_memory
from qresafe.specs import ExperimentSpec

GIB = 2**30
MEMORY_WANTED = 8 * GIB  # the demo's peak, Ray's processes included, with room to spare
DISK_WANTED = 5 * GIB
DISK_NEEDED = 1 * GIB  # below it not even the demo fits

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One finding; `remedy` is empty when there is nothing to do."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def checks(spec: ExperimentSpec, working_dir: Path, *, ray: bool = True) -> Iterator[Check]:
    """Examine the machine for `spec`, yielding each finding as it is made.

    Args:
        spec: The experiment that is to run: its storage and resources are examined.
        working_dir: The folder that `ray job submit --working-dir` would upload.
        ray: Also look from inside a Ray worker, which starts Ray or joins `resources.address`.
    """
    examine: list[Callable[[], Check]] = [
        python_version,
        package_versions,
        datasets_origin,
        lambda: gpus(spec.resources.workers * spec.resources.gpus_per_worker),
        memory,
        lambda: disk(spec.storage),
        lambda: storage_here(spec.storage),
        compiler,
        hub_token,
    ]
    if ray:
        from qresafe.dist import preflight_ray

        examine += [
            preflight_ray.authentication,
            lambda: preflight_ray.upload_size(working_dir),
            lambda: preflight_ray.storage_from_worker(spec.storage, spec.resources.address),
        ]
    for check in examine:
        yield check()


def python_version() -> Check:
    """Python 3.11 is what the lock was resolved for."""
    detail = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] == (3, 11):
        return Check("python", "ok", detail)
    return Check("python", "fail", detail, "make the environment with Python 3.11: make install")


def package_versions() -> Check:
    """Installed versions against the exact pins of the lock (or of the installed package)."""
    pins = list(_pins())
    wrong = [text for pin in pins if (text := _mismatch(pin))]
    if not wrong:
        return Check("packages", "ok", f"{len(pins)} as pinned")
    detail = f"{len(wrong)} of {len(pins)} differ: {', '.join(wrong[:6])}"
    remedy = "make install (or pip install -r requirements.lock)"
    return Check(
        "packages", "fail" if any("missing" in w for w in wrong) else "warn", detail, remedy
    )


def _pins() -> Iterator[Requirement]:
    lock = Path(qresafe.__file__).parents[1] / "requirements.lock"
    if lock.is_file():
        lines = lock.read_text().splitlines()
    else:
        lines = importlib.metadata.requires("qresafe") or []
    return (Requirement(line) for line in lines if line.strip() and not line.startswith("#"))


def _mismatch(pin: Requirement) -> str:
    try:
        found = importlib.metadata.version(pin.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{pin.name} missing"
    return "" if pin.specifier.contains(found) else f"{pin.name} {found} (want {pin.specifier})"


def datasets_origin() -> Check:
    """A file or folder named `datasets` beside the code would shadow the library."""
    found = importlib.util.find_spec("datasets")
    place = found.origin if found else None
    if found is None:
        return Check("datasets", "fail", "not installed", "make install")
    if place and {"site-packages", "dist-packages"} & set(Path(place).parts):
        return Check("datasets", "ok", place)
    origin = place or ", ".join(found.submodule_search_locations or ())
    remedy = "rename it, or start jobs with `python -m ray_jobs.<name>` instead of a file's path"
    return Check("datasets", "fail", f"the library is shadowed by {origin}", remedy)


def gpus(wanted: float) -> Check:
    """The GPUs that torch sees, against what the experiment asks for.

    Args:
        wanted: How many the experiment asks for, over all workers.
    """
    import torch

    count = torch.cuda.device_count()
    found = [torch.cuda.get_device_properties(i) for i in range(count)]
    detail = ", ".join(f"{p.name} {p.total_memory / GIB:.0f} GiB" for p in found) or "none"
    if wanted > count:
        remedy = "run it on a cluster that has them, or --set resources.gpus_per_worker=0"
        return Check("gpus", "warn", f"{detail} here, {wanted:g} asked for", remedy)
    if not count and shutil.which("nvidia-smi"):
        remedy = "install the CUDA build of torch: pip install torch==2.13.0"
        return Check("gpus", "warn", f"torch {torch.__version__} sees no GPU", remedy)
    return Check("gpus", "ok", detail)


def memory() -> Check:
    """Free memory, within the container's limit where there is one."""
    free = free_memory()
    detail = f"{free / GIB:.1f} GiB free, {os.cpu_count()} CPUs"
    if free >= MEMORY_WANTED:
        return Check("memory", "ok", detail)
    remedy = "end other programs, or run without Ray: --workers 0"
    return Check("memory", "warn", f"{detail}; the demo on Ray wants 8 GiB", remedy)


def disk(storage: str) -> Check:
    """Free space where results go."""
    if not is_local(UPath(storage)):
        return Check("disk", "ok", f"{storage} is remote: its space is not known here")
    place = Path(storage).expanduser().resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    detail = f"{free / GIB:.1f} GiB free at {place}"
    remedy = "free some space, or give another --storage"
    if free < DISK_NEEDED:
        return Check("disk", "fail", detail, remedy)
    if free < DISK_WANTED:
        return Check("disk", "warn", detail, remedy)
    return Check("disk", "ok", detail)


def storage_here(storage: str) -> Check:
    """A file written to the storage can be read back."""
    probe = UPath(storage) / f".qresafe-probe-{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        write_text(probe, "written")
        found = probe.read_text()
        probe.unlink()
    except Exception as error:  # every file system of fsspec has errors of its own
        remedy = "give a --storage that you may write to, with its credentials in the environment"
        return Check("storage", "fail", f"{storage}: {error}", remedy)
    if found != "written":
        return Check("storage", "fail", f"{storage} gave back other bytes", "use another --storage")
    return Check("storage", "ok", f"{storage} writes and reads back")


def compiler() -> Check:
    """DeepSpeed and torch build small extensions with them, on GPUs above all."""
    here = Path(sys.executable).parent
    found = {
        "C compiler": next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None),
        "ninja": shutil.which("ninja") or shutil.which("ninja", path=str(here)),
    }
    missing = [name for name, path in found.items() if not path]
    if not missing:
        return Check("compiler", "ok", ", ".join(f"{name}: {path}" for name, path in found.items()))
    remedy = "apt-get install build-essential; pip install ninja"
    return Check("compiler", "warn", f"no {' and no '.join(missing)}", remedy)


def hub_token() -> Check:
    """Whether gated models (Llama) can be fetched; the token itself is never shown."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return Check("hub token", "ok", "HF_HUB_OFFLINE is set: only what is cached can be used")
    if get_token():
        return Check("hub token", "ok", "present")
    remedy = "hf auth login, or HF_TOKEN in the environment, before you use a gated model"
    return Check("hub token", "ok", "none: public and local models only", remedy)
