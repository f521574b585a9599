"""How one phase is run, so that it may fail without the others: in this process here, by `worker` or `on_cluster` elsewhere."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from plait.errors import PlaitError
from plait.libraries.transformers.quiet import silence
from plait.results.progress import Progress
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

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes, as plain data for another process."""
        return {"record": None if self.record is None else self.record.model_dump(mode="json"), "error": self.error}

    @classmethod
    def from_json(cls, name: str, data: Mapping[str, Any]) -> PhaseStatus:
        """Return the status of the phase `name` that another process has sent."""
        return cls(name, None if data["record"] is None else TrainingRecord.model_validate(data["record"]), data["error"])


class SentProgress:
    """The `Progress` of a phase, here or in another process: every call becomes a tuple of plain data, for `receive`.

    Args:
        send: takes `("start", stage, total, unit)` or `("advance", steps)`.
    """

    def __init__(self, send: Callable[[tuple[Any, ...]], object]) -> None:
        self._send = send

    def start(self, stage: str, total: int, unit: str = "steps") -> None:
        """Send the beginning of a stage."""
        self._send(("start", stage, total, unit))

    def advance(self, steps: int = 1) -> None:
        """Send steps done."""
        self._send(("advance", steps))

    def finish(self) -> None:
        """Send nothing: the next stage, or the phase's end, implies it."""


def receive(progress: Progress, call: Sequence[Any]) -> None:
    """Make a call that a `SentProgress` has sent."""
    name, *arguments = call
    progress.start(*arguments) if name == "start" else progress.advance(*arguments)


def run_phase(name: str, job: TrainingJob, folder: Path, log: Path, progress: Progress) -> PhaseStatus:
    """Train one phase, or continue it; a failure becomes a status, and its traceback is written to the phase's log."""
    try:
        # what another job left unfinished there is of no use; what it finished has been moved away before
        return PhaseStatus(name, record=run_job(job, folder, force=True, progress=progress))
    except PlaitError as error:
        return PhaseStatus(name, error=str(error))
    except Exception as error:  # trainers raise anything, and the other phases must not suffer
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        words = " ".join(str(error).split())
        return PhaseStatus(name, error=f"{type(error).__name__}: {words[:300]} (all of it is in {log})")


def run_sequentially(phases: Sequence[PlannedPhase], parts: Mapping[str, Progress]) -> Iterator[PhaseStatus]:
    """Train phases one after another in this process."""
    for phase in phases:
        with silence():
            progress = SentProgress(partial(receive, parts[phase.name]))
            status = run_phase(phase.name, phase.job, phase.folder, phase.log, progress)
        yield status
        gc.collect()  # a trainer and its model hold each other
