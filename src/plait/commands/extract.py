"""`plait extract`, `plait.extract`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from plait.commands.request import rank_or_energy
from plait.extraction.pipeline import ExtractResult, run_extract
from plait.extraction.request import ExtractRequest, make_request
from plait.results.progress import Progress


@dataclass(frozen=True)
class ExtractOrder:
    """An extraction that is asked for; see `plait.extract`."""

    base: str
    finetuned: str
    out: Path
    rank: int | str | None = None
    energy: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    force: bool = False
    workers: int | None = None

    @cached_property
    def request(self) -> ExtractRequest:
        """The models, the rank and the settings.

        Raises:
            RecipeError: with everything that is wrong.
        """
        rank = rank_or_energy(self.rank, self.energy)
        return make_request(base=self.base, finetuned=self.finetuned, rank=rank, **self.settings)

    def run(self, progress: Progress | None = None) -> ExtractResult:
        """Write the adapter.

        Raises:
            PlaitError: anything wrong with what was given; nothing is left at the output then.
        """
        return run_extract(self.request, out=self.out, force=self.force, workers=self.workers, progress=progress)
