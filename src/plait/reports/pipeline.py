"""Paths of runs → a page on disk, and figures next to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from plait.errors import OutputError
from plait.extras import require
from plait.parsing import open_bytes
from plait.records import ShortRepr
from plait.reports.figures import figures_problem, write_figures
from plait.reports.page import render
from plait.reports.reading import Report, read_report
from plait.results.lock import ResultKind
from plait.results.progress import Progress
from plait.results.staging import place_problem
from plait.results.writing import write_text_atomic

_GENERATOR = b'<meta name="generator" content="plait">'  # of the template
_HEAD_BYTES = 1024
#: Of a page about a result that has no numbers of its own to show.
_TITLES: Mapping[ResultKind, str] = {
    "merge": "Merge",
    "bake": "Baked model",
    "extract": "Extracted adapter",
    "train": "Training",
    "tune": "Tuned merge",
    "calibrate": "Second moments of inputs",
    "convert": "Converted adapter",
}


@dataclass(frozen=True, repr=False)
class ReportResult(ShortRepr):
    """A written report.

    Attributes:
        page: the HTML file.
        figures: SVG and PNG files; empty when none were asked for.
        report: what is in them.
    """

    page: Path
    figures: tuple[Path, ...]
    report: Report


def make_report(
    runs: Sequence[Path],
    *,
    out: Path,
    title: str | None = None,
    figures: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ReportResult:
    """Write one page about some runs.

    Args:
        runs: run folders or result files of evaluations, and folders of written merges and searches.
        out: the page.
        title: of the page; what it is about when None.
        figures: folder for the same figures as SVG and PNG; none are drawn when None.
        force: replace the page at `out`, and files of the figures' names in `figures`.
        progress: receives stages and steps.

    Raises:
        ReportError: a path holds no run.
        MissingPackageError: jinja2 is not installed, or matplotlib, which draws the figures.
        OutputError: the page or a figure cannot be written, or exists already.
    """
    require("a report", {"report": ["jinja2", *["matplotlib"] * (figures is not None)]})
    if problem := page_problem(out, force=force):
        raise OutputError(problem)
    report = read_report(runs, progress)
    if figures is not None and (problem := place_problem(figures)):
        raise OutputError(problem)
    if figures is not None and not force and (problem := figures_problem(report, figures)):
        raise OutputError(problem)
    write_text_atomic(out, render(report, title=title or _title(report)), replace=force)
    drawn = write_figures(report, figures, force=force) if figures is not None else []
    return ReportResult(out, tuple(drawn), report)


def page_problem(page: Path, *, force: bool) -> str | None:
    """Return why a page must not be written; with `force` it may take the place of another page, and of nothing else."""
    if problem := place_problem(page):
        return problem
    if page.is_symlink() or (page.exists() and not page.is_file()):
        return f"{page} exists already, and is not a file. Choose another file."
    if not page.exists():
        return None
    if not force:
        return f"{page} exists already. Choose another file, or replace it with --force."
    with open_bytes(page) as file:
        is_page = _GENERATOR in file.read(_HEAD_BYTES)
    return None if is_page else f"{page} was not written by plait report; --force replaces only what was. Choose another file."


def _title(report: Report) -> str:
    if report.evaluations:
        return f"What {report.evaluations[0].name} kept"
    if report.comparison is not None:
        return f"Merges of {' + '.join(report.comparison.adapters)}"
    if report.studies:
        return f"Search over merges of {' + '.join(report.studies[0].adapters)}"
    if report.merges:
        return f"Merge by {report.merges[0].method}"
    return _TITLES[report.kinds[0]] if report.kinds else "Training"
