"""One phase as an attempt that may fail without the others, and all of them one after another in this process."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from plait.errors import PlaitError
from plait.libraries.transformers import silence
from plait.training.job import TrainingJob, TrainingRecord
from plait.training.phases import PlannedPhase
from plait.training.running import run_job


@dataclass(frozen=True)
class PhaseStatus:
    """How a phase ended.

    Attributes:
        name: of the phase.
        record: what training did; None when it failed.
        error: why it failed; None when it did not.
    """

    name: str
    record: TrainingRecord | None = None
    error: str | None = None


class PhaseListener(Protocol):
    """A listener to phases, of which several may run at a time."""

    def begin(self, phase: str, stage: str, total: int, unit: str) -> None:
        """Learn that a phase begins a stage of `total` steps; the one before is over."""

    def advance(self, phase: str, steps: int) -> None:
        """Learn of steps done."""

    def end(self, outcome: PhaseStatus) -> None:
        """Learn that a phase is over."""


class PhaseProgress:
    """A phase's `Progress`, told to a listener of many.

    Args:
        phase: its name.
        listener: who listens.
    """

    def __init__(self, phase: str, listener: PhaseListener) -> None:
        self._phase, self._watcher = phase, listener

    def start(self, stage: str, total: int, unit: str = "steps") -> None:
        """Begin a stage."""
        self._watcher.begin(self._phase, stage, total, unit)

    def advance(self, steps: int = 1) -> None:
        """Report steps done."""
        self._watcher.advance(self._phase, steps)

    def finish(self) -> None:
        """End a stage; what comes next says so."""


def attempt(name: str, job: TrainingJob, folder: Path, log: Path, listener: PhaseListener) -> PhaseStatus:
    """Train one phase, or go on with it; a failure is an outcome, and its traceback goes into the phase's log."""
    try:
        # what another job left unfinished there is of no use; what it finished has been moved away before
        return PhaseStatus(name, record=run_job(job, folder, force=True, progress=PhaseProgress(name, listener)))
    except PlaitError as error:
        return PhaseStatus(name, error=str(error))
    except Exception as error:  # trainers raise anything, and the other phases must not suffer
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        words = " ".join(str(error).split())
        return PhaseStatus(name, error=f"{type(error).__name__}: {words[:300]} (the whole of it is in {log})")


def in_turn(phases: Sequence[PlannedPhase], listener: PhaseListener) -> Iterator[PhaseStatus]:
    """Train phases one after another in this process."""
    for phase in phases:
        with silence():
            outcome = attempt(phase.name, phase.job, phase.folder, phase.log, listener)
        yield outcome
        gc.collect()  # a trainer and its model hold each other
