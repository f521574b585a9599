"""A report → one HTML page that needs nothing else: no script, no font, no picture, no network."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

from plait.recipes.writing import to_yaml
from plait.reports.charts import (
    confusion_maps,
    energy_map,
    interference_map,
    layer_maps,
    leaderboard_recoveries,
    recovery_bars,
    show_interval,
    show_number,
    show_share,
    task_recoveries,
    weight_map,
)
from plait.reports.losses import loss_chart
from plait.reports.reading import Report
from plait.reports.studies import study_panels
from plait.reports.verdict import certainty, leaderboard_position, verdict
from plait.results.public import place_name, public_values

if TYPE_CHECKING:
    import jinja2


def render(report: Report, *, title: str) -> str:
    """Return the page.

    Args:
        report: what to show.
        title: of the page.
    """
    page = template("report.html.j2").render(title=title, report=report, **_parts(report))
    return page.replace("\0", "\N{SYMBOL FOR NULL}")  # which models say, and no page may hold


def template(name: str) -> jinja2.Template:
    """Return a template of a page, or of a part of one; every text that it shows is escaped."""
    import jinja2

    folder = files("plait.reports").joinpath("templates")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda file: folder.joinpath(file).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": show_number, "share": show_share, "interval": show_interval, "place": place_name}
    return environment.get_template(name)


def _parts(report: Report) -> dict[str, Any]:
    first = report.evaluations[0] if report.evaluations else None
    board, weights = report.comparison, report.weights
    return {
        "first": first,
        "verdict": verdict(first) if first else "",
        "certainty": certainty(first) if first else "",
        "standing": leaderboard_position(first, board) if first and board else "",
        "kept": recovery_bars(task_recoveries(first.tasks)) if first else None,
        "places": recovery_bars(leaderboard_recoveries(board)) if board else None,
        "interference": interference_map(first) if first else None,
        "confusion": confusion_maps(first) if first else (),
        "layers": layer_maps(report.conflict) if report.conflict else (),
        "weights": weight_map(weights) if weights and not weights.constant else None,
        "chart": loss_chart(report.losses),
        "studies": tuple((study, study_panels(study)) for study in report.studies),
        "energy": tuple(energy_map(m) for m in report.merges if m.result == "truncated"),
        "recipe": to_yaml(public_values(dict(first.recipe))) if first and first.recipe else None,
    }
