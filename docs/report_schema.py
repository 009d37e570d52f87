"""Write docs/report.schema.json from the model of report.json; with --check, say if it is stale."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from qresafe.stages.report_data import ReportData

PATH = Path(__file__).with_name("report.schema.json")


def schema() -> str:
    """Return the JSON schema (draft 2020-12) as text."""
    made = ReportData.model_json_schema(mode="serialization")
    about = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "qresafe report.json",
    }
    return json.dumps(about | {k: v for k, v in made.items() if k != "title"}, indent=1) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PATH.read_text() != schema())
    PATH.write_text(schema())
