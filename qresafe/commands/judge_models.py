"""`score`: MT-Bench and AlpacaEval, whose judges grade whole answer files instead of refusals."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qresafe.commands.options import AsJson, Name, Storage, Workers, experiment
from qresafe.commands.running import started
from qresafe.errors import SpecError
from qresafe.judge_specs import EndpointSpec
from qresafe.loading import load_spec

if TYPE_CHECKING:
    from qresafe.artifacts import Artifact
    from qresafe.specs import ExperimentSpec

app = typer.Typer(
    help="Published scores of answers by a judge model: MT-Bench, AlpacaEval.",
    no_args_is_help=True,
)

Model = Annotated[
    str | None, typer.Option("--model", help="The judge's name at the endpoint, e.g. gpt-4.")
]
Endpoint = Annotated[
    str | None,
    typer.Option(help="Base URL of an OpenAI-compatible server; the key is OPENAI_API_KEY's."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting of the judge: concurrency, retries, requests_per_minute, "
        "price_per_million_prompt, ...",
    ),
]


@app.command("mt-bench")
def mt_bench(
    answers: Annotated[
        str,
        typer.Argument(
            help="Answers in FastChat's JSONL format, or a generate stage's folder or "
            "completions.parquet, as a path or LABEL=PATH."
        ),
    ],
    questions: Annotated[Path, typer.Option(help="FastChat's question.jsonl.")],
    references: Annotated[
        Path | None,
        typer.Option(help="Reference answers to maths, reasoning and coding (gpt-4.jsonl)."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another model's answers: compare pairwise, both orders.")
    ] = None,
    model: Model = None,
    endpoint: Endpoint = None,
    settings: Settings = None,
    workers: Workers = 0,
    storage: Storage = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Grade MT-Bench answers from 1 to 10, or compare two models' answers."""
    from qresafe.artifacts import Run
    from qresafe.chat.client import check_server
    from qresafe.console import progress_on
    from qresafe.stages import mt_bench as stage
    from qresafe.stages.own_answers import answers_at

    spec = _endpoint(model, endpoint, settings)
    asked = stage.read_questions(questions, references)
    place = _place(workers, storage, name or "mt-bench")
    run = Run(place.storage, place.name)
    given = answers_at(run, answers, asked)
    other = answers_at(run, against, asked) if against else None
    check_server(spec.endpoint, spec.model, "--endpoint")
    with progress_on() as progress, closing(started(place, progress)) as runtime:
        made = stage.mt_bench(run, asked, given, other, spec, runtime, progress)
    _tell(made, made.manifest.counts["result"], as_json)


@app.command("alpaca-eval")
def alpaca_eval(
    source: Annotated[
        str,
        typer.Argument(
            help="annotations.json of alpaca_eval, or with --reference a model's outputs: JSON, or "
            "a generate stage's folder or completions.parquet, as a path or LABEL=PATH."
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option(help="The reference's outputs, likewise: SOURCE is annotated against them."),
    ] = None,
    gamed: Annotated[
        Path | None,
        typer.Option(help="alpaca_eval's df_gamed.csv, for the length-controlled win rate."),
    ] = None,
    probabilities: Annotated[
        bool, typer.Option(help="Read the probabilities of m and M, as AlpacaEval 2 does.")
    ] = True,
    model: Model = None,
    endpoint: Endpoint = None,
    settings: Settings = None,
    workers: Workers = 0,
    storage: Storage = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Compute AlpacaEval's win rate, and the length-controlled one where --gamed is given."""
    from qresafe.artifacts import Run
    from qresafe.chat.client import check_server
    from qresafe.console import progress_on
    from qresafe.stages import alpaca as stage
    from qresafe.stages.own_answers import outputs_at

    length_data = stage.read_gamed(gamed) if gamed else None
    if reference is None:
        _tell(None, stage.summarize(stage.read_annotations(Path(source)), length_data), as_json)
        return
    spec = _endpoint(model, endpoint, ["max_new_tokens=1", *(settings or [])])
    place = _place(workers, storage, name or "alpaca-eval")
    run = Run(place.storage, place.name)
    outputs, references = outputs_at(run, source), outputs_at(run, reference)
    check_server(spec.endpoint, spec.model, "--endpoint")
    with progress_on() as progress, closing(started(place, progress)) as runtime:
        made = stage.annotate(
            run, outputs, references, spec, runtime, progress, probabilities=probabilities
        )
    annotations = stage.read_annotations(made.path / stage.FILE)
    _tell(made, stage.summarize(annotations, length_data), as_json)


def _endpoint(model: str | None, endpoint: str | None, settings: list[str] | None) -> EndpointSpec:
    if not model:
        raise SpecError("no judge is named", remedy="add --model, e.g. --model gpt-4")
    return endpoint_spec(model, endpoint, settings or [])


def endpoint_spec(model: str, endpoint: str | None, settings: list[str]) -> EndpointSpec:
    """Return the judge that the options name; without --endpoint at the default one."""
    given = {"model": model} | ({"endpoint": endpoint} if endpoint else {})
    return load_spec(EndpointSpec, given, settings)


def _place(workers: int | None, storage: str | None, name: str) -> ExperimentSpec:
    return experiment(None, None, workers=workers, storage=storage, name=name)


def _tell(made: Artifact | None, result: dict[str, Any], as_json: bool) -> None:
    where = {"path": str(made.path), "usage": made.manifest.counts} if made else {}
    if as_json:
        typer.echo(json.dumps(result | where, indent=1))
        return
    for key, value in result.items():
        if isinstance(value, dict):
            shown = ", ".join(f"{name} {_number(part)}" for name, part in value.items())
        else:
            shown = _number(value)
        typer.echo(f"{key.replace('_', ' ')}: {shown}")
    if made:
        typer.echo(f"judgments: {made.path}")


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
