"""`plait mix`, `plait.mix`: the live mixer, a page in the browser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.commands.request import Request, check_texts
from plait.errors import RecipeError
from plait.evaluation.request import eval_spec
from plait.extras import require
from plait.folders import absolute, expanded
from plait.hub.pretrained import LoadOptions
from plait.mixer.runs import is_run, recipe_of_run
from plait.mixture.loading import check_loading
from plait.recipes.request import is_recipe_file
from plait.recipes.schema import Recipe
from plait.results.progress import Progress
from plait.results.threads import worker_count

if TYPE_CHECKING:
    from plait.mixer.mixer import Mixer
    from plait.mixer.server import Server

OUT = Path("mixes")
_PORTS = range(1, 1 << 16)


@dataclass(frozen=True, kw_only=True)
class MixOrder:
    """A mixer that is asked for; see `plait.mix`.

    Attributes:
        request: adapters or a recipe; its source may also be the folder of a run.
        eval: keys of the recipe's `eval`.
        out: folder that Keep writes into.
        port: where the page is served; a free one when None.
        share: also through a public address.
        load: how the base is loaded.
        workers: modules merged at a time.
    """

    request: Request
    eval: Mapping[str, Any] = field(default_factory=dict)
    out: Path = OUT
    port: int | None = None
    share: bool = False
    load: LoadOptions = field(default_factory=LoadOptions)
    workers: int | None = None

    @cached_property
    def recipe(self) -> tuple[Recipe, Path | None]:
        """The recipe that the controls begin at, and the folder that its relative paths start from.

        Raises:
            RecipeError: with everything that is wrong.
        """
        recipe, folder = self._of_run if self._run is not None else self.request.resolved
        return recipe.changed(eval=eval_spec(recipe.eval, self.eval)), folder

    @cached_property
    def _run(self) -> Path | None:
        """The folder of the run that is opened; None for adapters and recipes."""
        source = self.request.source
        given = [source] if isinstance(source, (str, Path)) else [] if isinstance(source, (Recipe, Mapping)) else [*source]
        folder = expanded(given[0]) if len(given) == 1 and not is_recipe_file(given[0]) else None
        return folder if folder is not None and is_run(folder) else None

    @cached_property
    def _of_run(self) -> tuple[Recipe, Path | None]:
        assert self._run is not None, "asked for of a run alone"
        own = {key: value for key, value in self.request.given.items() if key != "base_model"}
        if own or self.request.sets or self.request.moments is not None:
            moments = ["moments"] * (self.request.function is not None)  # files of them are among the settings
            given = ", ".join([*own, *(text.partition("=")[0] for text in self.request.sets), *moments])
            raise RecipeError(
                f"{self._run}: opens as it was made, and its controls can be moved; these are for adapters: {given}."
            )
        recipe, folder = recipe_of_run(self._run)
        if (base := self.request.given.get("base_model")) is not None:
            recipe = recipe.changed(base_model=str(absolute(expanded(base))) if expanded(base).exists() else base)
        return self.request.with_tasks(recipe), folder

    def check(self) -> None:
        """Refuse what does not go together, a recipe that is not valid, and packages that are missing.

        Raises:
            PlaitError: with what is wrong.
        """
        require("plait mix", {"eval": ["transformers", "accelerate", "jinja2"], "mix": ["gradio"]})
        check_loading(self.load.dtype, self.load.device_map)
        _ = worker_count(self.workers)
        if self.port is not None and self.port not in _PORTS:
            raise RecipeError(f"--port (port=) must be a number from {_PORTS[0]} to {_PORTS[-1]}; got {self.port}.")
        recipe, folder = self.recipe
        if recipe.values_to_find:
            raise RecipeError(
                f"{', '.join(recipe.values_to_find)}: 'auto' is what the mixer's Suggest finds; give a number to begin at."
            )
        check_texts(recipe, None, folder, self.request.function)

    def plan(self, progress: Progress | None = None) -> Mixer:
        """Find and check adapters, base and tasks, without loading a model.

        Raises:
            PlaitError: anything wrong with what was given.
        """
        self.check()
        from plait.mixer.mixer import Mixer

        recipe, folder = self.recipe
        return Mixer(recipe, folder, replace(self.load, base=None), out=self.out, workers=self.workers, progress=progress)

    def run(self, progress: Progress | None = None) -> Server:
        """Load the base, and serve the page.

        Raises:
            PlaitError: anything wrong with what was given; or the port is taken.
        """
        mixer = self.plan(progress)
        from plait.mixer.server import Server

        mixer.open()
        return Server(mixer, port=self.port, share=self.share)
