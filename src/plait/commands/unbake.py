"""`plait un-bake`, `plait.unbake`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from plait.baking.unbake import UnbakeResult, run_unbake
from plait.results.progress import Progress


@dataclass(frozen=True)
class UnbakeOrder:
    """A subtraction that is asked for; see `plait.unbake`."""

    model: str
    adapter: str
    out: Path
    weight: float | None = None
    original: str | None = None
    force: bool = False
    workers: int | None = None

    def run(self, progress: Progress | None = None) -> UnbakeResult:
        """Subtract the adapter, and compare with the original.

        Raises:
            PlaitError: as `plait.unbake`.
        """
        return run_unbake(
            self.model,
            self.adapter,
            out=self.out,
            weight=self.weight,
            original=self.original,
            force=self.force,
            workers=self.workers,
            progress=progress,
        )
