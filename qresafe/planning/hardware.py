"""Devices and clusters: what there is to compute on, and what it costs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from qresafe.errors import SpecError, nearest
from qresafe.loading import read_yaml

FILE = Path(__file__).with_name("hardware.yaml")
GIB, MIB = 2**30, 2**20
PROCESS = 0.5 * GIB  # of a process with torch and transformers, before it has a model
WRITTEN = re.compile(r"(?:(?P<nodes>\d+)x)?(?P<each>\d+)x(?P<kind>[A-Za-z][\w-]*)")


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Gpu(_Closed):
    """One kind of GPU; hardware.yaml says what each figure is."""

    memory_gib: float
    tflops: float
    bandwidth_gbs: float
    host_gib: float
    price_per_hour: float


class Core(_Closed):
    """A core of a CPU machine."""

    tflops: float
    bandwidth_gbs: float
    price_per_hour: float


class Hardware(_Closed):
    """hardware.yaml."""

    as_of: str
    gpus: dict[str, Gpu]
    cpu: Core
    reserve_gib: float


@dataclass(frozen=True)
class Cluster:
    """What an experiment runs on.

    Attributes:
        text: As written, e.g. "4xA100-40".
        device: "gpu" or "cpu".
        count: Devices: GPUs, or processes on one CPU machine.
        memory: Bytes that one device has for us.
        host: Bytes of host memory per GPU; 0: not known.
        tflops: Of one device.
        bandwidth: Bytes per second of one device.
        price: USD per device and hour.
    """

    text: str
    device: Literal["gpu", "cpu"]
    count: int
    memory: float
    host: float
    tflops: float
    bandwidth: float
    price: float


@cache
def hardware(path: Path = FILE) -> Hardware:
    """Return a hardware file.

    Raises:
        SpecError: It is missing or malformed.
    """
    try:
        data = read_yaml(path.read_text("utf-8"))
        return Hardware.model_validate(data | {"as_of": str(data["as_of"])})
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        what = " ".join(str(error).split())
        raise SpecError(f"no usable hardware file ({what})", where=str(path)) from None


def parse_cluster(text: str, known: Hardware | None = None) -> Cluster:
    """Return the cluster that "4xA100-40" or "2x8xH100-80" (nodes x GPUs x kind) stands for.

    Raises:
        SpecError: It is written otherwise, or the kind of GPU is not known.
    """
    known = known or hardware()
    found = WRITTEN.fullmatch(text.strip())
    if found is None or not int(found["each"]) or found["nodes"] == "0":
        remedy = "write COUNTxKIND such as 4xA100-40, or NODESxCOUNTxKIND"
        raise SpecError(f"{text!r} is no cluster", where="--cluster", remedy=remedy)
    kind = _kind(found["kind"], known)
    return gpu_cluster(kind, int(found["nodes"] or 1) * int(found["each"]), known, text=text)


def gpu_cluster(
    kind: str, count: int, known: Hardware, text: str = "", memory: float | None = None
) -> Cluster:
    """Return `count` GPUs of a kind; `memory` in bytes, where it was read from the device."""
    gpu = known.gpus[kind]
    seen = gpu.memory_gib * GIB if memory is None else memory
    return Cluster(
        text=text or f"{count}x{kind}",
        device="gpu",
        count=count,
        memory=seen - known.reserve_gib * GIB,
        host=gpu.host_gib * GIB,
        tflops=gpu.tflops,
        bandwidth=gpu.bandwidth_gbs * 1e9,
        price=gpu.price_per_hour,
    )


def cpu_cluster(workers: int, memory: float, cores: float = 1.0) -> Cluster:
    """Return one machine without GPUs whose processes share its memory.

    Args:
        workers: Processes that compute at a time.
        memory: Of the machine, bytes.
        cores: Of each process.
    """
    core = hardware().cpu
    return Cluster(
        text=f"{workers} process(es) on this machine's CPUs",
        device="cpu",
        count=workers,
        memory=memory / workers - PROCESS,
        host=0.0,
        tflops=core.tflops * cores,
        bandwidth=core.bandwidth_gbs * 1e9,
        price=core.price_per_hour * cores,
    )


def nearest_kind(name: str, memory: float, known: Hardware | None = None) -> str | None:
    """Return the kind that a device's own name (as torch tells it) and memory belong to."""
    known = known or hardware()
    family = re.findall(r"[A-Z]+\d+[A-Z]*|\d{4}", name.upper())
    close = [
        kind
        for kind, gpu in known.gpus.items()
        if any(part in kind.upper().split("-")[0] for part in family)
        and abs(gpu.memory_gib * GIB - memory) < 0.1 * memory
    ]
    return close[0] if close else None


def _kind(written: str, known: Hardware) -> str:
    for kind in known.gpus:
        if written.lower() == kind.lower():
            return kind
    remedy = nearest(written, known.gpus)
    raise SpecError(f"unknown GPU {written!r}", where="--cluster", remedy=remedy)
