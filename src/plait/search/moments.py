"""Second moments that candidates need: taken once for all of them, on the tasks' texts."""

from __future__ import annotations

from pathlib import Path

from plait.calibration.completion import complete_recipe
from plait.recipes.schema import Recipe
from plait.results.progress import Progress
from plait.search.request import SweepOptions, check_complete, check_place
from plait.search.space import SearchSpace


def with_moments(recipe: Recipe, folder: Path | None, out: Path, options: SweepOptions, progress: Progress) -> Recipe:
    """Return a recipe whose adapters have the second moments that it, or a method that is searched, needs.

    Args:
        recipe: to start from; it comes back as it is where no candidate lacks moments.
        folder: where its relative paths start; the working directory when None.
        out: folder of the study, which is checked before anything is computed.
        options: of this machine.
        progress: receives stages and steps.

    Raises:
        PlaitError: they cannot be taken; or a candidate would read texts for itself.
    """
    candidates = (recipe, *SearchSpace(recipe).of_every_method())
    lacking = next((candidate for candidate in candidates if candidate.lacks_moments and not candidate.is_sequential), None)
    if lacking is None:
        return recipe
    check_place(out)
    for candidate in candidates:
        check_complete(candidate, moments=True)
    found = complete_recipe(lacking, folder=folder, options=options.load, workers=options.workers, progress=progress).recipe
    places = [str(Path(entry.moments or "").absolute()) for entry in found.adapters]  # candidates may be merged elsewhere
    entries = (entry.model_copy(update={"moments": place}) for entry, place in zip(recipe.adapters, places, strict=True))
    return recipe.changed(*(("adapters", i, "moments") for i in range(len(places))), adapters=tuple(entries))
