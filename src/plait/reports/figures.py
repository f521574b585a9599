"""The same numbers as figures for a paper: SVG and PNG files, drawn by matplotlib."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from plait.errors import OutputError
from plait.reports.charts import (
    Cell,
    ChartRecovery,
    HeatMap,
    energy_map,
    interference_map,
    layer_maps,
    leaderboard_recoveries,
    task_recoveries,
    weight_map,
)
from plait.reports.colors import css, diverging
from plait.reports.reading import Report
from plait.results.staging import held

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[["Figure"], None]

FIGURE_FORMATS = ("svg", "png")
STYLE = {"font.size": 9, "svg.hashsalt": "plait", "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}
RECOVERY = "recovery: (merged − base) / (own adapter − base), 95 % interval"
_LAYERS = ("cosine", "sign_conflict", "overlap_a", "overlap_b")


def figures_problem(report: Report, folder: Path) -> str | None:
    """Return why figures must not be written to a folder: files of their names are there."""
    names = (f"{name}.{kind}" for name, _ in _drawings(report) for kind in FIGURE_FORMATS)
    existing = [name for name in names if os.path.lexists(folder / name)]
    if not existing:
        return None
    return f"{folder} has {', '.join(existing)} already. Choose another folder, or replace them with --force."


def write_figures(report: Report, folder: Path, *, force: bool) -> list[Path]:
    """Draw every figure that a report has the numbers for; all of them appear in the folder when the last is drawn.

    Args:
        report: what to draw.
        folder: where to write `<figure>.svg` and `<figure>.png`.
        force: replace files of these names.

    Raises:
        OutputError: the folder cannot be written, holds such files, or another process writes there.
    """
    import matplotlib as mpl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with held(folder), TemporaryDirectory(dir=folder, prefix=".plait-") as place, mpl.rc_context(STYLE):  # type: ignore[arg-type]
            if not force and (problem := figures_problem(report, folder)):
                raise OutputError(problem)
            drawn = list(_drawn(report, Path(place)))
            return [path.replace(folder / path.name) for path in drawn]
    except BlockingIOError:
        raise OutputError(f"{folder} is being written by another process. Choose another folder.") from None
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}.") from None


def _drawn(report: Report, place: Path) -> Iterator[Path]:
    from matplotlib.figure import Figure

    for name, draw in _drawings(report):
        figure = Figure(layout="constrained")
        draw(figure)
        for kind in FIGURE_FORMATS:
            # without dates the same numbers give the same bytes
            metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": "plait"}
            path = place / f"{name}.{kind}"
            figure.savefig(path, dpi=200, metadata=metadata)
            yield path


def _drawings(report: Report) -> Iterator[tuple[str, Draw]]:
    if report.evaluations:
        first = report.evaluations[0]
        yield "recovery", bars_of(task_recoveries(first.tasks), RECOVERY)
        if (found := interference_map(first)) is not None:
            yield "interference", lambda figure: _table(figure, found)
    if (board := report.comparison) is not None:
        yield "leaderboard", bars_of(leaderboard_recoveries(board), f"worst {RECOVERY}")
    if report.weights is not None and not report.weights.constant:
        weights = weight_map(report.weights)
        yield "weights", maps_of([weights])
    if report.conflict is not None:
        for name, table in zip(_LAYERS, layer_maps(report.conflict), strict=True):
            yield f"layers_{name}", maps_of([table])
    for index, merge in enumerate(m for m in report.merges if m.result == "truncated"):
        energy = energy_map(merge)
        yield f"energy{f'_{index + 1}' if index else ''}", maps_of([energy])


def bars_of(found: Sequence[ChartRecovery], label: str) -> Draw:
    """Return what draws recoveries as bars."""
    return lambda figure: _bars(figure, found, label)


def maps_of(tables: Sequence[HeatMap]) -> Draw:
    """Return what draws maps over layers below each other."""

    def draw(figure: Figure) -> None:
        figure.set_size_inches(7.0, sum(1.0 + 0.26 * len(table.rows) for table in tables))
        for axes, table in zip(figure.subplots(len(tables), squeeze=False)[:, 0], tables, strict=True):
            _strip(axes, table)

    return draw


def curves_of(curves: Mapping[str, Sequence[tuple[float | str, float]]], across: str, up: str) -> Draw:
    """Return what draws named lines over steps or layers."""

    def draw(figure: Figure) -> None:
        figure.set_size_inches(6.0, 3.2)
        axes: Axes = figure.subplots()
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker=".", label=name.lstrip("_"))
        axes.set(xlabel=across, ylabel=up)
        axes.legend(frameon=False)

    return draw


def dots_of(dots: Sequence[tuple[float, float, bool]], across: str, up: str) -> Draw:
    """Return what draws dots, filled where the third value says so, and the best of the filled ones so far."""

    def draw(figure: Figure) -> None:
        figure.set_size_inches(6.0, 3.2)
        axes: Axes = figure.subplots()
        color, best = css(diverging(1.0)), list[tuple[float, float]]()
        for x, y, filled in dots:
            axes.plot(x, y, "o", color=color, fillstyle="full" if filled else "none")
            if filled:
                best.append((x, max(y, best[-1][1] if best else y)))
        if best:
            axes.step(*zip(*best, strict=True), where="post", color=css(diverging(-1.0)), label="best so far")
            axes.legend(frameon=False)
        axes.set(xlabel=across, ylabel=up)

    return draw


def _bars(figure: Figure, found: Sequence[ChartRecovery], label: str) -> None:
    known = [r for r in found if r.value is not None]
    figure.set_size_inches(5.5, 0.8 + 0.35 * len(known))
    axes: Axes = figure.subplots()
    for place, r in enumerate(reversed(known)):
        axes.barh(place, r.value or 0.0, height=0.6, color=css(diverging(1.0 if r.good else -1.0)))
        if r.interval is not None:
            axes.hlines(place, *r.interval, color="black", linewidth=1.2)
    axes.set_yticks(range(len(known)), [r.name for r in reversed(known)])
    for mark in (0, 1):
        axes.axvline(mark, color="gray", linewidth=0.8, linestyle="--")
    axes.set_xlabel(label)


def _table(figure: Figure, table: HeatMap) -> None:
    rows, columns = len(table.rows), len(table.columns)
    figure.set_size_inches(1.6 + 1.3 * columns, 0.9 + 0.3 * rows)
    axes: Axes = figure.subplots()
    for y, (_, cells) in enumerate(table.rows):
        for x, cell in enumerate(cells):
            axes.add_patch(_square(x, y, cell))
            known = cell.background != "transparent"
            axes.text(x, y, cell.text, ha="center", va="center", fontsize=7, color=cell.ink if known else "black")
    axes.set_xticks(range(columns), table.columns)
    _finish(axes, table)


def _strip(axes: Axes, table: HeatMap) -> None:
    columns = len(table.columns)
    for y, (_, cells) in enumerate(table.rows):
        for x, cell in enumerate(cells):
            axes.add_patch(_square(x, y, cell))
    every = max(1, columns // 8)
    axes.set_xticks(range(0, columns, every), [name.rpartition(".")[2] for name in table.columns[::every]])
    axes.set_xlabel("layer")
    _finish(axes, table)
    for place, end in enumerate(table.legend):
        box = {"facecolor": end.background, "edgecolor": "lightgray", "linewidth": 0.5, "pad": 2.5}
        at = 1 - 0.07 * (len(table.legend) - 1 - place)
        axes.text(at, 1.04, end.text, color=end.ink, transform=axes.transAxes, ha="right", va="bottom", fontsize=7, bbox=box)


def _finish(axes: Axes, table: HeatMap) -> None:
    axes.set(xlim=(-0.5, len(table.columns) - 0.5), ylim=(len(table.rows) - 0.5, -0.5))
    axes.set_title(table.title, loc="left")
    axes.set_yticks(range(len(table.rows)), [name for name, _ in table.rows])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _square(x: int, y: int, cell: Cell) -> Any:
    from matplotlib.patches import Rectangle

    color = "white" if cell.background == "transparent" else cell.background
    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor="white", linewidth=0.5)
