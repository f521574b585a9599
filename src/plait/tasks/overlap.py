"""Splits that share examples: what is chosen on one may then not be judged on the other."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

from plait.errors import TaskError, collect
from plait.recipes.evaluation import SplitName
from plait.records import Record
from plait.tasks.examples import Examples
from plait.tasks.schema import Task


class Overlap(Record):
    """Two splits with questions in common, compared by the hash of what the model is asked.

    Attributes:
        first: a split.
        second: the other.
        shared: how many examples of the second are also in the first.
        of: how many examples the second has.
        example: the prompt of one of them.
    """

    first: SplitName
    second: SplitName
    shared: int
    of: int
    example: str

    @property
    def forbidden(self) -> bool:
        """Whether results would be worthless: what is chosen on one of the two is judged on the other.

        The training split is the adapters' own; what it shares is worth a note.
        """
        return self.first != "train"

    def __str__(self) -> str:
        """Describe it in words."""
        return f"{self.shared} of {self.of} examples of {self.second!r} are in {self.first!r} too, such as {self.example!r}"


def overlaps(splits: Mapping[SplitName, Examples]) -> list[Overlap]:
    """Return all pairs of splits that share questions."""
    found = []
    for (first, one), (second, other) in combinations(splits.items(), 2):
        known = {e.question for e in one.items}
        shared = [e for e in other.items if e.question in known]
        if shared:
            text = (shared[0].prompt_text or shared[0].target)[-80:]
            found.append(Overlap(first=first, second=second, shared=len(shared), of=len(other.items), example=text))
    return found


def check_disjoint(task: Task, found: list[Overlap]) -> list[str]:
    """Return notes on what the training split shares.

    Raises:
        TaskError: calibration, validation and test are not disjoint.
    """
    problems = [f"task {task.name!r}: {overlap}." for overlap in found if overlap.forbidden]
    collect(TaskError, problems, "splits that must be disjoint are not")
    return [f"task {task.name!r}: {overlap}." for overlap in found if not overlap.forbidden]
