"""`plait eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.options import Keys, Loading, MergeOrResult, Moments, Writing, with_options

if TYPE_CHECKING:
    from plait.commands.evaluate import Evaluated
    from plait.evaluation.comparison import Leaderboard
    from plait.evaluation.record import Bounds, Evaluation

NOT_MET = 3  # exit code: evaluated, but not good enough


@with_options("eval")
def evaluate(
    inputs: MergeOrResult,
    matrix: Annotated[bool, typer.Option("--matrix", help="Also every single adapter on every task.")] = False,
    methods: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Several, such as linear,ties,dare_ties: one leaderboard.", show_default=False),
    ] = None,
    spaces: Annotated[
        str | None, typer.Option(metavar="LIST", help="Several, such as delta,core: one leaderboard.", show_default=False)
    ] = None,
    moments: Moments = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BOUND",
            help=f"Such as worst_recovery>=0.8; also mean_recovery, below_base, TASK.recovery, TASK.metric. "
            f"Exit code {NOT_MET} when it does not hold.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the (best) merge here, if it meets what is required.", show_default=False),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="A task's own adapter, for one adapter or model.", show_default=False),
    ] = None,
    workspace: Annotated[
        Path, typer.Option(envvar="PLAIT_WORKSPACE", help="Where results and finished answers are kept.")
    ] = Path("artifacts"),
    card: Annotated[bool, typer.Option("--card", help="Put the results into the card of the adapter or model.")] = False,
    *,
    loading: Loading,
    writing: Writing,
    keys: Keys,
) -> None:
    """Report what a merge kept of every adapter, task by task, next to the base model and each task's own adapter.

    Example: plait eval recipe.yaml --tasks tasks/intent.yaml tasks/langid.yaml --matrix

    Example: plait eval ./a ./b --tasks a.yaml b.yaml --methods linear,ties,dc_merge --spaces core
    """
    from plait.cli.arguments import named_paths
    from plait.cli.console import ProgressBars, print_json, warnings_as_notes
    from plait.cli.stopping import noting_on_stop
    from plait.commands.evaluate import EvaluateOrder
    from plait.commands.request import Request
    from plait.evaluation.pipeline import EvaluateOptions
    from plait.hub.pretrained import LoadOptions

    base = keys.settings.get("base_model")
    settings = {key: value for key, value in keys.settings.items() if key != "base_model"}
    order = EvaluateOrder(
        Request(inputs if len(inputs) > 1 else inputs[0], settings, keys.sets, moments),
        tasks=keys.tasks or [],
        eval=keys.of("eval"),
        methods=[part for part in (methods or "").split(",") if part],
        spaces=[part for part in (spaces or "").split(",") if part],
        require=require or [],
        out=out,
        force=writing.force,
        sources=named_paths("--source", source or []),
        card=card,
        options=EvaluateOptions(workspace, LoadOptions(*loading, base), matrix, writing.workers),
    )
    with warnings_as_notes():
        order.check()
    with noting_on_stop(lambda: _kept(workspace)):
        found = order.run(ProgressBars())
    best, board = found.best, found.board
    if writing.json:
        saved = None if found.saved is None else str(found.saved)
        required = [{"bound": str(b), "value": b.value(best), "met": b.met(best)} for b in found.required]
        print_json({**(board or best).model_dump(mode="json"), "run": str(found.run), "required": required, "saved": saved})
    else:
        show_evaluation(best) if board is None else _show_board(board)
        _show_verdict(found)
    if not found.ok:
        raise typer.Exit(NOT_MET)


def _kept(workspace: Path) -> str:
    from plait.evaluation.workspace import SCORES

    count = sum(1 for _ in (workspace / SCORES).glob("*.json"))
    if not count:
        return "No task was finished; the same command starts from the beginning."
    return f"The answers of {count} finished tasks are kept in {workspace / SCORES}; the same command continues from there."


def show_evaluation(found: Evaluation) -> None:
    """Print one evaluation as a table."""
    from plait.cli.console import new_table, out

    console = out()
    parts = [f"[bold]{found.name}[/bold]", found.split, " + ".join(s.name for s in found.sources)]
    console.print(" · ".join(part for part in parts if part), markup=True)
    table = new_table(("task", "metric", "n", "base", "single", "merged", "recovery", "95 %"), left=("task", "metric"))
    for t in found.tasks:
        arrow = "" if t.higher_is_better else " ↓"
        single = "–" if t.single is None else f"{t.single:.3f}"
        cells = (t.task, t.metric + arrow, str(t.examples), f"{t.base:.3f}", single, _marked(t.merged, below=t.below_base))
        table.add_row(*cells, _number(t.recovery), _bounds(t.recovery_interval))
    if found.mean_recovery is not None:
        table.add_row("mean", "", "", "", "", "", _number(found.mean_recovery), _bounds(found.mean_interval))
        worst = f"worst ({found.worst_task})"
        table.add_row(worst, "", "", "", "", "", f"[bold]{_number(found.worst_recovery)}[/bold]", _bounds(found.worst_interval))
    console.print(table)
    if found.below_base:
        console.print(f"[red]worse than the base[/red] on {', '.join(found.below_base)}")
    for t in found.tasks:
        if t.undefined:
            console.print(f"{t.task}: recovery is not defined: {t.undefined}", markup=False)
    _show_matrix(found)


def _show_matrix(found: Evaluation) -> None:
    from rich.table import Table

    from plait.cli.console import out

    if found.matrix is None:
        return
    table = Table(title="recovery of every single adapter on every task", title_justify="left", box=None, header_style="bold")
    table.add_column("adapter")
    for task in found.matrix.tasks:
        table.add_column(task, justify="right")
    for name, row in zip(found.matrix.adapters, found.matrix.recovery, strict=True):
        table.add_row(name, *map(_number, row))
    out().print("", table)


def _show_board(board: Leaderboard) -> None:

    from plait.cli.console import new_table, out

    tasks = list(board.base)
    table = new_table(("merge", "worst", "95 %", "mean", *tasks), left=("merge",))
    for p in board.places:
        metrics = (f"{_marked(p.metric[t], below=t in p.below_base)} ({_number(p.recovery[t])})" for t in tasks)
        worst, mean = _number(p.worst_recovery), _number(p.mean_recovery)
        table.add_row(p.name, worst, _bounds(p.worst_interval), mean, *metrics)
    table.add_row("[dim]base[/dim]", "", "", "", *(f"{board.base[t]:.3f}" for t in tasks))
    singles = ("–" if (s := board.single[t]) is None else f"{s:.3f}" for t in tasks)
    table.add_row("[dim]own adapter[/dim]", "", "", "", *singles)
    out().print(table)
    for p in board.places:
        if p.below_base:
            out().print(f"[red]worse than the base[/red]: {p.name} on {', '.join(p.below_base)}")
    for name, why in board.skipped.items():
        out().print(f"left out: {name}: {why}", markup=False)


def _show_verdict(found: Evaluated) -> None:
    from plait.cli.console import out, print_notes

    best = found.best
    for bound in found.required:
        word = "[green]met[/green]" if bound.met(best) else "[bold red]not met[/bold red]"
        value = bound.value(best)
        out().print(f"{bound}: {word} ({best.name}: {'undefined' if value is None else f'{value:.3f}'})")
    if found.saved is not None:
        out().print(f"{best.name} → [bold]{found.saved}[/bold]")
    print_notes(best.notes)
    out().print(f"[dim]{found.run}[/dim]", soft_wrap=True)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _marked(value: float, *, below: bool) -> str:
    return f"[red]{value:.3f}[/red]" if below else f"{value:.3f}"


def _bounds(interval: Bounds | None) -> str:
    return "" if interval is None else f"{interval[0]:.2f}–{interval[1]:.2f}"
