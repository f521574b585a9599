"""`plait merge`, `plait.merge`, `plait.plan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from plait.commands.request import Request, WritingOrder, check_texts, needless_loading
from plait.errors import RecipeError
from plait.hub.pretrained import LoadOptions
from plait.hub.upload import check_push
from plait.merging.pipeline import MergeResult, plan_recipe, run_recipe
from plait.merging.plan import MergePlan
from plait.recipes.request import Adapters, is_recipe_file
from plait.recipes.schema import Recipe
from plait.results.progress import Progress

if TYPE_CHECKING:
    from plait.baking.pipeline import BakeResult
    from plait.baking.plan import BakePlan
    from plait.commands.bake import BakeOrder


@dataclass(frozen=True, repr=False)
class Merged(MergeResult):
    """A finished merge, and the model that was baked with it.

    Attributes:
        baked: the model; None where there is none.
    """

    baked: BakeResult | None = None


@dataclass(frozen=True, kw_only=True)
class MergeOrder(WritingOrder):
    """A merge that is asked for; see `plait.merge`."""

    push_to: str | None = None
    private: bool = False
    add: Adapters | None = None
    inputs: Mapping[str, str | Path] = field(default_factory=dict)
    from_merged: bool = False
    bake_dir: Path | None = None
    push_baked_to: str | None = None
    load: LoadOptions | None = None

    def check(self) -> None:
        """Refuse what does not go together, and a recipe that is not valid.

        Raises:
            PlaitError: with what is wrong.
        """
        if self.private and self.push_to is None and self.push_baked_to is None:
            raise RecipeError(
                "--private (private=) is for the repository of --push-adapter-repo (push_to=); give both or neither."
            )
        if self.push_baked_to is not None and self.bake_dir is None:
            raise RecipeError(
                "--push-baked-repo (push_baked_to=) uploads the model of --bake-dir (bake_dir=); give both or neither."
            )
        if not self.add and (self.from_merged or self.inputs):
            raise RecipeError(
                "--from-merged (from_merged=) and --input (inputs=) are for --add NEW (add=), which adds an adapter to an "
                "earlier merge."
            )
        needless_loading(self._resolved[0], self.load, self.request.function)

    @cached_property
    def _earlier(self) -> Path:
        """The folder of the earlier merge that adapters are added to."""
        source = self.request.source
        given = [source] if isinstance(source, (str, Path, Recipe)) else list(source)
        if len(given) != 1 or isinstance(source, (Recipe, Mapping)) or is_recipe_file(str(given[0])):
            found = "a Recipe" if isinstance(source, Recipe) else " ".join(map(str, given))
            raise RecipeError(f"--add (add=) takes one earlier merge, a folder with its plait.lock; got {found}.")
        return Path(str(given[0]))

    @cached_property
    def _resolved(self) -> tuple[Recipe, Path | None, Path | None, tuple[str, ...]]:
        """Recipe, where its paths start, the base model's folder, and notes."""
        if not self.add:
            return *self.request.resolved, None, ()
        from plait.verification.extend import extend

        places = {name: str(place) for name, place in self.inputs.items()}
        given, sets = self.request.given, self.request.sets
        found = extend(self._earlier, self.add, given, sets, inputs=places, from_merged=self.from_merged)
        return self.request.with_tasks(found.recipe), None, found.base_folder, found.notes

    def _bake(self, recipe: Recipe, folder: Path | None) -> BakeOrder | None:
        """The bake of the same recipe; None where none is asked for."""
        if self.bake_dir is None:
            return None
        from plait.commands.bake import BakeOrder

        return BakeOrder(
            request=Request(recipe if folder is None else recipe.placed(folder), moments=self.request.function),
            out=self.bake_dir,
            force=self.force,
            workers=self.workers,
            push_to=self.push_baked_to,
            private=self.private and self.push_baked_to is not None,
        )

    def _check_push(self) -> None:
        if self.push_to is not None:
            check_push(self.push_to)

    def plan(self) -> MergePlan:
        """Return what would happen; reads headers, no tensor.

        Raises:
            PlaitError: as `plait.merge`, as far as that shows without computing.
        """
        self.check()
        self._check_push()
        recipe, folder, base_folder, notes = self._resolved
        notes += needless_loading(recipe, self.load, self.request.function)
        check_texts(recipe, self.load, folder, self.request.function)
        plan = plan_recipe(recipe, folder=folder, base_folder=base_folder, **self.writing)
        return plan.model_copy(update={"notes": (*plan.notes, *notes)})

    def plan_bake(self) -> BakePlan | None:
        """Return what the bake would do; None where there is none."""
        self.check()
        bake = self._bake(*self._resolved[:2])
        return None if bake is None else bake.plan()

    def run(self, progress: Progress | None = None) -> Merged:
        """Merge, upload, bake.

        Raises:
            PlaitError: anything wrong with what was given; nothing is left at the output then.
        """
        self.check()
        self._check_push()
        recipe, folder, base_folder, notes = self._resolved
        recipe, found = self.complete_from_texts(recipe, folder, progress, self.load)
        if (bake := self._bake(recipe, folder)) is not None:
            bake.plan()
        result = run_recipe(
            recipe, folder=folder, base_folder=base_folder, notes=(*notes, *found), progress=progress, **self.writing
        )
        if self.push_to is not None:
            from plait.verification.publish import push_result

            result = replace(result, url=push_result(result.folder, self.push_to, private=self.private).url)
        values = {f.name: getattr(result, f.name) for f in fields(result)}
        return Merged(**values, baked=None if bake is None else bake.run(progress))
