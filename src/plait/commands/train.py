"""`plait train`, `plait.train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from plait.errors import RecipeError
from plait.evaluation.pipeline import EvaluateOptions
from plait.hub.pretrained import LoadOptions
from plait.mixture.loading import check_loading
from plait.results.progress import Progress
from plait.training.cohort import Scheduling, check_scheduling, train_cohort
from plait.training.estimate import Forecast, forecast
from plait.training.phases import TrainingPlan
from plait.training.preflight import resolve_phases
from plait.training.reading import read_phases
from plait.training.results import TrainResult


@dataclass(frozen=True)
class TrainOrder:
    """A training that is asked for; see `plait.train`."""

    phases: str | Path | Mapping[str, Any]
    out: Path | None = None
    only: Sequence[str] = ()
    workers: int | None = None
    cluster: str | None = None
    base: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    sets: Sequence[str] = ()
    matrix: bool = False
    load: LoadOptions = field(default_factory=LoadOptions)

    @cached_property
    def folder(self) -> Path:
        """Where everything is written: of a file, in the workspace when no folder is given.

        Raises:
            RecipeError: neither file nor folder is given.
        """
        if self.out is not None:
            return self.out
        if isinstance(self.phases, Mapping):
            raise RecipeError("--out FOLDER (out=) is missing: phases that are not a file have no folder of their own.")
        return Path("artifacts", "trained", Path(self.phases).stem)

    @cached_property
    def training(self) -> TrainingPlan:
        """The phases.

        Raises:
            PlaitError: with everything that is wrong with them; or on how they are run, or the base is loaded after them.
        """
        check_scheduling(self._scheduling)
        check_loading(self.load.dtype, self.load.device_map)
        return read_phases(self.phases, out=self.folder, base=self.base, settings=self.settings, sets=self.sets)

    @property
    def _scheduling(self) -> Scheduling:
        return Scheduling(self.workers, self.cluster)

    def plan(self) -> list[Forecast]:
        """Return what every phase would take; trains nothing.

        Raises:
            PlaitError: as `plait.train`, before the first step.
        """
        plan = self.training
        wanted = [plan.phase(name) for name in self.only] or plan.phases
        return [forecast(p, plan.out) for p in resolve_phases(plan) if p.phase in wanted]

    def run(self, progress: Progress | None = None) -> TrainResult:
        """Train, merge, evaluate, report.

        Args:
            progress: receives stages and steps; those of phases where it has parts (`PartedProgress`).

        Raises:
            PlaitError: as `plait.train`.
        """
        return train_cohort(
            self.training,
            only=self.only,
            scheduling=self._scheduling,
            evaluation=EvaluateOptions(load=self.load, matrix=self.matrix),
            progress=progress,
        )
