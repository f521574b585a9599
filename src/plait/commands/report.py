"""`plait report`, `plait.report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plait.reports.pipeline import ReportResult, make_report
from plait.results.progress import Progress


@dataclass(frozen=True)
class ReportOrder:
    """A page that is asked for; see `plait.report`."""

    runs: Sequence[Path]
    out: Path = Path("report.html")
    title: str | None = None
    figures: Path | None = None
    force: bool = False

    def run(self, progress: Progress | None = None) -> ReportResult:
        """Write the page and its figures.

        Raises:
            PlaitError: as `plait.report`.
        """
        return make_report(self.runs, out=self.out, title=self.title, figures=self.figures, force=self.force, progress=progress)
