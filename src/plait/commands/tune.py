"""`plait tune`, `plait.tune`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from plait.commands.request import RecipeSource, recipe_or_adapters
from plait.recipes.schema import Recipe
from plait.results.progress import Progress
from plait.tuning.pipeline import TuneOptions, TuneResult, run_tune
from plait.tuning.request import tune_request


@dataclass(frozen=True)
class TuneOrder:
    """A tuning that is asked for; see `plait.tune`."""

    source: RecipeSource
    out: Path
    tasks: Sequence[str | Path] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    sets: Sequence[str] = ()
    options: TuneOptions = field(default_factory=TuneOptions)
    force: bool = False

    @cached_property
    def resolved(self) -> tuple[Recipe, Path | None]:
        """The recipe, and the folder that its relative paths start from.

        Raises:
            RecipeError: with everything that is wrong.
        """
        settings = {key: value for key, value in self.settings.items() if value is not None and value != {}}
        return tune_request(recipe_or_adapters(self.source), self.tasks, settings, self.sets)

    def run(self, progress: Progress | None = None) -> TuneResult:
        """Merge, and learn.

        Raises:
            PlaitError: anything wrong with what was given; nothing is left at the output then.
        """
        recipe, folder = self.resolved
        return run_tune(recipe, folder=folder, out=self.out, force=self.force, options=self.options, progress=progress)
