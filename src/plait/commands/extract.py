"""`plait extract`, `plait.extract`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from plait.commands.request import LowRankOrder
from plait.extraction.pipeline import ExtractResult, run_extract
from plait.extraction.request import ExtractRequest, make_request
from plait.results.progress import Progress


@dataclass(frozen=True, kw_only=True)
class ExtractOrder(LowRankOrder):
    """An extraction that is asked for; see `plait.extract`."""

    base: str
    finetuned: str

    @cached_property
    def request(self) -> ExtractRequest:
        """The models, the rank and the settings.

        Raises:
            RecipeError: with everything that is wrong.
        """
        return make_request(base=self.base, finetuned=self.finetuned, rank=self.wanted_rank, **self.settings)

    def run(self, progress: Progress | None = None) -> ExtractResult:
        """Write the adapter.

        Raises:
            PlaitError: anything wrong with what was given; nothing is left at the output then.
        """
        return run_extract(self.request, out=self.out, force=self.force, workers=self.workers, progress=progress)
