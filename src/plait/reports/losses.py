"""Loss curves of trainings → one chart."""

from __future__ import annotations

from collections.abc import Sequence

from plait.records import Record

CURVES = "loss_curves.json"
_WIDTH, _HEIGHT = 640.0, 220.0
# distinguishable without red and green (Okabe and Ito 2008)
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")


class LossCurve(Record):
    """How one training went.

    Attributes:
        name: of the adapter.
        steps: optimizer steps.
        tokens: seen, padding left out.
        seconds: wall time.
        points: (step, training loss).
        held_out: (step, loss on held-out data); empty where none was measured.
    """

    name: str
    steps: int
    tokens: int
    seconds: float
    points: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...] = ()

    @property
    def last(self) -> float | None:
        """The last training loss; None where none was logged."""
        return self.points[-1][1] if self.points else None


class LossCurves(Record):
    """The curves of adapters that were trained together."""

    curves: tuple[LossCurve, ...]


class Line(Record):
    """One line of the chart: its points as SVG takes them, in the chart's own units."""

    name: str
    color: str
    points: str
    dashed: bool


class Chart(Record):
    """Lines over steps, from 0 to the largest loss.

    Attributes:
        width: of the drawing.
        height: of the drawing.
        steps: at the right edge.
        loss: at the upper edge.
        lines: one per curve, and a dashed one where a loss on held-out data was measured.
    """

    width: float
    height: float
    steps: int
    loss: float
    lines: tuple[Line, ...]


def loss_chart(curves: Sequence[LossCurve]) -> Chart | None:
    """Return the chart of some curves; None where nothing was logged."""
    every = [point for curve in curves for point in (*curve.points, *curve.held_out)]
    if not every:
        return None
    steps, loss = max(step for step, _ in every), max(value for _, value in every) or 1.0

    def place(points: Sequence[tuple[int, float]]) -> str:
        return " ".join(f"{_WIDTH * x / steps:.1f},{_HEIGHT * (1 - y / loss):.1f}" for x, y in points)

    lines = []
    for index, curve in enumerate(curves):
        color = _COLORS[index % len(_COLORS)]
        lines.append(Line(name=curve.name, color=color, points=place(curve.points), dashed=False))
        if curve.held_out:
            lines.append(Line(name=f"{curve.name}, held out", color=color, points=place(curve.held_out), dashed=True))
    return Chart(width=_WIDTH, height=_HEIGHT, steps=steps, loss=loss, lines=tuple(lines))
