"""Names to implementations, imported only when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from qresafe.errors import SpecError, nearest


class Registry:
    """A closed set of names, each standing for `module:attribute`.

    Args:
        kind: What the names are, for error messages ("judge", "quantizer").
        entries: name -> "package.module:attribute".
    """

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind, self._entries = kind, dict(entries)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._entries))

    def get(self, name: str) -> Any:
        """Import and return what `name` stands for.

        Raises:
            SpecError: `name` is not registered; the message offers the nearest names.
        """
        if name not in self._entries:
            raise SpecError(f"unknown {self.kind} {name!r}", remedy=nearest(name, self._entries))
        module, attribute = self._entries[name].split(":")
        return getattr(importlib.import_module(module), attribute)


# Each is a file of qresafe/quantizers/, with `quantize` and `planned`.
METHODS = (
    *("rtn", "bnb", "llm_qat", "gptq", "awq"),
    *("fp8", "qlora", "critical16", "checkpoint", "aqlm"),
)
quantizers = Registry("quantizer", {n: f"qresafe.quantizers.{n}:quantize" for n in METHODS})
# (model folder, spec) -> the layers that `quantize` would, or the user's mistake, before any work.
planned_layers = Registry("quantizer", {n: f"qresafe.quantizers.{n}:planned" for n in METHODS})

# `quant_method` in a checkpoint's config -> what makes the codec that reads and rewrites it.
formats = Registry(
    "quantization format",
    {
        "compressed-tensors": "qresafe.hf.formats.compressed_tensors:CompressedTensors",
        "bitsandbytes": "qresafe.hf.formats.bitsandbytes:codec",
        "gptq": "qresafe.hf.formats.gptq:Gptq",
        "awq": "qresafe.hf.formats.awq:Awq",
        "fp8": "qresafe.hf.formats.fp8:codec",
        "gguf": "qresafe.hf.formats.gguf:codec",
        "aqlm": "qresafe.hf.formats.aqlm:Aqlm",
    },
)

engines = Registry(
    "engine",
    {
        "transformers": "qresafe.stages.engines:TransformersJob",
        "vllm": "qresafe.stages.engines:VllmJob",
        "openai": "qresafe.stages.endpoint:EndpointJob",
    },
)

judges = Registry(
    "judge",
    {
        "keyword": "qresafe.judges.keyword:judge",
        "refusal": "qresafe.judges.refusal:judge",
    },
)

# The public prompt sets that benchmarks/catalogue.yaml describes.
CATALOGUED = (
    *("advbench", "ailuminate", "alpaca_eval", "harmbench", "hex_phi", "ifeval"),
    *("jailbreakbench", "malicious_instruct", "mt_bench", "or_bench", "sorry_bench"),
    *("strongreject", "ultrachat", "ultrafeedback", "xstest"),
)
benchmarks = Registry(
    "benchmark",
    {
        "embedded": "qresafe.benchmarks.embedded:load",
        "prompts": "qresafe.benchmarks.prompts:load",
        **dict.fromkeys(CATALOGUED, "qresafe.benchmarks.catalogue:load"),
    },
)
