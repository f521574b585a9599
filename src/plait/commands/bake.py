"""`plait bake`, `plait.bake`, `plait.plan_bake`; and the bake of `plait merge --bake-dir`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from plait.baking.pipeline import BakeResult, plan_bake, run_bake
from plait.baking.plan import BakeOptions, BakePlan, bake_options
from plait.cluster.connection import check_address
from plait.commands.request import WritingOrder, check_texts, needless_loading
from plait.errors import PlaitError, RecipeError
from plait.extras import require
from plait.hub.pretrained import LoadOptions
from plait.hub.upload import check_push
from plait.notices import announce
from plait.results.progress import Progress

if TYPE_CHECKING:
    from plait.verification.parity import ParityReport


@dataclass(frozen=True, repr=False)
class Baked(BakeResult):
    """A finished bake, and how it compares with the live merge.

    Attributes:
        parity: of the logits; None where there were no prompts.
    """

    parity: ParityReport | None = None


@dataclass(frozen=True, kw_only=True)
class BakeOrder(WritingOrder):
    """A bake that is asked for; see `plait.bake`."""

    dtype: str | None = None
    shard_size: str | None = None
    device: str = "cpu"
    dequantize: bool = False
    hash_base: bool = True
    prompts: Path | None = None
    push_to: str | None = None
    private: bool = False
    load: LoadOptions | None = None
    cluster: str | None = None

    @cached_property
    def options(self) -> BakeOptions:
        """Dtype, size of files, device, and what is hashed."""
        return bake_options(
            dtype=self.dtype,
            shard_size=self.shard_size,
            device=self.device,
            dequantize=self.dequantize,
            hash_base=self.hash_base,
        )

    def check(self) -> None:
        """Refuse what does not go together, and a recipe or options that are not valid.

        Raises:
            PlaitError: with what is wrong.
        """
        if self.private and self.push_to is None:
            raise RecipeError(
                "--private (private=) is for the repository of --push-baked-repo (push_to=); give both or neither."
            )
        check_address(self.cluster)
        require("plait bake", {"ray": ["ray"] * (self.cluster is not None)})
        _ = self.options, needless_loading(self.request.resolved[0], self.load, self.request.function)

    def _check_beforehand(self) -> None:
        """Refuse a repository or prompts that cannot be used, before the work begins."""
        if self.push_to is not None:
            check_push(self.push_to)
        if self.prompts is not None:
            from plait.verification.parity import check_parity_request

            check_parity_request(self.prompts, self.device)

    def plan(self) -> BakePlan:
        """Return what would be written; reads headers, no tensor.

        Raises:
            PlaitError: as `plait.bake`, as far as that shows without computing.
        """
        self.check()
        self._check_beforehand()
        recipe, folder = self.request.resolved
        check_texts(recipe, self.load, folder, self.request.function)
        return plan_bake(recipe, self.options, folder=folder, **self.writing)

    def run(self, progress: Progress | None = None) -> Baked:
        """Bake, compare with the live merge, upload.

        Raises:
            PlaitError: anything wrong with what was given; what is wrong after the bake leaves the model where it is.
        """
        self.check()
        self._check_beforehand()
        recipe, folder = self.request.resolved
        recipe, notes = self.complete_from_texts(recipe, folder, progress, self.load)
        for note in notes:
            announce(note)
        if (
            self.prompts is not None
            and (form := plan_bake(recipe, self.options, folder=folder, **self.writing).form) != "model"
        ):
            raise RecipeError(f"--check (check=) compares logits of a language model; this base is a {form}. Leave it out.")
        result = run_bake(recipe, self.options, folder=folder, progress=progress, cluster=self.cluster, **self.writing)
        parity = None
        try:
            if self.prompts is not None:
                from plait.verification.parity import check_parity

                parity = check_parity(result.folder, self.prompts, device=self.device, progress=progress)
            if self.push_to is not None:
                from plait.verification.publish import push_result

                result = replace(result, url=push_result(result.folder, self.push_to, private=self.private).url)
        except PlaitError as error:
            error.add_note(f"The model is complete in {result.folder}; `plait verify` and `plait push` continue from it.")
            raise
        return Baked(**{f.name: getattr(result, f.name) for f in fields(result)}, parity=parity)
