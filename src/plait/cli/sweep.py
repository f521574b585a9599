"""`plait sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.options import Cluster, Keys, Loading, MaybeOut, Moments, Writing, with_options

if TYPE_CHECKING:
    from plait.search.conclusion import SweepResult
    from plait.search.record import Run, StudyRecord
    from plait.search.status import StudyStatus

_SHOWN = 8  # candidates of the table


@with_options("sweep")
def sweep(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="RECIPE|ADAPTER...", help="A recipe, or several adapters.", show_default=False),
    ] = None,
    out: MaybeOut = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Optuna's storage, for several machines that search together; study.db in --out when not given.",
            show_default=False,
        ),
    ] = None,
    warm_start: Annotated[
        list[str] | None,
        typer.Option(metavar="STUDY", help="An earlier study, whose candidates are not evaluated again.", show_default=False),
    ] = None,
    cluster: Cluster = None,
    status: Annotated[
        Path | None, typer.Option(metavar="STUDY", help="Print how far a study is, and leave.", show_default=False)
    ] = None,
    moments: Moments = None,
    workspace: Annotated[
        Path, typer.Option(envvar="PLAIT_WORKSPACE", help="Where results and finished answers are kept.")
    ] = Path("artifacts"),
    *,
    loading: Loading,
    writing: Writing,
    keys: Keys,
) -> None:
    """Search for the merge that loses least: candidates are compared on one split, the best is asked once on another.

    Without --space and --grid: the method and the scale. Stopped or killed, the same command continues.

    Example: plait sweep ./intent ./langid --tasks tasks/intent.yaml tasks/langid.yaml --space scale=0.2..2 -o study

    Example: plait sweep --status study
    """
    from plait.cli.console import ProgressBars, print_json, warnings_as_notes
    from plait.cli.stopping import noting_on_stop
    from plait.commands.sweep import SweepOrder, SweepStatusOrder
    from plait.errors import RecipeError
    from plait.hub.pretrained import LoadOptions

    if status is not None:
        found = SweepStatusOrder(status, storage).run()
        if writing.json:
            print_json(found.model_dump(mode="json"))
        else:
            _show_status(found)
        return
    if not inputs or out is None:
        raise RecipeError("plait sweep needs a recipe or adapters, and -o STUDY; or --status STUDY.")
    order = SweepOrder(
        request=keys.request(inputs, moments, mixed=False),
        out=out,
        force=writing.force,
        workers=writing.workers,
        eval=keys.of("eval"),
        storage=storage,
        warm_start=warm_start or (),
        cluster=cluster,
        workspace=workspace,
        load=LoadOptions(*loading),
    )
    with (
        warnings_as_notes(),
        noting_on_stop(lambda: f"Finished candidates are kept in {out}; the same command continues there."),
    ):
        result = order.run(ProgressBars())
    if writing.json:
        merged = None if result.merged is None else str(result.merged)
        print_json({"folder": str(result.folder), "merged": merged, **result.record.model_dump(mode="json")})
    else:
        _show(result)


def _show(result: SweepResult) -> None:
    from plait.cli.console import new_table, out, print_notes

    console, record = out(), result.record
    of = f"best of {record.candidates} candidates on {record.split}"
    console.print(f"[bold]{' + '.join(record.adapters)}[/bold] · {of} → [bold]{result.folder}[/bold]", soft_wrap=True)
    table = new_table(("", "values", "worst", "mean", *record.eval_tasks), left=("", "values"))
    for place, run in _first(record):
        cells = (_number(run.results[t].recovery) for t in record.eval_tasks)
        table.add_row(place, _values(run), _number(run.worst), _number(run.mean), *cells)
    console.print(table)
    saved = 1 - record.examples_asked / record.examples_of_all if record.examples_of_all else 0.0
    stopped = sum(run.stopped for run in record.runs)
    if stopped:
        console.print(
            f"stopped where they could not win: {stopped} of {record.candidates} candidates; asked: {record.examples_asked} of "
            f"{record.examples_of_all} examples ({saved:.0%} saved)"
        )
    if record.early_stop_reason:
        console.print(f"ended early: {record.early_stop_reason}", markup=False)
    if record.failed:
        reasons = [str(run.score_details["error"]) for run in record.runs if "error" in run.score_details]
        console.print(f"not merged: {record.failed} candidates; the first: {reasons[0]}", markup=False)
    _show_final(record)
    print_notes(record.notes)
    if result.merged is not None:
        console.print(f"the merge of the best → [bold]{result.merged}[/bold]", soft_wrap=True)
    else:
        console.print(f"plait merge {result.folder / 'recipe.yaml'} -o OUT writes the best", markup=False, soft_wrap=True)


def _show_final(record: StudyRecord) -> None:
    from plait.cli.console import out

    final = record.post_sweep_eval
    if final is None:
        return
    worst, mean = (
        f"{_number(value)}{_bounds(bounds)}"
        for value, bounds in ((final.worst_recovery, final.worst_interval), (final.mean_recovery, final.mean_interval))
    )
    out().print(f"on [bold]{final.split}[/bold], asked once: worst [bold]{worst}[/bold] ({final.worst_task}), mean {mean}")
    for other in final.differences:
        name = "the start" if other.than == "start" else "the second best"
        one, two = (
            f"{value:+.2f}{_bounds(bounds)}" if value is not None else "–"
            for value, bounds in ((other.worst, other.worst_interval), (other.mean, other.mean_interval))
        )
        out().print(f"  against {name}: {one} in the worst, {two} in the mean")
    out().print(f"[dim]{final.run}[/dim]", soft_wrap=True)


def _show_status(found: StudyStatus) -> None:
    from plait.cli.console import out

    state = "at work" if found.running else "finished" if found.finished else "not at work; the same command continues"
    out().print(f"trials: {found.trials} ended, {found.begun} begun, {found.waiting} waiting · {state}")
    if found.stopped or found.failed:
        out().print(f"stopped where they could not win: {found.stopped}; not merged: {found.failed}")
    if found.best_score is not None:
        values = ", ".join(f"{path} {_value(value)}" for path, value in found.best_params.items())
        out().print(f"best so far: {found.best_score:.3f} at {values or 'the start'}", markup=False)


def _first(record: StudyRecord) -> list[tuple[str, Run]]:
    """Return the best candidates with what they are called, the start among them."""
    complete = [i for i, run in enumerate(record.runs) if run.complete and run.phase != "zero"]
    rest = [i for i in complete if i not in (record.best_index, record.second_index)]
    rest.sort(key=lambda i: record.runs[i].score or 0.0, reverse=True)
    order = [record.best_index, *([] if record.second_index is None else [record.second_index]), *rest][:_SHOWN]
    starts = [i for i in complete if record.runs[i].phase == "start" and i not in order]
    return [
        ("start" if record.runs[i].phase == "start" else str(record.runs[i].number), record.runs[i]) for i in [*order, *starts]
    ]


def _values(run: Run) -> str:
    return ", ".join(f"{_short(path)} {_value(v)}" for path, v in run.params.items()) or "as given"


def _short(path: str) -> str:
    """Return what a path is called in a table: an adapter's weight by the adapter's name."""
    first, _, rest = path.partition(".")
    return rest.removesuffix(".weight") if first == "adapters" else rest or first


def _value(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _bounds(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:.2f} – {interval[1]:.2f})"
