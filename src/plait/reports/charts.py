"""Numbers → bars and colored cells, with their places and words. The page and the figures draw the same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from operator import attrgetter

from plait.adapters.names import LayerKey, layer_key
from plait.evaluation.comparison import Leaderboard
from plait.evaluation.record import Bounds, Evaluation, TaskResult
from plait.inspection.comparison import AdapterComparison
from plait.merging.plan import MergePlan
from plait.merging.record import RunRecord
from plait.records import Record
from plait.reports.colors import Color, css, diverging, sequential, text_color
from plait.reports.reading import LayerCoefficients

_LEAST_SPAN = 0.1  # of a color scale: noise is not shown as a difference


class Cell(Record):
    """One cell: its text and its colors."""

    text: str
    background: str
    ink: str


class HeatMap(Record):
    """A table whose cells are colored.

    Attributes:
        title: above it.
        about: how to read it.
        columns: their names.
        rows: name → cells, in order.
        legend: the colors of low, middle and high values; empty where the cells' texts show the values.
    """

    title: str
    about: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    legend: tuple[Cell, ...] = ()


class Bar(Record):
    """A recovery as a bar; positions in percent of the axis' width.

    Attributes:
        name: whose it is.
        text: the recovery.
        interval: in words; empty where there is none.
        good: whether it is at or above the base.
        left: where the bar begins.
        width: how long it is.
        low: where the interval begins; None where there is none.
        spread: how long the interval is.
    """

    name: str
    text: str
    interval: str
    good: bool
    left: float
    width: float
    low: float | None
    spread: float


class Bars(Record):
    """Bars on one axis.

    Attributes:
        zero: where the base model is, in percent of the width.
        one: where a task's own adapter is.
        bars: in order.
    """

    zero: float
    one: float
    bars: tuple[Bar, ...]


class ChartRecovery(Record):
    """A recovery and how surely it is known.

    Attributes:
        name: of a task or a merge.
        value: the recovery; None where it is not defined.
        interval: 95 %.
        good: whether it is at or above the base.
    """

    name: str
    value: float | None
    interval: Bounds | None
    good: bool


def show_number(value: float | None) -> str:
    """Write a metric with three digits; a dash where there is none."""
    return "–" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def show_share(value: float | None) -> str:
    """Write a share in percent, never broken before its sign; a dash where there is none."""
    return "–" if value is None else _signed(f"{round(100 * value)}\N{NO-BREAK SPACE}%")


def show_interval(bounds: Bounds | None) -> str:
    """Write an interval of shares."""
    return "" if bounds is None else f"{_signed(f'{round(100 * bounds[0])}')} – {show_share(bounds[1])}"


def task_recoveries(tasks: Iterable[TaskResult]) -> list[ChartRecovery]:
    """Return the recoveries of one evaluation."""
    return [ChartRecovery(name=t.task, value=t.recovery, interval=t.recovery_interval, good=not t.below_base) for t in tasks]


def leaderboard_recoveries(board: Leaderboard) -> list[ChartRecovery]:
    """Return the worst recovery of every merge on a leaderboard."""
    return [
        ChartRecovery(name=p.name, value=p.worst_recovery, interval=p.worst_interval, good=not p.below_base)
        for p in board.places
    ]


def recovery_bars(found: Sequence[ChartRecovery]) -> Bars:
    """Return bars on an axis that holds 0, 1 and all intervals."""
    ends = [0.0, 1.0]
    for r in found:
        ends += [v for v in (r.value, *(r.interval or ())) if v is not None]
    # a hopeless outlier must not press all other bars flat
    low, high = max(-1.0, min(ends)), min(2.0, max(ends))

    def place(value: float) -> float:
        return round(100 * (min(high, max(low, value)) - low) / (high - low), 2)

    drawn = []
    for r in found:
        start, stop = sorted((place(0.0), place(r.value or 0.0)))
        whisker = (place(r.interval[0]), place(r.interval[1])) if r.interval else None
        drawn.append(
            Bar(
                name=r.name,
                text=show_share(r.value),
                interval=show_interval(r.interval),
                good=r.good,
                left=start,
                width=round(stop - start, 2),
                low=whisker[0] if whisker else None,
                spread=round(whisker[1] - whisker[0], 2) if whisker else 0.0,
            )
        )
    return Bars(zero=place(0.0), one=place(1.0), bars=tuple(drawn))


def interference_map(found: Evaluation) -> HeatMap | None:
    """Return what every single adapter does to every task; None when it was not asked for."""
    if found.matrix is None:
        return None
    rows = []
    for name, values, gains in zip(found.matrix.adapters, found.matrix.values, found.matrix.recovery, strict=True):
        cells = [
            _cell(
                f"{show_number(v)} ({show_share(g)})" if g is not None else show_number(v), None if g is None else diverging(g)
            )
            for v, g in zip(values, gains, strict=True)
        ]
        rows.append((name, tuple(cells)))
    return HeatMap(
        title="What each adapter alone does to each task",
        about="The task's metric; in brackets, of the gain that the task's own adapter brings, the share that this one brings. "
        "Blue helps, orange harms.",
        columns=found.matrix.tasks,
        rows=tuple(rows),
    )


def confusion_maps(found: Evaluation) -> tuple[HeatMap, ...]:
    """Return, task by task with labels, which label its own adapter and what is evaluated gave."""
    maps, judged = [], found.name if found.recipe is None else "the merge"
    for task in found.tasks:
        sides = {} if task.confusion is None else {"its own adapter": task.confusion.single, judged: task.confusion.merged}
        for who, counts in sides.items():
            if task.confusion is not None and counts is not None:
                maps.append(_confusion_map(f"{task.task}, {who}", task.confusion.labels, counts))
    return tuple(maps)


def _confusion_map(title: str, labels: tuple[str, ...], counts: Sequence[Sequence[int]]) -> HeatMap:
    rows = [
        (name, tuple(_cell(str(n), diverging((1 if i == j else -1) * n / sum(row)) if n else None) for j, n in enumerate(row)))
        for i, (name, row) in enumerate(zip(labels, counts, strict=True))
    ]
    return HeatMap(
        title=title,
        about="A row per right label, a column per given one; colors are shares of the row. Blue: right; orange: wrong.",
        columns=labels,
        rows=tuple(rows),
    )


def layer_maps(conflict: AdapterComparison) -> tuple[HeatMap, ...]:
    """Return, pair by pair and layer by layer, the conflict between the adapters."""
    pairs = list(combinations(range(len(conflict.names)), 2))
    names = [f"{conflict.names[i]} · {conflict.names[j]}" for i, j in pairs]
    layers = tuple(layer.layer for layer in conflict.layers)

    def table(field: str) -> list[tuple[str, list[float | None]]]:
        matrices = [attrgetter(field)(layer) for layer in conflict.layers]
        return [(name, [m[i][j] if m else None for m in matrices]) for name, (i, j) in zip(names, pairs, strict=True)]

    cosine, conflicts = table("cosine"), table("weighted_conflict")
    largest = _span(cosine, 0.0)
    off = _span(conflicts, 0.5)
    return (
        _scaled(
            "Cosine",
            "⟨ΔWᵢ, ΔWⱼ⟩ over the norms. 0: independent; above: they pull together; below: apart.",
            layers,
            cosine,
            (-largest, 0.0, largest),
            lambda v: diverging(v / largest),
            _plain,
        ),
        _scaled(
            "Sign conflict",
            "Share of |xᵢ xⱼ| where the signs differ. 50 % is chance; more is conflict.",
            layers,
            conflicts,
            (0.5 - off, 0.5, 0.5 + off),
            lambda v: diverging((0.5 - v) / off),
            show_share,
        ),
        _scaled(
            "Overlap of row spaces (A)",
            "Cosine of the median principal angle of what the adapters read. Near 1 where they began with one and the same A.",
            layers,
            table("overlap_a"),
            (0.0, 0.5, 1.0),
            sequential,
            _plain,
        ),
        _scaled(
            "Overlap of column spaces (B)",
            "The same of what the adapters write to.",
            layers,
            table("overlap_b"),
            (0.0, 0.5, 1.0),
            sequential,
            _plain,
        ),
    )


def weight_map(weights: LayerCoefficients) -> HeatMap:
    """Return the coefficients, layer by layer."""
    rows = [(name, [row[i] for row in weights.values]) for i, name in enumerate(weights.adapters)]
    largest = _span(rows, 0.0)
    return _scaled(
        "Weights",
        "What each adapter is multiplied by: the mean over a layer's modules, before the scale of the merge.",
        weights.layers,
        rows,
        (-largest, 0.0, largest) if any(v < 0 for row in weights.values for v in row) else (0.0, largest / 2, largest),
        lambda v: diverging(v / largest),
        _plain,
    )


def energy_map(record: RunRecord) -> HeatMap:
    """Return the energy that a truncated merge kept, by kind of module and layer."""
    found: dict[str, dict[LayerKey | None, tuple[float, float]]] = {}
    for m in record.modules:
        kind = m.target.rpartition(".")[2]
        kept, total = found.setdefault(kind, {}).get(layer_key(m.target), (0.0, 0.0))
        energy = m.energy or 0.0
        found[kind][layer_key(m.target)] = (kept + m.kept * energy, total + energy)
    columns = _layers({key for places in found.values() for key in places})
    rows = [(kind, [_ratio(places.get(key)) for key in columns]) for kind, places in found.items()]
    lowest = min((v for _, values in rows for v in values if v is not None), default=0.0)
    low = min(lowest, 1 - _LEAST_SPAN)
    return _scaled(
        f"{record.method} at rank {record.rank}",
        f"Share of ‖ΔW‖² that the truncation kept: {_finely(record.kept)} over all modules, in the worst "
        f"{_finely(record.lowest_kept)}.",
        tuple("–" if key is None else str(key) for key in columns),
        rows,
        (low, (low + 1) / 2, 1.0),
        lambda v: sequential((1 - v) / (1 - low)),
        _finely,
    )


def rank_map(plan: MergePlan) -> HeatMap:
    """Return the ranks that a merge will have, by kind of module and layer: the largest of those in one place."""
    found: dict[str, dict[LayerKey | None, int]] = {}
    for m in plan.modules:
        places = found.setdefault(m.target.rpartition(".")[2], {})
        key, rank = layer_key(m.target), m.exact_rank if m.rank is None else m.rank
        places[key] = max(rank, places.get(key, 0))
    keys = _layers({key for places in found.values() for key in places})
    largest = max((rank for places in found.values() for rank in places.values()), default=1) or 1
    return _scaled(
        "Rank",
        "Of the written factors; where an energy decides it at run time, or for a dense merge, that at which nothing is lost.",
        tuple("–" if key is None else str(key) for key in keys),
        [(kind, [places.get(key) for key in keys]) for kind, places in found.items()],
        (0.0, largest / 2, float(largest)),
        lambda v: sequential(v / largest),
        lambda v: f"{v:g}",
    )


def _layers(keys: set[LayerKey | None]) -> list[LayerKey | None]:
    """Return layers in order, and modules outside of layers after them."""
    known: list[LayerKey | None] = [*sorted(key for key in keys if key is not None)]
    return [*known, None] if None in keys else known


def _ratio(sums: tuple[float, float] | None) -> float | None:
    return None if sums is None else sums[0] / sums[1] if sums[1] else 1.0


def _span(rows: Sequence[tuple[str, Sequence[float | None]]], middle: float) -> float:
    """Return the largest distance from the middle, or what is shown at least."""
    return max(_LEAST_SPAN, *(abs(v - middle) for _, values in rows for v in values if v is not None), 0.0)


def _scaled(
    title: str,
    about: str,
    columns: tuple[str, ...],
    rows: Sequence[tuple[str, Sequence[float | None]]],
    scale: tuple[float, float, float],
    color: Callable[[float], Color],
    form: Callable[[float], str],
) -> HeatMap:
    def cell(value: float | None) -> Cell:
        return _cell("–", None) if value is None else _cell(form(value), color(value))

    return HeatMap(
        title=title,
        about=about,
        columns=columns,
        rows=tuple((name, tuple(map(cell, values))) for name, values in rows),
        legend=tuple(map(cell, scale)),
    )


def _plain(value: float) -> str:
    return _signed(f"{value:.2f}")


def _finely(value: float) -> str:
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def _signed(text: str) -> str:
    return text.replace("-", "−")


def _cell(text: str, color: Color | None) -> Cell:
    if color is None:
        return Cell(text=text, background="transparent", ink="inherit")
    return Cell(text=text, background=css(color), ink=text_color(color))
