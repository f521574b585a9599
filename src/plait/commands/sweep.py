"""`plait sweep`, `plait.sweep`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.cluster.connection import check_address
from plait.commands.request import WritingOrder
from plait.evaluation.request import eval_spec
from plait.extras import require
from plait.folders import expanded
from plait.hub.pretrained import LoadOptions
from plait.mixture.loading import check_loading
from plait.notices import announce
from plait.recipes.candidates import search_problems
from plait.recipes.schema import Recipe
from plait.recipes.search import Range, SearchSpec
from plait.recipes.validation import check_recipe
from plait.results.progress import Progress, SilentProgress
from plait.results.threads import worker_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from plait.search.conclusion import SweepResult
    from plait.search.request import Sweep, SweepOptions
    from plait.search.status import StudyStatus

#: What is searched where nothing says what: methods that need no data, in the order of docs/results.md, and the scale.
_METHODS = ("iso_cts", "dc_merge", "tsv", "ties", "linear")
_SCALE = Range(min=0.1, max=3.0, log=True)


@dataclass(frozen=True, kw_only=True)
class SweepOrder(WritingOrder):
    """A search that is asked for; see `plait.sweep`.

    Attributes:
        eval: keys of the recipe's `eval`: how the best is judged in the end.
        storage: Optuna's address of a shared storage.
        warm_start: folders of earlier studies.
        cluster: address of the cluster on which candidates are asked; this process when None.
        workspace: where results and finished answers are kept.
        load: how the base is loaded.
    """

    out: Path
    eval: Mapping[str, Any] = field(default_factory=dict)
    storage: str | None = None
    warm_start: Sequence[str | Path] = ()
    cluster: str | None = None
    workspace: Path = Path("artifacts")
    load: LoadOptions = field(default_factory=LoadOptions)

    @cached_property
    def recipe(self) -> tuple[Recipe, Path | None]:
        """The recipe with its search, and the folder that its relative paths start from.

        Raises:
            RecipeError: with everything that is wrong.
        """
        recipe, folder = self.request.resolved
        recipe = recipe.changed(eval=eval_spec(recipe.eval, self.eval))
        if not recipe.search.ranges:
            recipe = recipe.changed(search=self._usual_search(recipe))
        return recipe, folder

    def plan(self, progress: Progress | None = None) -> Sweep:
        """Find and check everything, without loading a model.

        Raises:
            PlaitError: anything wrong with what was given.
        """
        _require_libraries(self.cluster)
        from plait.search.request import Sweep

        recipe, folder = self._checked()
        return Sweep(recipe, folder, self.out, self._options(), progress or SilentProgress())

    def run(self, progress: Progress | None = None) -> SweepResult:
        """Search, and ask the best once on examples that nothing was chosen on.

        Raises:
            PlaitError: anything wrong with what was given. Candidates that were evaluated are kept.
        """
        _require_libraries(self.cluster)
        from plait.search.pipeline import run_sweep

        recipe, folder = self._checked()
        return run_sweep(recipe, folder=folder, out=self.out, force=self.force, options=self._options(), progress=progress)

    def _checked(self) -> tuple[Recipe, Path | None]:
        worker_count(self.workers)
        check_loading(self.load.dtype, self.load.device_map)
        return self.recipe

    def _options(self) -> SweepOptions:
        from plait.search.request import SweepOptions

        earlier = tuple(expanded(place) for place in self.warm_start)
        return SweepOptions(self.workspace, self.load, self.workers, self.storage, earlier, self.cluster)

    def _usual_search(self, recipe: Recipe) -> SearchSpec:
        """Return a search where nothing says what is searched: the method, where none is named, and the scale.

        Raises:
            RecipeError: the scale is left to texts.
        """
        named = "method" in self.request.given or any(text.startswith("method") for text in self.request.sets)
        if not named and not isinstance(self.request.source, Recipe):
            named = self.request.parts[0] is not None and "method" in recipe.model_fields_set
        methods = () if named or isinstance(self.request.source, Recipe) else _METHODS
        space = {"scale": _SCALE} | ({"method": Range(values=methods)} if methods else {})
        found = recipe.search.model_copy(update={"space": space})
        data = recipe.model_dump(mode="json", by_alias=True, exclude={"search"})
        recipe.origins.refuse(search_problems(data, found, lambda candidate: check_recipe(candidate)[1]))
        shown = f"the method ({', '.join(methods)}) and the scale" if methods else "the scale"
        announce(
            f"nothing says what is searched (--space, --grid): {shown}, from {_SCALE.min:g} to {_SCALE.max:g}.",
            once="what is searched",
        )
        return found


@dataclass(frozen=True)
class SweepStatusOrder:
    """A look at a search, in this process or another, that runs or has ended; see `plait.sweep_status`.

    Attributes:
        folder: of the study.
        storage: Optuna's address of a shared storage; that in the folder when None.
    """

    folder: Path
    storage: str | None = None

    def run(self) -> StudyStatus:
        """Read how far it is.

        Raises:
            PlaitError: there is no study.
        """
        require("plait sweep", {"sweep": ["optuna"]})
        from plait.search.status import read_status

        return read_status(self.folder, self.storage)


def _require_libraries(cluster: str | None) -> None:
    """Refuse another address than that of a cluster, and missing packages, one of which only a cluster needs."""
    check_address(cluster)
    needed = {"eval": ["transformers", "accelerate", "jinja2"], "sweep": ["optuna", "scipy", "sklearn"]}
    require("plait sweep", {**needed, "ray": ["ray"] * (cluster is not None)})
