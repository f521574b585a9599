"""From a recipe with a search to the best candidate."""

from __future__ import annotations

from pathlib import Path

from plait.recipes.schema import Recipe
from plait.results.locking import locked
from plait.results.progress import Progress, SilentProgress
from plait.search.conclusion import SweepResult, conclude
from plait.search.request import OWN_FILES, Sweep, SweepOptions
from plait.search.study import LOCK, Study
from plait.search.trying import Trials


def run_sweep(
    recipe: Recipe, *, folder: Path | None, out: Path, force: bool, options: SweepOptions, progress: Progress | None = None
) -> SweepResult:
    """Search, choose, and ask the best once on the split of `eval`.

    Args:
        recipe: to start from; its `search` says what changes.
        folder: where its relative paths start; the working directory when None.
        out: folder of the study; one that is there already is continued.
        force: begin anew where another search is there.
        options: of this machine.
        progress: receives stages and steps.

    Raises:
        PlaitError: anything wrong with what was given. Candidates that were evaluated are kept, and not evaluated again.
    """
    sweep = Sweep(recipe, folder, out, options, progress or SilentProgress())
    with locked(out / LOCK, "a search"):
        if force:
            for name in OWN_FILES:
                (out / name).unlink(missing_ok=True)
        study = Study(out, options.storage, sweep.name, sweep.space, len(sweep.spec.maximize))
        trials = Trials(sweep, study)
        reason = trials.run()
        return conclude(sweep, study, trials.start, reason)
