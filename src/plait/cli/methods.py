"""`plait methods`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from plait.methods.base import Method


def methods(
    name: Annotated[str | None, typer.Argument(help="Describe one method.", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """List the merge methods, or describe one: paper, equation, parameters, spaces, exactness."""
    from plait.cli.console import print_json
    from plait.methods import METHODS

    if name is not None:
        described = describe(METHODS[name])
        print_json(described) if json else _show(described)
    elif json:
        print_json({"methods": [describe(m) for m in METHODS.values()]})
    else:
        _list()


def describe(method: Method) -> dict[str, Any]:
    """Return everything the registry knows of a method."""
    schema = method.params.model_json_schema()
    parameters = [
        {
            "name": key,
            "default": field.get("default"),
            "required": key in schema.get("required", []),
            "allowed": _allowed(field),
            "description": field.get("description", ""),
        }
        for key, field in schema.get("properties", {}).items()
    ]
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
        "min_adapters": method.min_adapters,
        "max_adapters": method.max_adapters,
        "parameters": parameters,
    }


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


def _allowed(field: dict[str, Any]) -> str:
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if "anyOf" in field:
        return " | ".join(_allowed(option) for option in field["anyOf"])
    bounds = [
        f"{sign} {field[key]:g}"
        for key, sign in (("exclusiveMinimum", ">"), ("minimum", "≥"), ("exclusiveMaximum", "<"), ("maximum", "≤"))
        if key in field
    ]
    kind = {"number": "number", "boolean": "true | false", "null": "none"}.get(field.get("type", ""), field.get("type", ""))
    return " ".join([kind, *bounds])


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
    out().print("\n`plait methods NAME` describes one: equation, paper, parameters.", style="dim")


def _show(described: dict[str, Any]) -> None:
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
    ]
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    for key, value in rows:
        facts.add_row(key, value)
    for i, (space, words) in enumerate(described["exactness"].items()):
        facts.add_row("in space" if i == 0 else "", f"{space}: {words}")
    console.print(facts)
    if described["parameters"]:
        table = Table(box=None, header_style="bold", pad_edge=False, title_justify="left")
        for column in ("parameter", "default", "allowed", "meaning"):
            table.add_column(column, no_wrap=column == "parameter")
        for p in described["parameters"]:
            default = "required" if p["required"] else "–" if p["default"] is None else str(p["default"])
            table.add_row(p["name"], default, p["allowed"], p["description"])
        console.print()
        console.print(table)
