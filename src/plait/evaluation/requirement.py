"""What a result must reach to be kept: `worst_recovery>=0.8`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from plait.errors import RecipeError, did_you_mean
from plait.evaluation.record import Evaluation

_SIGNS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_TOTALS = ("worst_recovery", "mean_recovery", "below_base")
_FORM = re.compile(r"\s*(?P<what>[\w.-]+?)\s*(?P<sign>>=|<=|>|<)\s*(?P<bound>[-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*")


@dataclass(frozen=True)
class Requirement:
    """A bound on one number of an evaluation.

    Attributes:
        what: `worst_recovery`, `mean_recovery`, `below_base` (how many tasks), `TASK.recovery` or `TASK.metric`.
        sign: `>=`, `<=`, `>` or `<`.
        bound: the number.
    """

    what: str
    sign: str
    bound: float

    @staticmethod
    def read(text: str) -> Requirement:
        """Read `worst_recovery>=0.8`.

        Raises:
            RecipeError: it is not of that form.
        """
        found = _FORM.fullmatch(text)
        try:
            if found is None:
                raise ValueError
            requirement = Requirement(found["what"], found["sign"], float(found["bound"]))
        except ValueError:
            raise RecipeError(
                f"--require {text!r}: write a name, >= or <=, and a number, such as worst_recovery>=0.8."
            ) from None
        if requirement.what not in _TOTALS and not requirement.what.endswith((".recovery", ".metric")):
            known = f"{', '.join(_TOTALS)}, TASK.recovery or TASK.metric"
            raise RecipeError(f"--require {text!r}: allowed are {known}.{did_you_mean(requirement.what, _TOTALS)}")
        return requirement

    def check_tasks(self, tasks: list[str]) -> None:
        """Make sure that its task is evaluated.

        Raises:
            RecipeError: it is not.
        """
        task = self.what.rpartition(".")[0]
        if self.what not in _TOTALS and task not in tasks:
            raise RecipeError(
                f"--require {self}: {task!r} is not one of the tasks {', '.join(tasks)}.{did_you_mean(task, tasks)}"
            )

    def value(self, found: Evaluation) -> float | None:
        """Return its number; None where it is not defined."""
        if self.what == "below_base":
            return float(len(found.below_base))
        if self.what in _TOTALS:
            return float(v) if (v := getattr(found, self.what)) is not None else None
        task, _, which = self.what.rpartition(".")
        result = next(t for t in found.tasks if t.task == task)
        return result.recovery if which == "recovery" else result.merged

    def met(self, found: Evaluation) -> bool:
        """Whether it holds; never where the number is not defined, nor for recoveries while some task has none."""
        value = self.value(found)
        total = self.what in ("worst_recovery", "mean_recovery")
        return value is not None and not (total and found.undefined) and _SIGNS[self.sign](value, self.bound)

    def __str__(self) -> str:
        """Write it as it is read."""
        return f"{self.what}{self.sign}{self.bound:g}"
