"""What came of a trial, as an attribute of Optuna's trial holds it."""

from __future__ import annotations

import math
from typing import Any, Self

from optuna.trial import FrozenTrial, TrialState
from pydantic import Field, model_validator

from plait.errors import OutputError
from plait.parsing import as_record
from plait.records import Record
from plait.search.record import Phase, Run, TaskOutcome

FOUND = "plait"  # a trial's attribute with what came of it
PHASE = "phase"  # and with how it came to be tried
ANEW = "Give another -o, or --force to begin anew there."


class Outcome(Record):
    """What came of a trial, as the storage has it.

    Attributes:
        params: path → value.
        key: hash of the merge.
        score: the first of what is maximized.
        worst: the worst recovery.
        mean: the mean recovery.
        results: per task.
        examples: how many it was asked.
        stopped: whether it could not win.
        expected: of one that was stopped, task → the recovery that it would have reached, and its standard deviation.
        error: why it cannot be merged.
        repeats: number of the trial with the same values.
        seconds: wall time.
    """

    params: dict[str, Any]
    key: str = ""
    score: float | None = None
    worst: float | None = None
    mean: float | None = None
    results: dict[str, TaskOutcome] = Field(default_factory=dict)
    examples: int = 0
    stopped: bool = False
    expected: dict[str, tuple[float, float]] = Field(default_factory=dict)
    error: str | None = None
    repeats: int | None = None
    seconds: float = 0.0

    @model_validator(mode="after")
    def _has_a_score(self) -> Self:
        """Refuse a candidate that was merged and has no number."""
        if self.error is None and self.score is None:
            raise ValueError("a candidate that could be merged has a score")
        return self


class Studied(Record):
    """One trial of the storage.

    Attributes:
        number: of the trial.
        phase: how it came to be tried.
        outcome: what came of it.
    """

    number: int
    phase: Phase
    outcome: Outcome

    @property
    def is_new(self) -> bool:
        """Whether it counts for the budget."""
        return self.phase in ("point", "search") and self.outcome.repeats is None and self.outcome.error is None

    def run(self) -> Run:
        """Return it as a study's record has it."""
        found = self.outcome
        details: dict[str, float | str | None] = (
            {"error": found.error}
            if found.error is not None
            else {"min_interference_delta": found.worst, "mean_interference_delta": found.mean}
        )
        return Run(
            number=self.number,
            phase=self.phase,
            params=found.params,
            score=found.score,
            score_details=details,
            results=found.results,
            key=found.key,
            examples=found.examples,
            stopped=found.stopped,
            nonnegative=found.worst is not None and found.worst >= 0,
            seconds=found.seconds,
        )


def as_told(value: float) -> float:
    """Return a score as Optuna gets it: itself, or v / (1 - v) below the base, which ends at -1.

    The order stays. A process that is fitted to one recovery of -4 among others of 0.6 to 0.7 takes those for equal.
    """
    return value if value >= 0 else value / (1 - value)


def studied(trial: FrozenTrial, where: str) -> Studied:
    """Return a trial that has ended as the storage has it.

    Args:
        trial: with what came of it.
        where: the storage, for messages.

    Raises:
        OutputError: what is there was not written by plait, or is damaged.
    """
    data = {
        "number": trial.number,
        "phase": trial.user_attrs.get(PHASE, "search"),  # a trial that Optuna suggested has none
        "outcome": trial.user_attrs[FOUND],
    }
    found = as_record(Studied, data, f"{where}: trial {trial.number}", OutputError, what="a candidate", advice=ANEW)
    score, values = found.outcome.score, trial.values or [None]
    if trial.state is TrialState.COMPLETE and (
        score is None or values[0] is None or not math.isclose(values[0], as_told(score))
    ):
        raise OutputError(f"{where}: trial {trial.number}: its value is {values[0]}, and its score {score}. {ANEW}")
    return found
