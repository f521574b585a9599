"""`plait convert`, `plait.convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.merging.conversion import ConvertPlan, ConvertResult, plan_convert, run_convert
from plait.results.progress import Progress


@dataclass(frozen=True, kw_only=True)
class ConvertOrder:
    """A conversion that is asked for; see `plait.convert`."""

    adapter: str
    to: str
    out: Path
    tower: str | None = None
    base_model: str | None = None
    force: bool = False

    def plan(self) -> ConvertPlan:
        """Return what would happen; reads headers, no factor.

        Raises:
            PlaitError: as `run`, as far as that shows without reading factors.
        """
        return plan_convert(self.adapter, **self._arguments)

    def run(self, progress: Progress | None = None) -> ConvertResult:
        """Write the adapter in the other format.

        Raises:
            PlaitError: anything wrong with what was given; nothing is left at the output then.
        """
        return run_convert(self.adapter, progress=progress, **self._arguments)

    @property
    def _arguments(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("to", "out", "force", "tower", "base_model")}
