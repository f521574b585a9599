"""What a result means, in a sentence or two."""

from __future__ import annotations

from plait.evaluation.comparison import Leaderboard
from plait.evaluation.record import Evaluation
from plait.reports.charts import show_share

_GOOD, _FAIR = 0.9, 0.7  # of the single adapters' gain


def verdict(found: Evaluation) -> str:
    """Return what an evaluation means, from its numbers alone."""
    if found.worst_recovery is None or found.mean_recovery is None:
        why = "; ".join(t.undefined for t in found.tasks if t.undefined)
        return f"No task has a recovery: {why or 'there is nothing to compare with'}."
    if found.below_base:
        lost = ", ".join(found.below_base)
        return f"Not good enough: worse than the bare base model on {lost}. {_numbers(found)}"
    word = "Good" if found.worst_recovery >= _GOOD else "Fair" if found.worst_recovery >= _FAIR else "Weak"
    meaning = {
        "Good": "every task keeps most of what its own adapter gained.",
        "Fair": "every task is better than the base, but some of the gain is lost.",
        "Weak": f"{found.worst_task} loses much of what its own adapter gained.",
    }[word]
    return f"{word}: {meaning} {_numbers(found)}"


def certainty(found: Evaluation) -> str:
    """Report how sure the worst recovery is, given the examples that were answered."""
    if found.worst_interval is None or found.worst_recovery is None:
        return ""
    low, high = found.worst_interval
    examples = sum(t.examples for t in found.tasks)
    sure = "The interval is wide: more examples would narrow it." if high - low > 0.3 else ""
    bounds = f"{show_share(low)} and {show_share(high)} (95\N{NO-BREAK SPACE}%)"
    return f"With {examples} examples the worst recovery is between {bounds}. {sure}".strip()


def leaderboard_position(found: Evaluation, board: Leaderboard) -> str:
    """Return an evaluation's position on a leaderboard; empty where it is not on it, or alone."""
    tags = [place.tag for place in board.places]
    if found.tag not in tags or len(tags) < 2:
        return ""
    rank, best = tags.index(found.tag) + 1, board.places[0]
    if rank == 1:
        return f"{found.name} is the best of {len(tags)} merges that were compared."
    return f"{found.name} is number {rank} of {len(tags)} merges that were compared; {best.name} is the best."


def _numbers(found: Evaluation) -> str:
    mean, worst = show_share(found.mean_recovery), show_share(found.worst_recovery)
    return f"On average {mean} is kept; the worst task, {found.worst_task}, keeps {worst}."
