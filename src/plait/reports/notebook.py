"""A result → what a notebook shows of it: HTML of the report's pieces, a table of pandas, a figure of matplotlib.

HTML takes the notebook's own colors, light or dark. Every text in it is escaped: names of tasks and adapters may be anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import singledispatch
from typing import TYPE_CHECKING, Any

from plait.evaluation.comparison import Leaderboard
from plait.evaluation.record import Evaluation
from plait.evaluation.replies import AskResult
from plait.extras import optional, require
from plait.inspection.comparison import AdapterComparison
from plait.inspection.report import Inspection
from plait.merging.pipeline import MergeResult
from plait.merging.plan import MergePlan
from plait.merging.record import RunRecord
from plait.reports.charts import (
    energy_map,
    interference_map,
    layer_maps,
    leaderboard_recoveries,
    rank_map,
    recovery_bars,
    task_recoveries,
)
from plait.reports.figures import RECOVERY, Draw, bars_of, curves_of, dots_of, maps_of
from plait.reports.page import template
from plait.reports.studies import study_panels
from plait.reports.verdict import certainty, verdict
from plait.search.conclusion import SweepResult
from plait.search.record import StudyRecord
from plait.tuning.pipeline import TuneResult
from plait.tuning.record import TuneRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


def html(result: object) -> str:
    """Return a result as HTML.

    Raises:
        ModuleNotFoundError: jinja2 is not installed.
    """
    return template("notebook.html.j2").render(parts=list(_parts(_record(result))))


def table(result: object) -> DataFrame:
    """Return a result as a table.

    Raises:
        MissingPackageError: pandas is not installed.
    """
    frame: DataFrame = optional("pandas", "notebook", "to_pandas()").DataFrame(list(_rows(_record(result))))
    return frame


def figure(result: object) -> Figure:
    """Return a result as a figure.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    require("plot()", {"notebook": ["matplotlib"]})
    from plait.reports.shown_figure import shown_figure

    return shown_figure(_drawing(_record(result)))


def _record(result: object) -> object:
    """Return the record of what is a folder and its record."""
    return result.record if isinstance(result, (MergeResult, SweepResult, TuneResult)) else result


@singledispatch
def _parts(result: object) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield the pieces of the report that show a result, with their arguments."""
    raise TypeError(f"{type(result).__name__} is not shown in notebooks")


@singledispatch
def _rows(result: object) -> Iterator[dict[str, Any]]:
    """Yield the rows of a result's table."""
    raise TypeError(f"{type(result).__name__} has no table")


@singledispatch
def _drawing(result: object) -> Draw:
    """Return what draws a result."""
    raise TypeError(f"{type(result).__name__} has no figure")


def _ends(interval: tuple[float, float] | None, name: str) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


@_parts.register(Evaluation)
def _(result: Evaluation) -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "verdict", (result, verdict(result), certainty(result))
    yield "kept", (result, recovery_bars(task_recoveries(result.tasks)))
    if (found := interference_map(result)) is not None:
        yield "heat", (found,)
    yield "notes", (result.notes,)


@_rows.register(Evaluation)
def _(result: Evaluation) -> Iterator[dict[str, Any]]:
    for t in result.tasks:
        row = t.model_dump(
            include={"task", "metric", "adapter", "examples", "base", "single", "merged", "recovery", "below_base"}
        )
        yield row | _ends(t.recovery_interval, "recovery")


@_drawing.register(Evaluation)
def _(result: Evaluation) -> Draw:
    return bars_of(task_recoveries(result.tasks), RECOVERY)


@_parts.register(Leaderboard)
def _(result: Leaderboard) -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "leaderboard", (result, recovery_bars(leaderboard_recoveries(result)), None)
    yield "notes", (result.notes,)


@_rows.register(Leaderboard)
def _(result: Leaderboard) -> Iterator[dict[str, Any]]:
    for p in result.places:
        row = p.model_dump(include={"name", "method", "space", "worst_recovery", "worst_task", "mean_recovery"})
        tasks = {f"recovery.{task}": value for task, value in p.recovery.items()}
        yield row | _ends(p.worst_interval, "worst_recovery") | tasks


@_drawing.register(Leaderboard)
def _(result: Leaderboard) -> Draw:
    return bars_of(leaderboard_recoveries(result), f"worst {RECOVERY}")


@_parts.register(Inspection)
def _(result: Inspection) -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "adapters", (result,)
    if result.comparison is not None:
        yield from _parts(result.comparison)


@_rows.register(Inspection)
def _(result: Inspection) -> Iterator[dict[str, Any]]:
    for a in result.adapters:
        fields = {"name", "format", "kind", "base_model", "ranks", "modules", "parameters", "bytes", "norm"}
        yield a.model_dump(include={*fields, "stable_rank", "rank_for_99"}) | {"layers": len(a.layers)}


@_drawing.register(Inspection)
def _(result: Inspection) -> Draw:
    if result.comparison is not None:
        return _drawing(result.comparison)
    only, towers = result.adapters[0], dict[str, list[tuple[str, float]]]()
    for layer in only.layers:
        tower, _, index = layer.layer.rpartition(".")
        towers.setdefault(f"{only.name}, {tower}", []).append((index, layer.norm))
    return curves_of(towers, "layer", "‖ΔW‖")


@_parts.register(AdapterComparison)
def _(result: AdapterComparison) -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "findings", (result.findings,)
    yield from (("strips", (found,)) for found in layer_maps(result))


@_rows.register(AdapterComparison)
def _(result: AdapterComparison) -> Iterator[dict[str, Any]]:
    measures = ("cosine", "conflict", "weighted_conflict", "overlap_a", "overlap_b")
    for layer in result.layers:
        for i, first in enumerate(result.names):
            for j in range(i + 1, len(result.names)):
                found = {name: matrix[i][j] if (matrix := getattr(layer, name)) else None for name in measures}
                yield {"layer": layer.layer, "first": first, "second": result.names[j], **found}


@_drawing.register(AdapterComparison)
def _(result: AdapterComparison) -> Draw:
    return maps_of(layer_maps(result))


@_parts.register(MergePlan)
def _(result: MergePlan) -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "plan", (result,)
    if len({module.rank for module in result.modules}) > 1:
        yield "strips", (rank_map(result),)
    yield "notes", (result.notes,)


@_rows.register(MergePlan)
@_rows.register(RunRecord)
def _(result: MergePlan | RunRecord) -> Iterator[dict[str, Any]]:
    yield from (module.model_dump() for module in result.modules)


@_drawing.register(MergePlan)
def _(result: MergePlan) -> Draw:
    return maps_of([rank_map(result)])


@_parts.register(RunRecord)
def _(result: RunRecord) -> Iterator[tuple[str, tuple[Any, ...]]]:
    if result.result == "truncated":
        yield "strips", (energy_map(result),)
    else:
        yield "merge", (result,)
    yield "notes", (result.notes,)


@_drawing.register(RunRecord)
def _(result: RunRecord) -> Draw:
    return maps_of([energy_map(result)])


@_parts.register(StudyRecord)
def _(result: StudyRecord) -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "study", (result, study_panels(result))
    yield "notes", (result.notes,)


@_rows.register(StudyRecord)
def _(result: StudyRecord) -> Iterator[dict[str, Any]]:
    for run in result.runs:
        row = {"number": run.number, "phase": run.phase, **run.params, "score": run.score, "worst": run.worst, "mean": run.mean}
        tasks = {f"recovery.{task}": outcome.recovery for task, outcome in run.results.items()}
        yield row | tasks | {"examples": run.examples, "stopped": run.stopped, "seconds": run.seconds}


@_drawing.register(StudyRecord)
def _(result: StudyRecord) -> Draw:
    runs = [run for run in result.runs if run.score is not None and run.phase != "zero"]
    return dots_of([(i, run.score or 0.0, run.complete) for i, run in enumerate(runs)], "candidate", result.maximize[0])


@_parts.register(TuneRecord)
def _(result: TuneRecord) -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "tuning", (result,)
    yield "notes", (result.notes,)


@_rows.register(TuneRecord)
def _(result: TuneRecord) -> Iterator[dict[str, Any]]:
    for t in result.texts:
        start, kept = result.start.divergence[t.task], result.kept
        held = {"base": result.base[t.task], "start": start, "tuned": kept.divergence[t.task], "kept": kept.kept.get(t.task)}
        yield {"task": t.task, "source": t.source, "texts": t.count, "learned": t.learned} | held


@_drawing.register(TuneRecord)
def _(result: TuneRecord) -> Draw:
    tasks = [t.task for t in result.texts]
    curves = {task: [(look.step, look.divergence[task]) for look in result.looks] for task in tasks}
    return curves_of(curves, "step", "KL from the own adapter on held-out texts, nats")


@_parts.register(AskResult)
def _(result: AskResult) -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "replies", (result,)
    yield "notes", (result.notes,)


@_rows.register(AskResult)
def _(result: AskResult) -> Iterator[dict[str, Any]]:
    for asked in result.prompts:
        yield {"prompt": asked.text} | {who: reply.text for who, reply in asked.replies.items()}


@_drawing.register(AskResult)
def _(result: AskResult) -> Draw:
    lengths = {who: [(i, a.replies[who].tokens) for i, a in enumerate(result.prompts)] for who in result.names}
    return curves_of(lengths, "prompt", "tokens of the reply")
