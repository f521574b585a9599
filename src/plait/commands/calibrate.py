"""`plait calibrate`, `plait.calibrate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from plait.calibration.pipeline import CalibrateResult, run_calibrate
from plait.calibration.record import CalibrationPlan
from plait.calibration.request import CalibrateOptions, calibration_recipe, read_calibration
from plait.commands.request import RecipeSource, recipe_or_adapters
from plait.errors import RecipeError
from plait.recipes.schema import Recipe
from plait.results.progress import Progress


@dataclass(frozen=True)
class CalibrateOrder:
    """A calibration that is asked for; see `plait.calibrate`."""

    source: RecipeSource
    tasks: Sequence[str | Path] | None = None
    out: Path | None = None
    base_model: str | None = None
    spec: Mapping[str, Any] = field(default_factory=dict)
    sets: Sequence[str] = ()
    options: CalibrateOptions = field(default_factory=CalibrateOptions)
    force: bool = False

    @cached_property
    def resolved(self) -> tuple[Recipe, Path | None]:
        """The recipe, and the folder that its relative paths start from.

        Raises:
            RecipeError: with everything that is wrong.
        """
        spec = {key: value for key, value in self.spec.items() if value is not None}
        return calibration_recipe(recipe_or_adapters(self.source), self.tasks, self.base_model, spec, self.sets)

    def plan(self) -> CalibrationPlan:
        """Return texts and sizes; loads no model.

        Raises:
            PlaitError: as `plait.calibrate`, before a model is loaded.
        """
        return read_calibration(*self.resolved, self.options).plan()

    def run(self, progress: Progress | None = None) -> CalibrateResult:
        """Take the moments.

        Raises:
            PlaitError: anything wrong with what was given; nothing is left at the output then.
        """
        if self.out is None:
            raise RecipeError("--out FOLDER (-o, out=) is missing: where should the moments be written?")
        recipe, folder = self.resolved
        return run_calibrate(recipe, folder=folder, out=self.out, force=self.force, options=self.options, progress=progress)
