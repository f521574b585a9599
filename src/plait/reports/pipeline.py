"""Paths of runs → a page on disk, and figures beside it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plait.errors import OutputError
from plait.extras import require
from plait.merging.progress import Progress
from plait.reports.figures import write_figures
from plait.reports.page import render
from plait.reports.reading import Report, read_report


@dataclass(frozen=True)
class ReportResult:
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
        runs: run folders or result files of evaluations, and folders of written merges.
        out: the page.
        title: of the page; what it is about when None.
        figures: folder for the same figures as SVG and PNG; none are drawn when None.
        force: replace a file that stands at `out`.
        progress: who listens.

    Raises:
        ReportError: a path holds no run.
        MissingPackageError: jinja2 is not installed, or matplotlib, which draws the figures.
        OutputError: the page cannot be written, or stands already.
    """
    require("a report", {"report": ["jinja2", *["matplotlib"] * (figures is not None)]})
    if out.is_dir() or (out.exists() and not force):
        raise OutputError(
            f"{out} exists already. Choose another file" + ("." if out.is_dir() else ", or replace it with --force.")
        )
    report = read_report(runs, progress)
    _write(out, render(report, title=title or _title(report)))
    drawn = write_figures(report, figures) if figures is not None else []
    return ReportResult(out, tuple(drawn), report)


def _title(report: Report) -> str:
    if report.evaluations:
        return f"What {report.evaluations[0].name} kept"
    if report.comparison is not None:
        return f"Merges of {' + '.join(report.comparison.adapters)}"
    return f"Merge by {report.merges[0].method}" if report.merges else "Training"


def _write(path: Path, text: str) -> None:
    """Write a file that appears whole."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(3)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_text(text, encoding="utf-8")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from None
