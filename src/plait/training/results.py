"""What came of `plait train`, as it is printed and written to `train.json`."""

from __future__ import annotations

from typing import Literal

from plait.evaluation.record import Evaluation
from plait.records import Record
from plait.training.job import TrainingRecord

PHASES_VERSION = 1
RESULT = "train.json"
PhaseState = Literal["done", "found", "failed", "waiting"]
_OF_RECORD = ("digest", "examples", "steps", "tokens", "seconds", "resumed_from", "notes")


class PhaseResult(Record):
    """One phase.

    Attributes:
        name: of phase and adapter.
        state: trained now, found as an earlier run finished it, failed, or not yet trained.
        adapter: its folder, from the output's; None while there is none.
        digest: of the job.
        examples: trained on.
        steps: optimizer steps.
        tokens: seen in training, padding left out.
        seconds: of training, in the run that ended it.
        loss: the last that was logged; None where none was.
        resumed_from: step that the last run took up; None for a run from the start.
        error: why it failed.
        notes: on its data.
    """

    name: str
    state: PhaseState
    adapter: str | None = None
    digest: str
    examples: int | None = None
    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    loss: float | None = None
    resumed_from: int | None = None
    error: str | None = None
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(name: str, state: PhaseState, record: TrainingRecord, adapter: str) -> PhaseResult:
        """Describe a finished phase."""
        kept = {key: getattr(record, key) for key in _OF_RECORD}
        loss = record.losses[-1][1] if record.losses else None
        return PhaseResult(name=name, state=state, adapter=adapter, loss=loss, **kept)


class TrainResult(Record):
    """All phases, and what was made of them.

    Attributes:
        version: of this format.
        plait: version that made it.
        source: the file that was asked for.
        out: the output folder; all other paths start there.
        base_model: of all phases.
        phases: in the file's order.
        recipe: file of the merge's recipe; None while phases are missing.
        merged: folder of the merge; see `recipe`.
        merge_key: hash of everything that the merge depends on; see `recipe`.
        run: folder of the evaluation's files; None without tasks, or while phases are missing.
        report: the page; see `recipe`.
        evaluation: what was kept of every phase; see `run`.
        notes: what else is worth knowing.
        seconds: wall time of this run.
    """

    version: int = PHASES_VERSION
    plait: str
    source: str
    out: str
    base_model: str
    phases: tuple[PhaseResult, ...]
    recipe: str | None = None
    merged: str | None = None
    merge_key: str | None = None
    run: str | None = None
    report: str | None = None
    evaluation: Evaluation | None = None
    notes: tuple[str, ...] = ()
    seconds: float

    @property
    def failed(self) -> tuple[PhaseResult, ...]:
        """Phases that failed."""
        return tuple(p for p in self.phases if p.state == "failed")

    @property
    def ok(self) -> bool:
        """Whether no phase failed."""
        return not self.failed
