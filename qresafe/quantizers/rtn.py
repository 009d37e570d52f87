"""Round to nearest on the min-max grid: no data, no training, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from qresafe.core.grids import QuantizedTensor, fit_uniform
from qresafe.hf.tensor_files import TensorFiles
from qresafe.hf.writing import Scheme, refuse_infinite, write_quantized
from qresafe.progress import Progress, Silent
from qresafe.quantize_specs import RtnSpec
from qresafe.quantizers.base import CHECKPOINT, QuantizeResult, layers_to_quantize
from qresafe.storage import local_folder


class RoundedLayers(Mapping[str, QuantizedTensor]):
    """Layer name -> its weight rounded to nearest, computed when asked for."""

    def __init__(
        self, files: TensorFiles, names: list[str], scheme: Scheme, progress: Progress
    ) -> None:
        self._files, self._names, self._scheme = files, dict.fromkeys(names), scheme
        self._progress = progress

    def __getitem__(self, name: str) -> QuantizedTensor:
        if name not in self._names:
            raise KeyError(name)
        weight = self._files[f"{name}.weight"]
        refuse_infinite(name, weight)
        scheme = self._scheme
        grid = fit_uniform(weight, scheme.bits, scheme.group_size, scheme.symmetric)
        self._progress.advance()
        return QuantizedTensor(grid, grid.encode(weight))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


def quantize(
    model_path: str | Path,
    target: Path,
    spec: RtnSpec,
    *,
    control: bool = True,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Write `target/checkpoint` in compressed-tensors' format; see `Quantizer`.

    Raises:
        ModelError: A layer does not fit the group size, or holds NaN or infinity.
    """
    source = local_folder(model_path)
    names = planned(source, spec)
    scheme = Scheme(spec.bits, spec.group_size, spec.symmetric)
    shown = progress or Silent()
    shown.start("quantize", len(names), "layers")
    rounded = RoundedLayers(TensorFiles(source), names, scheme, shown)
    write_quantized(target / CHECKPOINT, source, rounded, scheme)
    return QuantizeResult({"layers": len(names)})


def planned(source: Path, spec: RtnSpec) -> list[str]:
    """Return what `quantize` would; see `registry.planned_layers`."""
    return layers_to_quantize(source, spec.skip, spec.group_size)
