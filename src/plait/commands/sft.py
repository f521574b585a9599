"""`plait sft`, `plait.sft`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from plait.errors import PlaitError, RecipeError, collect
from plait.results.progress import Progress
from plait.training.arguments import Flags, read_flags, read_keywords
from plait.training.sft import SftPlan, SftResult, plan_sft, run_sft

_PRINTED = ("dry_run", "json")  # flags that say what the command prints


@dataclass(frozen=True)
class SftOrder:
    """A training that is asked for by flags: words of a command line, or Python's keywords; see `plait.sft`."""

    given: Sequence[str] | Mapping[str, Any]

    @cached_property
    def flags(self) -> Flags:
        """The flags, read.

        Raises:
            RecipeError: a flag is not known, or its value is of the wrong kind; or a keyword is of the command line alone.
        """
        if not isinstance(self.given, Mapping):
            return read_flags(self.given)
        printed = [name for name in _PRINTED if name in self.given]
        wrong = [f"{name}= is of the command line, which prints; leave it out of a call." for name in printed]
        collect(RecipeError, wrong, "plait.sft")
        return read_keywords(self.given)

    @cached_property
    def _plan(self) -> SftPlan:
        try:
            return plan_sft(self.flags)
        except PlaitError as error:
            if self.flags.config is not None:
                error.add_note(f"Flags were also read from --config {self.flags.config}.")
            raise

    def plan(self) -> SftPlan:
        """Return what would be trained and written; trains nothing.

        Raises:
            PlaitError: flags, data, disk, folder or Hub do not allow it; everything that is wrong at once.
        """
        return self._plan

    def run(self, progress: Progress | None = None) -> SftResult:
        """Train, then merge and upload as the flags ask for.

        Raises:
            PlaitError: as `plan`.
        """
        return run_sft(self._plan, progress=progress)
