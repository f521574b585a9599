"""`plait methods`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.options import Json

if TYPE_CHECKING:
    from plait.methods.base import Method
    from plait.stages import Pipeline, StageParams


def methods(
    name: Annotated[str | None, typer.Argument(help="Describe one method (or stage).", show_default=False)] = None,
    stages: Annotated[bool, typer.Option("--stages", help="The stages that methods are made of, not the methods.")] = False,
    json: Json = False,
) -> None:
    """List the merge methods, or describe one: paper, equation, parameters, spaces, exactness, its pipeline.

    Example: plait methods ties

    Example: plait methods --stages trim
    """
    from plait.cli.console import print_json
    from plait.errors import PlanError
    from plait.methods import METHODS
    from plait.stages import STAGES

    if stages:
        _stages(name, json=json)
    elif name is not None:
        if name in STAGES and name not in METHODS:
            raise PlanError(f"{name!r} is a stage, not a method; `plait methods --stages {name}` describes it.")
        described = describe(METHODS[name])
        print_json(described) if json else _show(described)
    elif json:
        print_json({"methods": [describe(m) for m in METHODS.values()]})
    else:
        _list()


def _stages(name: str | None, *, json: bool) -> None:
    from plait.cli.console import print_json
    from plait.errors import PlanError, did_you_mean
    from plait.stages import STAGES

    if name is not None and name not in STAGES:
        raise PlanError(f"stage {name!r} is not known.{did_you_mean(name, STAGES)} Known: {', '.join(STAGES)}.")
    if name is not None:
        described = describe_stage(STAGES[name])
        print_json(described) if json else _show_stage(described)
    elif json:
        print_json({"stages": [describe_stage(stage) for stage in STAGES.values()]})
    else:
        _list_stages()


def describe_stage(stage: type[StageParams]) -> dict[str, Any]:
    """Return what the registry knows of a stage: its name, its place in a pipeline, what it does, its parameters."""
    from plait.recipes.keys import parameters
    from plait.stages import place_of

    return {
        "name": stage.spelled(),
        "place": place_of(stage),
        "summary": " ".join((stage.__doc__ or "").partition("\n\n")[0].split()),
        "parameters": [p for p in parameters(stage) if p["name"] != "name"],
    }


def describe(method: Method) -> dict[str, Any]:
    """Return everything the registry knows of a method."""
    from plait.recipes.keys import parameters

    pipeline = _default_pipeline(method)
    return {
        "name": method.name,
        "summary": method.summary,
        "equation": method.equation,
        "source": method.source.title,
        "url": method.source.url,
        "deviation": method.deviation,
        "spaces": list(method.spaces),
        "kind": method.kind,
        "exactness": exactness(method),
        "randomised": method.randomised,
        "needs_moments": pipeline is not None and pipeline.needs_moments,
        "min_adapters": method.min_adapters,
        "max_adapters": method.max_adapters,
        "pipeline": None if pipeline is None else " → ".join(_with_parameters(stage) for stage in pipeline.stages),
        "spelled": None if pipeline is None else spelled(pipeline),
        "parameters": parameters(method.params),
    }


def _default_pipeline(method: Method) -> Pipeline | None:
    """Return the stages of a method by default; None where a parameter without a default decides."""
    from pydantic import ValidationError

    try:
        return method.pipeline(method.spec.model_validate({"name": method.name}))
    except ValidationError:
        return None


def _with_parameters(stage: Any) -> str:
    from plait.stages import StageParams

    if not isinstance(stage, StageParams):
        return str(stage)
    values = stage.model_dump(mode="json", by_alias=True, exclude={"name"})
    return stage.spelled() + (f"({', '.join(f'{k}={_flow(v)}' for k, v in values.items())})" if values else "")


def spelled(pipeline: Pipeline) -> dict[str, Any] | None:
    """Return a pipeline as a recipe spells it under `method`; None where a stage has no name there."""
    from plait.stages import StageParams

    if not all(isinstance(stage, StageParams) for stage in pipeline.stages):
        return None

    def stage(params: Any) -> Any:
        parameters = params.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        return {"name": params.spelled(), **parameters} if parameters else params.spelled()

    parts = {
        "pre": [stage(s) for s in pipeline.pre],
        "combine": stage(pipeline.combine),
        "post": [stage(s) for s in pipeline.post],
    }
    return {key: part for key, part in parts.items() if part}


def exactness(method: Method) -> dict[str, str]:
    """Return what the result is in each space."""
    from plait.spaces import SPACES

    words = {}
    for space in method.spaces:
        if space == "factors":
            words[space] = "as PEFT; rank r"
        elif method.auto_rank == "largest":
            words[space] = "truncated to the largest source rank"
        elif method.kind != "entries" or SPACES[space].low_rank:
            words[space] = "exact; rank up to Σ r"
        else:
            words[space] = "dense; truncated to min(T · r, 256) by default"
    return words


def _list() -> None:
    from rich.table import Table

    from plait.cli.console import out
    from plait.methods import METHODS

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("what it does")
    table.add_column("spaces")
    for method in METHODS.values():
        table.add_row(method.name, method.summary, " ".join(method.spaces))
    out().print(table)
    out().print("\n`plait methods NAME` describes one; `plait methods --stages` lists what they are made of.", style="dim")


def _list_stages() -> None:
    from rich.table import Table

    from plait.cli.console import out
    from plait.stages import STAGES

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("place", "stage", "what it does", "parameters"):
        table.add_column(column, no_wrap=column in ("place", "stage"))
    rows = [describe_stage(stage) for stage in STAGES.values()]
    for row in sorted(rows, key=lambda row: ("pre", "combine", "post").index(row["place"])):
        table.add_row(row["place"], row["name"], row["summary"], " ".join(p["name"] for p in row["parameters"]))
    out().print(table)
    note = "\nA recipe spells them: method: {pre: [trim], combine: elect, post: [norm_match], space: core}. "
    out().print(note + "`plait methods --stages NAME` describes one.", style="dim", markup=False)


def _show_stage(described: dict[str, Any]) -> None:
    from plait.cli.console import out

    out().print(f"[bold]{described['name']}[/bold]  (under '{described['place']}')", highlight=False)
    out().print(described["summary"], markup=False)
    _show_parameters(described["parameters"])


def _show(described: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from plait.cli.console import out

    console = out()
    console.print(f"[bold]{described['name']}[/bold]  {described['summary']}\n")
    most = described["max_adapters"]
    adapters = f"{described['min_adapters']}" + (
        " or more" if most is None else "" if most == described["min_adapters"] else f" to {most}"
    )
    rows = [
        ("equation", described["equation"]),
        ("source", described["source"] + (f"  {described['url']}" if described["url"] else "")),
        ("differs", described["deviation"] or "in nothing"),
        ("adapters", adapters),
        ("random", "yes, keyed by (seed, adapter, module, position)" if described["randomised"] else "no"),
        ("pipeline", described["pipeline"] or "set by the parameters"),
        *([("in a recipe", f"method: {_flow(described['spelled'])}")] if described["spelled"] else []),
    ]
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    for key, value in rows:
        facts.add_row(key, escape(value))
    for i, (space, words) in enumerate(described["exactness"].items()):
        facts.add_row("in space" if i == 0 else "", f"{space}: {words}")
    console.print(facts)
    _show_parameters(described["parameters"])


def _flow(value: Any) -> str:
    from plait.recipes.problems import spell_value

    return spell_value(value)


def _show_parameters(parameters: list[dict[str, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from plait.cli.console import out

    if not parameters:
        return
    table = Table(box=None, header_style="bold", pad_edge=False, title_justify="left")
    for column in ("parameter", "default", "allowed", "meaning"):
        table.add_column(column, no_wrap=column == "parameter")
    for p in parameters:
        default = "required" if p["required"] else "–" if p["default"] is None else escape(_flow(p["default"]))
        table.add_row(p["name"], default, p["allowed"], p["description"])
    out().print()
    out().print(table)
