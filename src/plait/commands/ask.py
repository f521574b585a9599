"""`plait ask`, `plait.ask`: what base, single adapters and a merge write to the same prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from plait.commands.request import Request, complete_from_texts
from plait.errors import AddressError, RecipeError
from plait.evaluation.candidates import merge_candidate
from plait.evaluation.generation import Sampling
from plait.evaluation.loaded_base import LoadedBase, with_used_dtype
from plait.evaluation.pipeline import find_base, find_saved
from plait.evaluation.replies import (
    Asking,
    AskResult,
    Listener,
    NoListener,
    Respondent,
    base_and_singles,
    heads_apart,
    read_prompts,
)
from plait.extras import require
from plait.hub.pretrained import LoadOptions
from plait.inspection.doubts import adapter_doubts
from plait.merging.inventory import naming_base, take_inventory
from plait.merging.plan import announce_zeros, make_plan
from plait.mixture.loading import check_loading
from plait.results.progress import Progress, SilentProgress


@dataclass(frozen=True)
class AskOrder:
    """Prompts that are asked; see `plait.ask`.

    Attributes:
        prompts: text, a file, or texts and chats.
        request: its source is one adapter or model when it is one reference that is not a recipe's file.
        sampling: how replies are written.
        system: the first message of every chat.
        plain: read prompts without the chat template.
        sources: the single adapters, for one adapter or model.
        load: how the base is loaded.
        workers: modules merged at a time.
    """

    prompts: str | Path | Sequence[str | Sequence[Mapping[str, str]]]
    request: Request
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    plain: bool = False
    sources: Mapping[str, str | Path] = field(default_factory=dict)
    load: LoadOptions = field(default_factory=LoadOptions)
    workers: int | None = None

    @property
    def saved(self) -> str | None:
        """The reference of the one adapter or model that replies as it is; None for a merge."""
        return self.request.saved

    @cached_property
    def merge_request(self) -> Request:
        """The request of a merge in memory."""
        return self.request.on(self.load.base)

    def check(self) -> None:
        """Refuse what does not go together, prompts that cannot be read, and recipes that are not valid.

        Raises:
            PlaitError: with what is wrong.
        """
        self.sampling.check()
        check_loading(self.load.dtype, self.load.device_map)
        read_prompts(self.prompts)
        if self.saved is None:
            if self.sources:
                raise RecipeError("--source (sources=) belongs to one adapter or model; these are merged in memory.")
            _ = self.merge_request.resolved
        elif given := ", ".join([*self.request.given, *(text.partition("=")[0] for text in self.request.sets)]):
            raise RecipeError(f"{self.saved} replies as it is; these belong to a merge: {given}.")

    def run(self, progress: Progress | None = None, listener: Listener | None = None) -> AskResult:
        """Ask everyone everything.

        Raises:
            PlaitError: as `plait.ask`.
        """
        require("plait ask", {"eval": ["transformers", "accelerate", "jinja2"]})
        self.check()
        progress = progress or SilentProgress()
        base, live, respondents, notes = self._merge(progress) if self.saved is None else self._saved(self.saved, progress)
        asking = Asking(live, respondents, read_prompts(self.prompts), self.sampling, self.system, self.plain)
        return asking.result(base, notes, listener or NoListener())

    def _merge(self, progress: Progress) -> tuple[str, LoadedBase, list[Respondent], list[str]]:
        recipe, folder = self.merge_request.resolved
        with recipe.origins.named():
            load = self.load if recipe.values_to_find or recipe.lacks_moments else None
            recipe, notes = complete_from_texts(recipe, load, folder=folder, workers=self.workers, progress=progress)
            inventory = take_inventory(recipe, folder)
            adapters = {a.name: a for a in inventory.adapters}
            with naming_base(recipe, inventory.adapters, given=self.load.base):
                base, place = find_base(recipe.base_model, folder, inventory.adapters, self.load.base)
            announce_zeros(recipe, make_plan(inventory, workers=1))
            merged = merge_candidate(inventory, adapters, workers=self.workers, progress=progress)
        live = LoadedBase(place.folder, inventory.adapters, with_used_dtype(self.load, place.folder), progress)
        respondents = [*base_and_singles(adapters), Respondent("merged", merged, recipe.heads.adapter)]
        return base, live, respondents, [*notes, *heads_apart(recipe, adapters), *adapter_doubts(inventory.adapters)]

    def _saved(self, reference: str, progress: Progress) -> tuple[str, LoadedBase, list[Respondent], list[str]]:
        saved = find_saved(reference, {name: str(path) for name, path in self.sources.items()})
        singles = {a.name: a for a, _, _ in saved.singles}
        own = [] if saved.adapter is None else [saved.adapter]
        everyone = [*singles.values(), *own]
        notes = [*(saved.notes if saved.lock is not None else ()), *adapter_doubts(everyone)]
        with naming_base(None, everyone, given=saved.base or self.load.base):
            try:
                base, place = find_base(saved.base, None, everyone, self.load.base)
            except AddressError:
                if own or saved.base is not None or self.load.base is not None:
                    raise
                base, place = reference, saved.place  # a full model needs no other to reply
        live = LoadedBase(place.folder, everyone, with_used_dtype(self.load, place.folder), progress)
        known = {a.name: a for a in everyone}
        others = [] if own or place.folder == saved.place.folder else [Respondent(saved.name, model=saved.place.folder)]
        alone = not known and not others
        return base, live, [*base_and_singles(known, saved.name if alone else "base"), *others], notes
