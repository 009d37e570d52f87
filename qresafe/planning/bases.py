"""Q0 in the patch: its packed codes whole on every GPU, or sharded by ZeRO-3; what each takes."""

from __future__ import annotations

from dataclasses import dataclass

from qresafe.planning.hardware import GIB
from qresafe.planning.patching import code_bits
from qresafe.planning.plan import Plan, make_plan
from qresafe.specs import ExperimentSpec
from qresafe.variants import with_changes

REPLICATED, SHARDED = 2, 3  # patch.zero_stage


@dataclass(frozen=True)
class Bases:
    """The two ways for Q0 to lie on several GPUs.

    Attributes:
        bits: Of a code in memory.
        replicated: Peak of the patch with all codes on every device, bytes.
        sharded: The same with a share of them on each; every pass gathers them.
        chosen: Whether the spec shards.
        available: Bytes of one device.
    """

    bits: float
    replicated: float
    sharded: float
    chosen: bool
    available: float

    @property
    def text(self) -> str:
        """Say what is chosen, what it takes, and how to choose the other."""
        ways = [
            ("whole on every GPU", self.replicated, f"--set patch.zero_stage={REPLICATED}"),
            ("sharded over the GPUs", self.sharded, f"--set patch.zero_stage={SHARDED}"),
        ]
        (this, size, _), (that, other, option) = ways[::-1] if self.chosen else ways
        return (
            f"Q0's codes ({self.bits:g} bits) in the patch: {this}, {size / GIB:.1f} GiB at the "
            f"peak; {that} ({option}), {other / GIB:.1f}; a GPU has {self.available / GIB:.1f}."
        )


def bases(spec: ExperimentSpec, plan: Plan) -> Bases | None:
    """Return both ways for a plan; None where there is no choice: one device, or no codes."""
    if plan.cluster.count < 2 or spec.resources.workers == 0 or spec.patch.method != "masked_lora":
        return None
    peaks = {}
    for stage in (REPLICATED, SHARDED):
        changed = with_changes(spec, {"patch": {"zero_stage": stage}})
        stages = make_plan(changed, plan.shape, plan.cluster).stages
        peaks[stage] = next(each.bytes for each in stages if each.name == "patch")
    return Bases(
        code_bits(spec.quantize),
        replicated=peaks[REPLICATED],
        sharded=peaks[SHARDED],
        chosen=spec.patch.zero_stage == SHARDED,
        available=plan.cluster.memory,
    )
