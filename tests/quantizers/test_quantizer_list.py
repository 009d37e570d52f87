"""The list of quantizers names every method that a spec accepts."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter
from typer.testing import CliRunner

from qresafe.cli import app
from qresafe.quantize_specs import QuantizeSpec
from qresafe.quantizers.catalogue import catalogue
from qresafe.registry import quantizers


def test_spec_registry_and_catalogue_name_the_same_methods() -> None:
    models = TypeAdapter(QuantizeSpec).json_schema()["$defs"].values()
    accepted = {one["properties"]["method"]["const"] for one in models if is_method(one)}
    assert accepted == set(quantizers.names)
    assert accepted <= set(catalogue())


def is_method(model: dict[str, Any]) -> bool:
    return "method" in model["properties"]


def test_the_command_prints_every_entry() -> None:
    printed = CliRunner().invoke(app, ["quantizers"]).output
    assert all(name in printed for name in catalogue())
    told = json.loads(CliRunner().invoke(app, ["quantizers", "--json"]).output)
    assert told["rtn"]["patch"] == "codes and scales"
