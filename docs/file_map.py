"""Writes the README's list of files: one line each, the first line of its docstring.

python docs/file_map.py            # between the markers in README.md
python docs/file_map.py --check    # exit code 1 if that would change it
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- files: made by docs/file_map.py -->", "<!-- end of files -->"
PARTS = {
    "qresafe/core": "the paper, readable beside it (torch only)",
    "qresafe": "specs, records, artefacts: no torch, no ray",
    "qresafe/hf": "the only place with peft, trl, bitsandbytes, compressed-tensors, datasets",
    "qresafe/embedded": "the small chat model of our own",
    "qresafe/quantizers": "one file per method",
    "qresafe/benchmarks": "one file per prompt set",
    "qresafe/judges": "one file per judge",
    "qresafe/stages": "W → Q0 → pairs → patch → export → compare → report, plain Python",
    "qresafe/stages/search": "the parts of a search that need no Ray",
    "qresafe/dist": "the only place with ray and deepspeed",
    "qresafe/commands": "what `qresafe` can be told to do",
    "ray_jobs": "entry points for `ray job submit`",
    "bench": "speed and results, as commands",
}


def file_lines(folder: str) -> list[str]:
    """Return a Markdown list item for each Python file directly in `folder`."""
    listed = subprocess.run(
        ["git", "ls-files", f"{folder}/*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    paths = [ROOT / name for name in listed if Path(name).parent == Path(folder)]
    found = {path.name: ast.get_docstring(ast.parse(path.read_text())) for path in paths}
    return [f"- `{name}` {text.splitlines()[0]}" for name, text in found.items() if text]


def file_map() -> str:
    """Return the whole list, part by part."""
    chapters = []
    for folder, what in PARTS.items():
        lines = file_lines(folder)
        if folder == "qresafe/hf":
            nested = file_lines("qresafe/hf/formats")
            lines += [line.replace("- `", "- `formats/") for line in nested]
        chapters.append("\n".join([f"**{folder}/**: {what}", *lines]))
    return "\n\n".join(chapters)


def main() -> None:
    """Replace what stands between the markers in README.md."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    wanted = f"{before}{BEGIN}\n{file_map()}\n{END}{after}"
    if "--check" in sys.argv:
        sys.exit(text != wanted)
    readme.write_text(wanted)


if __name__ == "__main__":
    main()
