"""What may import what, how long things may grow, and what must never be written here."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = sorted([*(ROOT / "qresafe").rglob("*.py"), *(ROOT / "ray_jobs").rglob("*.py")])
BENCH = sorted((ROOT / "bench").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# From the bottom up: a unit may import itself, what stands below it, and its neighbours in a row
# where the row says so. A unit is a package or a module of `qresafe`.
LEAVES = {"errors", "registry", "records", "specs", "loading", "artifacts", "progress", "presets"}
LEAVES |= {
    "leftovers",
    "redaction",
    "failure",
    "memory",
    "progress_file",
    "driving",
    "metrics",
    "process_log",
    "driver_lock",
    "integrity",
    "patience",
    "storage",
    "jsonl",
    "qresafe",
    "chat",
    "judge_specs",
    "spec_base",
    "spec_words",
    "quantize_specs",
    "signing",
}
LEAVES |= {"storage", "jsonl", "qresafe", "search_space", "search_spec", "variants", "provenance"}
ROWS: list[set[str]] = [
    LEAVES,
    {"core"},
    {"embedded", "hf"},
    {"quantizers", "benchmarks", "judges"},
    {"stages"},
    {"planning"},
    {"dist"},
    {"cli", "commands", "console", "ray_jobs"},
]
MAY_IMPORT_NEIGHBOURS = [LEAVES, {"embedded", "hf"}, ROWS[-1]]

# Library -> the only units that may import it, at any depth of the code.
OWNERS = {
    "ray": {"dist"},
    "deepspeed": {"dist"},
    "transformers": {"hf", "embedded"},
    "peft": {"hf"},
    "trl": {"hf"},
    "bitsandbytes": {"hf"},
    "compressed_tensors": {"hf"},
    "datasets": {"hf"},
    "optuna": {"stages"},
    "llmcompressor": {"hf"},
    "aqlm": {"hf"},
    "gguf": {"hf"},
    "lm_eval": {"hf"},
    "openai": {"chat"},
    "cryptography": {"signing"},
    "sklearn": {"judges"},
    "typer": {"cli", "commands", "ray_jobs"},
    "rich": {"console"},
}
NEVER_IMPORTED = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def unit(path: Path) -> str:
    """Return the unit that a file belongs to, such as "core", "specs" or "ray_jobs"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] != "qresafe":
        return parts[0]
    return "qresafe" if parts[1] == "__init__" else parts[1]


def unit_of(module: str) -> str:
    """Return the unit of a dotted module of this project."""
    parts = module.split(".")
    return parts[1] if parts[0] == "qresafe" and len(parts) > 1 else parts[0]


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports anywhere but for type checkers alone."""
    for node in runtime_nodes(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "qresafe":
            yield from (f"qresafe.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield node.module or ""


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield from runtime_nodes(child)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def row(of: str) -> int:
    return next(index for index, names in enumerate(ROWS) if of in names)


def allowed(importer: str, imported: str) -> bool:
    if importer == imported or row(imported) < row(importer):
        return True
    return any({importer, imported} <= neighbours for neighbours in MAY_IMPORT_NEIGHBOURS)


# ---------------------------------------------------------------- imports


def test_every_file_has_a_place_in_the_order() -> None:
    placed = set().union(*ROWS)
    assert {unit(path) for path in PROGRAM} <= placed, "give new units a row, and say so in docs"


def test_imports_go_downwards() -> None:
    upward = [
        f"{name(path)} imports {module}"
        for path in PROGRAM
        for module in imports(path)
        if module.split(".")[0] in {"qresafe", "ray_jobs"}
        and unit_of(module) in set().union(*ROWS)
        and not allowed(unit(path), unit_of(module))
    ]
    assert upward == []


def test_the_order_itself_is_strict() -> None:
    assert allowed("stages", "core")
    assert not allowed("core", "stages")
    assert not allowed("quantizers", "judges")
    assert not allowed("specs", "core")
    assert allowed("hf", "embedded")


def test_libraries_have_one_home() -> None:
    strays = [
        f"{name(path)} imports {module}"
        for path in PROGRAM
        for module in imports(path)
        if unit(path) not in OWNERS.get(module.split(".")[0], {unit(path)})
    ]
    assert strays == []


def test_leaves_need_no_torch_and_core_nothing_but_torch() -> None:
    leaves = [p for p in PROGRAM if unit(p) in LEAVES]
    heavy = [f"{name(p)}: {m}" for p in leaves for m in imports(p) if m.split(".")[0] == "torch"]
    assert heavy == []
    outside = {
        module.split(".")[0] for path in PROGRAM if unit(path) == "core" for module in imports(path)
    } - {"torch", "qresafe", "numpy", "__future__"}
    assert outside <= set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    "statement",
    [
        "import qresafe.core, qresafe.specs",
        "import qresafe.cli, qresafe.loading, qresafe.artifacts",
        "import qresafe.stages.runtime, qresafe.stages.statistics",
    ],
)
def test_heavy_libraries_stay_out(statement: str) -> None:
    banned = ["ray", "deepspeed", "transformers", "peft", "trl", "datasets", "bitsandbytes"]
    code = f"{statement}\nimport sys\nprint([m for m in {banned} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.strip() == "[]", found.stderr


def test_all_of_core_imports_without_the_libraries_of_other_layers() -> None:
    modules = ", ".join(
        ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in PROGRAM if unit(p) == "core"
    )
    test_heavy_libraries_stay_out(f"import {modules}")


def test_no_file_shadows_a_library_when_its_folder_comes_first_on_the_path() -> None:
    libraries = {"datasets", "trl", "tune", "train", "data", "ray", "torch", "evaluate", "peft"}
    libraries |= {"transformers", "accelerate", "optuna", "wandb"} | set(sys.stdlib_module_names)
    scripts = [*(ROOT / "ray_jobs").glob("*.py"), *BENCH]
    assert [name(p) for p in scripts if p.stem in libraries] == []
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert folders & libraries == set()


# ---------------------------------------------------------------- size


@pytest.mark.parametrize("path", [*PROGRAM, *BENCH, *TESTS], ids=name)
def test_no_file_and_no_function_is_too_long(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= 400, f"{name(path)} has {lines} lines: one idea per file"
    for node in ast.walk(tree(path)):
        if isinstance(node, Function):
            length = code_lines(node)
            assert length <= 60, f"{name(path)}: {node.name} has {length} lines"


def code_lines(function: Function) -> int:
    """Return a function's lines but its docstring's, which may take the room that it needs."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def test_most_files_are_short() -> None:
    lengths = [len(p.read_text().splitlines()) for p in PROGRAM if p.name != "__init__.py"]
    assert statistics.median(lengths) <= 150


# ---------------------------------------------------------------- never


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def given(call: ast.Call, keyword: str) -> str | None:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == keyword), None)


@pytest.mark.parametrize("path", [*PROGRAM, *BENCH], ids=name)
def test_no_file_of_a_user_is_ever_executed(path: Path) -> None:
    assert not {module.split(".")[0] for module in imports(path)} & NEVER_IMPORTED
    for function, call in calls(path):
        where = f"{name(path)}:{call.lineno}"
        assert function not in {"eval", "exec", "compile", "os.system", "os.popen"}, where
        assert function not in {"yaml.load", "yaml.unsafe_load", "yaml.full_load"}, where
        # An archive's members may lead out of the folder, or be links.
        assert function.rpartition(".")[2] not in {"extractall", "unpack_archive"}, where
        assert given(call, "Loader") in {None, "yaml.SafeLoader"}, where
        assert given(call, "trust_remote_code") != "True", where
        assert given(call, "allow_pickle") != "True", where
        assert given(call, "shell") != "True", where
        if function == "torch.load":
            assert given(call, "weights_only") == "True", f"{where}: weights_only=True"


def test_trust_remote_code_is_off_by_default() -> None:
    defaults = [
        (name(path), ast.unparse(default))
        for path in PROGRAM
        for node in ast.walk(tree(path))
        if isinstance(node, Function)
        for argument, default in defaults_of(node)
        if argument == "trust_remote_code"
    ]
    assert [found for found in defaults if found[1] != "False"] == []


def defaults_of(function: Function) -> Iterator[tuple[str, ast.expr]]:
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    paired = [*zip(reversed(positional), reversed(given.defaults), strict=False)]
    paired += zip(given.kwonlyargs, given.kw_defaults, strict=True)
    return ((argument.arg, default) for argument, default in paired if default is not None)


# ---------------------------------------------------------------- docs


@pytest.mark.parametrize("path", PROGRAM, ids=name)
def test_whatever_is_public_says_what_it_is(path: Path) -> None:
    module = tree(path)
    assert ast.get_docstring(module) or path.read_text() == "", f"{name(path)} has no docstring"
    silent = [
        node.name
        for node in module.body
        if isinstance(node, Function | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert silent == [], f"{name(path)}: public, without a docstring"


def test_the_readme_lists_every_file_by_its_own_first_line() -> None:
    told = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "file_map.py"), "--check"], capture_output=True
    )
    assert told.returncode == 0, "run python docs/file_map.py"


def test_pytest_collects_every_test_file(pytestconfig: pytest.Config) -> None:
    """Pytest skips folders called dist or build unless it is told not to."""
    skipped = pytestconfig.getini("norecursedirs")
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    names = {part for folder in folders for part in folder.relative_to(ROOT).parts}
    assert "dist" in names  # skipped by default
    assert [n for n in sorted(names) if any(fnmatch(n, pattern) for pattern in skipped)] == []
