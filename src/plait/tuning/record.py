"""What a tuning did, as it is kept next to its result in `tuning.json`."""

from __future__ import annotations

from typing import Any

from plait.calibration.record import TextsOrigin
from plait.records import Record
from plait.tuning.coefficients import LearnedCoefficients
from plait.tuning.held_out import HeldOutScore
from plait.views import Viewed

TUNING = "tuning.json"


class SeenTexts(TextsOrigin):
    """The texts of one task, and the adapter whose answers were followed.

    Attributes:
        learned: how many of them were learned from; the others were only looked at.
        digest: hash of what was read.
        shown: the first three, as the model read them.
    """

    learned: int
    digest: str
    shown: tuple[str, ...]


class Control(Record):
    """What something else has learned from the same texts in as many steps: what the merge, or its adapters, are worth.

    Attributes:
        held: its look at the held-out texts that is kept.
        losses: the objective at every step.
    """

    held: HeldOutScore
    losses: tuple[float, ...]


class TuneRecord(Viewed, Record):
    """What was done.

    Attributes:
        plait: version.
        recipe: as run, every default spelled out.
        sources: the adapters; see `merging.record.sources`.
        texts: what was seen, per task.
        scale: factor on the closed form.
        scales: every scale that was tried, with the mean share of divergence (see `HeldOutScore`) that it left.
        base: task → mean KL(own adapter ‖ base) on the held-out texts, nats.
        looks: at the held-out texts, from the start on.
        losses: the objective at every step, on its texts.
        kept_step: the step whose factors were kept.
        rank: of the written adapter.
        distance: ‖M − M₀‖ / ‖M₀‖ of the result M and its start M₀; None where that is zero.
        outside: share of ‖M‖² outside of the joint row and column spaces of the sources: 0 for a weighted sum of them;
            `regmean` moves rows.
        objective: what was minimized.
        coefficients: that were learned; None where factors were.
        tree: per node of a hierarchy, the adapters of each of its children.
        control: a fresh LoRA, where it was asked for.
        random: random adapters of equal norms that learned in the same way, where they were asked for.
        notes: what else is to be known.
        seconds: stage → wall time.
        finished: local time, ISO 8601.
    """

    plait: str
    recipe: dict[str, Any]
    sources: tuple[dict[str, Any], ...]
    texts: tuple[SeenTexts, ...]
    scale: float
    scales: tuple[tuple[float, float], ...]
    base: dict[str, float]
    looks: tuple[HeldOutScore, ...]
    losses: tuple[float, ...]
    kept_step: int
    rank: int
    distance: float | None
    outside: float
    notes: tuple[str, ...]
    seconds: dict[str, float]
    finished: str
    control: Control | None = None
    random: Control | None = None
    coefficients: LearnedCoefficients | None = None
    tree: tuple[tuple[tuple[str, ...], ...], ...] = ()
    objective: str = "distill"

    @property
    def start(self) -> HeldOutScore:
        """The closed form at its scale, before the first step."""
        return self.looks[0]

    @property
    def kept(self) -> HeldOutScore:
        """What was written."""
        return next(h for h in self.looks if h.step == self.kept_step)
