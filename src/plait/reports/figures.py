"""The same numbers as figures for a paper: SVG and PNG files, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.errors import OutputError, ReportError
from plait.evaluation.record import Evaluation
from plait.reports.colors import css, diverging
from plait.reports.page import HeatMap, interference, layer_maps, weight_map
from plait.reports.reading import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("svg", "png")
_STYLE = {"font.size": 9, "svg.hashsalt": "plait", "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}


def write_figures(report: Report, folder: Path) -> list[Path]:
    """Draw every figure that a report has the numbers for.

    Args:
        report: what to draw.
        folder: where to write `<figure>.svg` and `<figure>.png`; files of these names are replaced.

    Raises:
        ReportError: matplotlib is not installed.
        OutputError: the folder cannot be written.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise ReportError("figures are drawn by matplotlib, which is not installed; pip install 'plait[report]'.") from None
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
            for name, draw in _drawings(report):
                figure = Figure(layout="constrained")
                draw(figure)
                for kind in FORMATS:
                    # without dates the same numbers give the same bytes
                    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": "plait"}
                    path = folder / f"{name}.{kind}"
                    figure.savefig(path, dpi=200, metadata=metadata)
                    written.append(path)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}.") from None
    return written


def _drawings(report: Report) -> Iterator[tuple[str, Callable[[Figure], None]]]:
    if report.evaluations:
        first = report.evaluations[0]
        yield "recovery", lambda figure: _recovery(figure, first)
        if (found := interference(first)) is not None:
            yield "interference", lambda figure: _heat(figure, found)
    if report.weights is not None:
        weights = weight_map(report.weights)
        yield "weights", lambda figure: _heat(figure, weights)
    if report.conflict is not None:
        for name, table in zip(("cosine", "sign_conflict", "overlap_a", "overlap_b"), layer_maps(report.conflict), strict=True):
            yield f"layers_{name}", lambda figure, table=table: _heat(figure, table)  # type: ignore[misc]


def _recovery(figure: Figure, found: Evaluation) -> None:
    tasks = [t for t in found.tasks if t.recovery is not None]
    figure.set_size_inches(5.5, 0.8 + 0.35 * len(tasks))
    axes: Axes = figure.subplots()
    for place, task in enumerate(reversed(tasks)):
        value = task.recovery or 0.0
        axes.barh(place, value, height=0.6, color=css(diverging(-1.0 if task.below_base else 1.0)))
        if task.recovery_interval is not None:
            axes.hlines(place, *task.recovery_interval, color="black", linewidth=1.2)
    axes.set_yticks(range(len(tasks)), [t.task for t in reversed(tasks)])
    for mark in (0, 1):
        axes.axvline(mark, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xlabel("recovery: (merged − base) / (own adapter − base), 95 % interval")


def _heat(figure: Figure, table: HeatMap) -> None:
    rows, columns = len(table.rows), len(table.columns)
    figure.set_size_inches(1.6 + 1.3 * columns, 0.9 + 0.24 * rows)
    axes: Axes = figure.subplots()
    for y, (_, cells) in enumerate(table.rows):
        for x, cell in enumerate(cells):
            shown = cell.background != "transparent"
            axes.add_patch(_square(x, y, cell.background if shown else "white"))
            axes.text(x, y, cell.text, ha="center", va="center", fontsize=7, color=cell.ink if shown else "black")
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), title=table.title)
    axes.set_xticks(range(columns), table.columns, rotation=20, ha="right")
    axes.set_yticks(range(rows), [name for name, _ in table.rows])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _square(x: int, y: int, color: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor="white", linewidth=0.5)
