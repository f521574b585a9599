"""A report → one HTML page that needs nothing else: no script, no font, no picture, no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from itertools import combinations
from typing import Any

from plait.evaluation.record import Bounds, Evaluation, TaskResult
from plait.merging.inspection import Comparison as Conflict
from plait.merging.record import RunRecord
from plait.records import Record
from plait.reports.colors import Color, css, diverging, ink, sequential
from plait.reports.reading import LayerWeights, Report
from plait.reports.verdict import certainty, verdict


class Cell(Record):
    """One cell of a heat map: its text and its colours."""

    text: str
    background: str
    ink: str


class HeatMap(Record):
    """A table whose cells are coloured.

    Attributes:
        title: above it.
        about: how to read it.
        columns: their names.
        rows: name → cells, in order.
    """

    title: str
    about: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


class Bar(Record):
    """Recovery of one task as a bar; positions in percent of the axis' width.

    Attributes:
        task: its name.
        text: the recovery.
        good: whether it is at or above the base.
        left: where the bar begins.
        width: how long it is.
        low: where the interval begins; None where there is none.
        spread: how long the interval is.
    """

    task: str
    text: str
    good: bool
    left: float
    width: float
    low: float | None
    spread: float


class Axis(Record):
    """The axis of the bars: from and to in recovery, and where 0 and 1 stand, in percent of its width."""

    zero: float
    one: float


def render(report: Report, *, title: str) -> str:
    """Return the page.

    Args:
        report: what to show.
        title: of the page.
    """
    import jinja2

    source = files("plait.reports").joinpath("templates", "report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "share": share, "interval": interval}
    return environment.from_string(source).render(title=title, report=report, **_parts(report))


def _parts(report: Report) -> dict[str, Any]:
    first = report.evaluations[0] if report.evaluations else None
    axis, bars = recovery_bars(first.tasks) if first else (None, ())
    return {
        "first": first,
        "verdict": verdict(first) if first else "",
        "certainty": certainty(first) if first else "",
        "axis": axis,
        "bars": bars,
        "interference": interference(first) if first else None,
        "layers": layer_maps(report.conflict) if report.conflict else (),
        "weights": weight_map(report.weights) if report.weights else None,
        "energy": tuple(energy_map(m) for m in report.merges if m.result == "truncated"),
        "recipe": json.dumps(first.recipe, indent=2, ensure_ascii=False) if first and first.recipe else None,
    }


def number(value: float | None) -> str:
    """Write a metric with three digits; a dash where there is none."""
    return "–" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def share(value: float | None) -> str:
    """Write a share in percent; a dash where there is none."""
    return "–" if value is None else f"{value:.0%}"


def interval(bounds: Bounds | None) -> str:
    """Write an interval of shares."""
    return "" if bounds is None else f"{bounds[0]:.0%} – {bounds[1]:.0%}"


def recovery_bars(tasks: Sequence[TaskResult]) -> tuple[Axis, tuple[Bar, ...]]:
    """Return the axis that holds all intervals, and a bar per task."""
    ends = [0.0, 1.0]
    for t in tasks:
        ends += [v for v in (t.recovery, *(t.recovery_interval or ())) if v is not None]
    # a hopeless outlier must not press all other bars flat
    low, high = max(-1.0, min(ends)), min(2.0, max(ends))

    def place(value: float) -> float:
        return round(100 * (min(high, max(low, value)) - low) / (high - low), 2)

    bars = []
    for t in tasks:
        value = t.recovery or 0.0
        start, stop = sorted((place(0.0), place(value)))
        ends_of = (place(t.recovery_interval[0]), place(t.recovery_interval[1])) if t.recovery_interval else None
        bars.append(
            Bar(
                task=t.task,
                text=share(t.recovery),
                good=not t.below_base,
                left=start,
                width=round(stop - start, 2),
                low=ends_of[0] if ends_of else None,
                spread=round(ends_of[1] - ends_of[0], 2) if ends_of else 0.0,
            )
        )
    return Axis(zero=place(0.0), one=place(1.0)), tuple(bars)


def interference(found: Evaluation) -> HeatMap | None:
    """Return what every single adapter does to every task; None when it was not asked for."""
    if found.matrix is None:
        return None
    rows = []
    for name, values, gains in zip(found.matrix.adapters, found.matrix.values, found.matrix.recovery, strict=True):
        cells = [
            _cell(f"{number(v)} ({share(g)})" if g is not None else number(v), None if g is None else diverging(g))
            for v, g in zip(values, gains, strict=True)
        ]
        rows.append((name, tuple(cells)))
    return HeatMap(
        title="What each adapter does to each task",
        about="The task's metric, and of the gain that the task's own adapter brings, the share that this one brings. "
        "Blue helps, orange harms.",
        columns=found.matrix.tasks,
        rows=tuple(rows),
    )


def layer_maps(conflict: Conflict) -> tuple[HeatMap, ...]:
    """Return, pair by pair and layer by layer, how the adapters lie to each other."""
    pairs = list(combinations(range(len(conflict.names)), 2))
    columns = tuple(f"{conflict.names[i]} · {conflict.names[j]}" for i, j in pairs)

    def table(title: str, about: str, field: str, color: Any) -> HeatMap:
        rows = []
        for layer in conflict.layers:
            matrix = getattr(layer, field)
            values = [matrix[i][j] for i, j in pairs]
            rows.append(
                (layer.layer, tuple(_cell("–" if v is None else f"{v:.2f}", None if v is None else color(v)) for v in values))
            )
        return HeatMap(title=title, about=about, columns=columns, rows=tuple(rows))

    return (
        table("Cosine", "⟨ΔWᵢ, ΔWⱼ⟩ over the norms: 0 is independent, below 0 they pull apart.", "cosine", diverging),
        table(
            "Sign conflict",
            "Share of |xᵢ xⱼ| where the signs differ: 50 % is chance.",
            "weighted_conflict",
            lambda v: diverging(1 - v, low=0.0, middle=0.5, high=1.0),
        ),
        table(
            "Overlap of row spaces (A)",
            "Cosine of the median principal angle: near 1 where the adapters began with one A.",
            "overlap_a",
            sequential,
        ),
        table("Overlap of column spaces (B)", "The same for what the adapters write to.", "overlap_b", sequential),
    )


def weight_map(weights: LayerWeights) -> HeatMap:
    """Return the coefficients, layer by layer."""
    largest = max((abs(v) for row in weights.values for v in row), default=1.0) or 1.0
    rows = [
        (layer, tuple(_cell(f"{v:.2f}", diverging(v / largest)) for v in values))
        for layer, values in zip(weights.layers, weights.values, strict=True)
    ]
    about = "What each adapter is multiplied by: the mean over a layer's modules."
    return HeatMap(title="Weights", about=about, columns=weights.adapters, rows=tuple(rows))


def energy_map(record: RunRecord) -> HeatMap:
    """Return the energy that a truncated merge kept, by kind of module."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    for m in record.modules:
        kinds.setdefault(m.target.rpartition(".")[2], []).append((m.kept, m.energy or 0.0))
    rows = []
    for kind, found in kinds.items():
        total = sum(energy for _, energy in found)
        kept = sum(k * energy for k, energy in found) / total if total else 1.0
        worst = min(k for k, _ in found)
        rows.append(
            (
                f"{kind} ({len(found)})",
                (_cell(f"{kept:.1%}", sequential(1 - kept)), _cell(f"{worst:.1%}", sequential(1 - worst))),
            )
        )
    return HeatMap(
        title=f"Energy kept at rank {record.rank}",
        about=f"Share of ‖ΔW‖² that the truncation kept: {record.kept:.1%} over all modules.",
        columns=("kept", "worst module"),
        rows=tuple(rows),
    )


def _cell(text: str, color: Color | None) -> Cell:
    if color is None:
        return Cell(text=text, background="transparent", ink="inherit")
    return Cell(text=text, background=css(color), ink=ink(color))
