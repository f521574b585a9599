"""`plait eval`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from plait.evaluation.comparison import Compared, Comparison
    from plait.evaluation.pipeline import Options
    from plait.evaluation.record import Bounds, Evaluation
    from plait.evaluation.requirement import Requirement

NOT_MET = 3  # exit code: evaluated, but not good enough


def evaluate(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|ADAPTER...|MODEL",
            help="A recipe or several adapters: their merge, in memory. One adapter or model: as its files are.",
            show_default=False,
        ),
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks", metavar="TASK...", help="Task files, or lm_eval:NAME; the recipe's otherwise.", show_default=False
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help=r"test, validation, calibration or train. \[test]", show_default=False)
    ] = None,
    subset: Annotated[
        int | None, typer.Option(min=1, help="Examples per task, every label in its share.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help=r"Of the subset. \[0]", show_default=False)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help=r"Prompts at a time. \[16]", show_default=False)] = None,
    matrix: Annotated[bool, typer.Option("--matrix", help="Also every single adapter on every task.")] = False,
    method: Annotated[str | None, typer.Option(help="Merge method, for adapters.", show_default=False)] = None,
    methods: Annotated[
        str | None, typer.Option(help="Several, such as linear,ties,dare_ties: one leaderboard.", show_default=False)
    ] = None,
    space: Annotated[str | None, typer.Option(help="delta, core, knots or factors.", show_default=False)] = None,
    spaces: Annotated[
        str | None, typer.Option(help="Several, such as delta,core: one leaderboard.", show_default=False)
    ] = None,
    weights: Annotated[str | None, typer.Option(help="One per adapter: 0.7,0.3.", show_default=False)] = None,
    scale: Annotated[float | None, typer.Option(help="Factor on the merged delta.", show_default=False)] = None,
    density: Annotated[float | None, typer.Option(help="Share of entries kept.", show_default=False)] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Set any recipe key: --set method.density=0.3")
    ] = None,
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
        Path | None, typer.Option("--out", "-o", help="Write the (best) merge here, if it meets what is required.")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="A task's own adapter, for one adapter or model.", show_default=False),
    ] = None,
    base_id: Annotated[str | None, typer.Option("--base-id", help="Base model.", show_default=False)] = None,
    load_dtype: Annotated[str, typer.Option(help="Of the base in memory; auto: as it is stored.")] = "auto",
    device_map: Annotated[str, typer.Option(help="As transformers takes it: auto, cpu, cuda:0, balanced.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that lies beside the base's weights.")
    ] = False,
    workspace: Annotated[Path, typer.Option(help="Where results and finished answers are kept.")] = Path("artifacts"),
    workers: Annotated[int | None, typer.Option(min=1, help="Modules merged at a time.", show_default=False)] = None,
    card: Annotated[bool, typer.Option("--card", help="Put the results into the card of the adapter or model.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter that stands at --out.")] = False,
) -> None:
    """Say what a merge kept of every adapter, task by task, beside the base model and each task's own adapter.

    Example: plait eval recipe.yaml --tasks tasks/intent.yaml tasks/langid.yaml --matrix
    """
    from plait.cli.console import print_json
    from plait.cli.stopping import noted
    from plait.errors import OutputError, RecipeError
    from plait.evaluation.card import put_results
    from plait.evaluation.pipeline import Options
    from plait.evaluation.requirement import Requirement
    from plait.evaluation.workspace import write_comparison, write_evaluation
    from plait.results.staging import output_problem

    if out is not None and (problem := output_problem(out, force=force)):
        raise OutputError(problem)
    settings = {"method": method, "space": space, "weights": weights, "scale": scale, "density": density}
    settings = {key: value for key, value in settings.items() if value is not None}
    bounds = [Requirement.read(text) for text in require or []]
    if seed is not None and subset is None:
        raise RecipeError("--seed is that of the subset; give --subset N too, or set both in the recipe (eval.subset).")
    sample = {"max_samples": subset, "seed": seed} if subset is not None and seed is not None else subset
    wanted = {"split": split, "subset": sample, "batch_size": batch_size}
    files = [part for text in tasks or [] for part in ([text] if Path(text).is_file() else text.split(",")) if part]
    options = Options(workspace, base_id, load_dtype, device_map, trust_remote_code, matrix, workers)
    several = methods is not None or spaces is not None
    with noted(lambda: _kept(workspace)):
        if _is_saved(inputs):
            _refuse_merging(inputs[0], [*settings, *["methods"] * several, *["set"] * bool(set_), *["out"] * (out is not None)])
            evaluations, compared = [_saved(inputs[0], files, wanted, options, source or [], bounds)], None
        else:
            _refuse_saved({"source": source, "card": card and out is None})
            compared = _merges(inputs, files, wanted, settings, set_ or [], (methods, spaces), options, bounds)
            evaluations = list(compared.evaluations)
    if card and compared is None:
        put_results(Path(inputs[0]).expanduser(), evaluations[0])
    runs = [write_evaluation(workspace, found) for found in evaluations]
    run = runs[0]
    if several and compared is not None:
        run = write_comparison(workspace, compared.board.adapters, compared.board.model_dump(mode="json"))
    best = evaluations[0]
    failed = [b for b in bounds if not b.met(best)]
    saved = _save(compared, out, force=force, workers=workers) if compared and out and not failed else None
    if saved is not None:
        put_results(Path(saved), best)
    board = compared.board if several and compared else None
    if json:
        required = [{"bound": str(b), "value": b.value(best), "met": b.met(best)} for b in bounds]
        print_json({**(board or best).model_dump(mode="json"), "run": str(run), "required": required, "saved": saved})
    else:
        show_evaluation(best) if board is None else _show_board(board)
        _show_verdict(best, bounds, saved, run)
    if failed:
        raise typer.Exit(NOT_MET)


def _kept(workspace: Path) -> str:
    from plait.evaluation.workspace import SCORES

    count = sum(1 for _ in (workspace / SCORES).glob("*.json"))
    if not count:
        return "No task was finished; the same command starts from the beginning."
    return f"The answers of {count} finished tasks are kept in {workspace / SCORES}; the same command continues from there."


def _checker(bounds: Sequence[Requirement]) -> Callable[[list[str]], None]:
    def check(tasks: list[str]) -> None:
        for bound in bounds:
            bound.check_tasks(tasks)

    return check


def _is_saved(inputs: Sequence[str]) -> bool:
    """Say whether one adapter or model is meant, and not a merge."""
    from plait.evaluation.request import is_recipe_file

    return len(inputs) == 1 and not is_recipe_file(inputs[0])


def _refuse_merging(reference: str, given: Sequence[str]) -> None:
    from plait.errors import RecipeError

    if given:
        flags = ", ".join(f"--{name}" for name in given)
        raise RecipeError(f"{reference} is evaluated as it is; {flags} belong to a merge: give a recipe or several adapters.")


def _refuse_saved(flags: Mapping[str, object]) -> None:
    from plait.errors import RecipeError

    if given := ", ".join(f"--{name}" for name, value in flags.items() if value):
        raise RecipeError(f"{given}: belongs to one adapter or model, as its files are; these are merged in memory.")


def _saved(
    reference: str,
    files: Sequence[str],
    wanted: dict[str, Any],
    options: Options,
    source: Sequence[str],
    bounds: Sequence[Requirement],
) -> Evaluation:
    from plait.cli.console import ProgressBars
    from plait.errors import RecipeError
    from plait.evaluation.pipeline import evaluate_saved
    from plait.evaluation.request import spec_of
    from plait.recipes.evaluation import EvalSpec

    pairs = [text.partition("=") for text in source]
    if wrong := [name for name, sign, path in pairs if not (name and sign and path)]:
        raise RecipeError(f"--source {wrong[0]!r}: write NAME=PATH.")
    found = evaluate_saved(
        reference,
        [Path(f) for f in files],
        spec_of(EvalSpec(), **wanted),
        options,
        sources={name: path for name, _, path in pairs},
        progress=ProgressBars(),
        check=_checker(bounds),
    )
    return found


def _merges(
    inputs: Sequence[str],
    files: Sequence[str],
    wanted: dict[str, Any],
    settings: dict[str, Any],
    sets: Sequence[str],
    several: tuple[str | None, str | None],
    options: Options,
    bounds: Sequence[Requirement],
) -> Compared:
    from plait.cli.console import ProgressBars, warnings_as_notes
    from plait.evaluation.comparison import compare
    from plait.evaluation.request import asked, is_recipe_file, variants

    file = Path(inputs[0]) if is_recipe_file(inputs[0]) else None
    adapters = list(inputs[1:] if file else inputs)
    methods, spaces = ([part for part in (text or "").split(",") if part] for text in several)
    with warnings_as_notes():
        recipes, folder, skipped = variants(file, adapters, settings, sets, methods, spaces)
    recipes = {name: asked(recipe, files, **wanted) for name, recipe in recipes.items()}
    return compare(
        recipes,
        folder,
        options,
        ProgressBars(),
        skipped=skipped,
        check=_checker(bounds),
    )


def _save(compared: Compared, out: Path, *, force: bool, workers: int | None) -> str:
    from plait.cli.console import ProgressBars
    from plait.merging.pipeline import run_recipe

    result = run_recipe(
        compared.recipes[0], folder=compared.folder, out=out, force=force, workers=workers, progress=ProgressBars()
    )
    return str(result.folder)


def show_evaluation(found: Evaluation) -> None:
    """Print one evaluation as a table."""
    from rich.table import Table

    from plait.cli.console import out

    console = out()
    parts = [f"[bold]{found.name}[/bold]", found.split, " + ".join(s.name for s in found.sources)]
    console.print(" · ".join(part for part in parts if part), markup=True)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("task", "metric", "n", "base", "single", "merged", "recovery", "95 %"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
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


def _show_board(board: Comparison) -> None:
    from rich.table import Table

    from plait.cli.console import out

    table = Table(box=None, header_style="bold", pad_edge=False)
    tasks = list(board.base)
    for name in ("merge", "worst", "95 %", "mean", *tasks):
        table.add_column(name, justify="left" if name == "merge" else "right")
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


def _show_verdict(best: Evaluation, bounds: Sequence[Requirement], saved: str | None, run: Path) -> None:
    from plait.cli.console import err, out

    for bound in bounds:
        word = "[green]met[/green]" if bound.met(best) else "[bold red]not met[/bold red]"
        value = bound.value(best)
        out().print(f"{bound}: {word} ({best.name}: {'undefined' if value is None else f'{value:.3f}'})")
    if saved is not None:
        out().print(f"{best.name} → [bold]{saved}[/bold]")
    for note in best.notes:
        err().print(f"note: {note}", style="dim", markup=False)
    out().print(f"[dim]{run}[/dim]", soft_wrap=True)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _marked(value: float, *, below: bool) -> str:
    return f"[red]{value:.3f}[/red]" if below else f"{value:.3f}"


def _bounds(interval: Bounds | None) -> str:
    return "" if interval is None else f"{interval[0]:.2f}–{interval[1]:.2f}"
