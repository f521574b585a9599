"""A figure that a notebook shows by itself; imported only where matplotlib is there."""

from __future__ import annotations

from io import BytesIO

import matplotlib as mpl
from matplotlib.figure import Figure

from plait.reports.figures import STYLE, Draw

_DPI = 110


class ShownFigure(Figure):
    """A figure that shows itself: notebooks know those of pyplot alone, and pyplot keeps every figure of a process."""

    def _repr_png_(self) -> bytes:
        file = BytesIO()
        self.savefig(file, format="png", dpi=_DPI)
        return file.getvalue()


def shown_figure(draw: Draw) -> Figure:
    """Return what was drawn."""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        figure = ShownFigure(layout="constrained")
        draw(figure)
    return figure
