"""`plait report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plait.cli.options import Json


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Run folders of `plait eval` (or their result files), of one merge or of a leaderboard of many; and folders "
            "of written merges, for the energy they kept, or tuned ones, for what they learned. The page is about the first, "
            "of a leaderboard, about the best.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Title of the page.", show_default=False)] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Also write the figures here, as SVG and PNG.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the page at --out, and the figures.")] = False,
    json: Json = False,
) -> None:
    """Write one page that shows what a merge kept: readable offline, in one file.

    Example: plait report artifacts/compared/code_maths/run_20260102_030405 merged -o report.html --figures figures

    Example: plait report study -o study.html
    """
    from plait.cli.console import ProgressBars, print_json, print_notes
    from plait.cli.console import out as console
    from plait.commands.report import ReportOrder
    from plait.reports.verdict import verdict

    result = ReportOrder(runs, out, title, figures, force).run(ProgressBars())
    first = result.report.evaluations[0] if result.report.evaluations else None
    if json:
        summary = {
            "page": str(result.page),
            "figures": [str(f) for f in result.figures],
            "verdict": verdict(first) if first else None,
        }
        print_json(summary)
        return
    console().print(f"[bold]{result.page}[/bold] · {result.page.stat().st_size / 1e3:.0f} kB", highlight=False)
    if first is not None:
        console().print(verdict(first), markup=False)
    print_notes(result.report.notes, console())
    if result.figures:
        console().print(f"{len(result.figures)} figures in {figures}", markup=False)
