"""A report → one HTML page that needs nothing else: no script, no font, no picture, no network."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from plait.recipes.writing import to_yaml
from plait.reports.charts import (
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


def render(report: Report, *, title: str) -> str:
    """Return the page.

    Args:
        report: what to show.
        title: of the page.
    """
    import jinja2

    source = files("plait.reports").joinpath("templates", "report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": show_number, "share": show_share, "interval": show_interval, "place": place_name}
    return environment.from_string(source).render(title=title, report=report, **_parts(report))


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
        "layers": layer_maps(report.conflict) if report.conflict else (),
        "weights": weight_map(weights) if weights and not weights.constant else None,
        "chart": loss_chart(report.losses),
        "studies": tuple((study, study_panels(study)) for study in report.studies),
        "energy": tuple(energy_map(m) for m in report.merges if m.result == "truncated"),
        "recipe": to_yaml(public_values(dict(first.recipe))) if first and first.recipe else None,
    }
