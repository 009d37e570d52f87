"""What a spec says of the things that a patch's memory depends on."""

from __future__ import annotations

from typing import Any

from qresafe.planning.memory import Patching
from qresafe.quantize_specs import AqlmSpec, BnbSpec
from qresafe.specs import PatchSpec


def code_bits(spec: Any) -> float:
    """Return the bits per weight of a quantizer's codes; 8 where only its files would tell."""
    if (base := getattr(spec, "base", None)) is not None:
        return code_bits(base)
    if isinstance(spec, AqlmSpec):
        return spec.codebooks * spec.codebook_bits / spec.group_size
    if isinstance(spec, BnbSpec):
        return 8 if spec.format == "int8" else 4
    return float(getattr(spec, "bits", 8))


def patching(
    spec: PatchSpec,
    workers: int,
    group_size: int,
    device: Any,
    *,
    bits: float,
    distributed: bool,
) -> Patching:
    """Return the settings of a patch that its memory depends on."""
    plain = spec.method != "masked_lora"  # an adapter beside frozen weights, or these themselves
    return Patching(
        rank=spec.rank,
        on="factors" if plain else spec.mask.on,
        through_grid=spec.through_grid and not plain,
        group_size=group_size,
        bits=8 if plain else bits,
        accumulates=spec.batch_size > spec.micro_batch_size * workers,
        remasks=spec.mask.remask_every > 0,
        snip=spec.scores_by_gradient,
        checkpointing=spec.gradient_checkpointing,
        zero_stage=spec.zero_stage if distributed else 0,
        world_size=workers,
        device=device,
        latent=spec.start == "latent",
        trains="weights" if spec.updates == "full" else spec.trains,
        offload=spec.offload if distributed else "none",
    )
