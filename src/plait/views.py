"""What results offer in a notebook: how they are shown, a table, a figure.

What draws them knows all results, so it is in a package above theirs, `plait.reports`, loaded when something is first shown.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from plait.extras import missing_packages
from plait.notices import announce

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

_DRAWN_BY = "plait.reports.notebook"


class Viewed:
    """A result that a notebook shows as a part of the report's page, and that becomes a table and a figure."""

    def _repr_html_(self) -> str | None:
        """Return HTML that follows the notebook's colors; None, and so the repr, where jinja2 is not installed."""
        try:
            return str(_drawing().html(self))
        except ModuleNotFoundError as error:
            if error.name != "jinja2":
                raise
            announce(missing_packages("showing results in a notebook", {"notebook": ["jinja2"]}), once="plait.views")
            return None

    def to_pandas(self) -> DataFrame:
        """Return the numbers as a table: a row per task, merge, adapter, module or candidate, whatever this is a result of.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        found: DataFrame = _drawing().table(self)
        return found

    def plot(self) -> Figure:
        """Return the numbers as a figure, which notebooks show and `savefig` writes; no state of pyplot is touched.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        found: Figure = _drawing().figure(self)
        return found


def _drawing() -> Any:
    return import_module(_DRAWN_BY)
