"""`plait tune`, `plait.tune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from plait.commands.request import WritingOrder
from plait.mixture.loading import check_loading
from plait.results.progress import Progress
from plait.results.threads import worker_count
from plait.tuning.pipeline import TuneOptions, TuneResult, run_tune

START = "regmean"  # the merge that a tuning starts from, where no method is named


@dataclass(frozen=True, kw_only=True)
class TuneOrder(WritingOrder):
    """A tuning that is asked for; see `plait.tune`."""

    out: Path
    options: TuneOptions = field(default_factory=TuneOptions)

    def run(self, progress: Progress | None = None) -> TuneResult:
        """Merge, and learn.

        Raises:
            PlaitError: anything wrong with what was given; nothing is left at the output then.
        """
        worker_count(self.options.workers)
        check_loading(self.options.load.dtype, self.options.load.device_map)
        recipe, folder = self.request.resolved
        return run_tune(recipe, folder=folder, out=self.out, force=self.force, options=self.options, progress=progress)
