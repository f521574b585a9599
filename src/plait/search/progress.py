"""Progress of a search: one stage per candidate, of the examples that it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from plait.results.progress import Progress

_EXAMPLES = "examples"


class TrialProgress:
    """A listener to merges and evaluations that shows those of one candidate as one stage, and others as they are.

    Args:
        progress: receives the stages.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._in_trial = self._asking = False

    @contextmanager
    def trial(self, name: str, total: int) -> Iterator[None]:
        """Show what is asked in the block as one stage.

        Args:
            name: of the candidate.
            total: examples that it is asked, at most.
        """
        self._progress.start(name, total, _EXAMPLES)
        self._in_trial = True
        try:
            yield
        finally:
            self._in_trial = False
            self._progress.finish()

    def start(self, stage: str, total: int, unit: str = "steps") -> None:
        """Begin a stage; of a candidate, only its examples count."""
        self._asking = unit == _EXAMPLES
        if not self._in_trial:
            self._progress.start(stage, total, unit)

    def advance(self, steps: int = 1) -> None:
        """Report steps done."""
        if not self._in_trial or self._asking:
            self._progress.advance(steps)

    def finish(self) -> None:
        """End the stage."""
        if not self._in_trial:
            self._progress.finish()
