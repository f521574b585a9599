"""`plait inspect`, `plait.inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from plait.inspection.report import Inspection, inspect_adapters
from plait.merging.inventory import open_adapters
from plait.results.progress import Progress


@dataclass(frozen=True)
class InspectOrder:
    """An inspection that is asked for; see `plait.inspect`."""

    source: Sequence[str | Path] | Mapping[str, str | Path]
    base_model: str | None = None
    workers: int | None = None

    def run(self, progress: Progress | None = None) -> Inspection:
        """Measure the adapters.

        Raises:
            PlaitError: adapters cannot be found or opened; all of them at once.
        """
        pairs = self.source.items() if isinstance(self.source, Mapping) else [(None, text) for text in self.source]
        _, adapters = open_adapters([(name, str(text)) for name, text in pairs])
        return inspect_adapters(adapters, base_model=self.base_model, workers=self.workers, progress=progress)
