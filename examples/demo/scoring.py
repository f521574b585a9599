"""The three tasks of the demo, samples of them, and what follows from predicted labels: accuracy, recovery, intervals.

Knows nothing of models: it is given predictions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
NAMES = ("sentiment", "supersense", "langid")
Split = Literal["train", "validation", "test"]
_CONFIDENCE = 1.96  # standard errors on both sides: 95 %


@dataclass(frozen=True)
class Example:
    """A text and its gold label."""

    text: str
    label: str


@dataclass(frozen=True)
class Task:
    """A classification task as its adapter was trained on it: one prompt, the answer is the label.

    Attributes:
        name: one of `NAMES`; also of its adapter.
        prompt: chat text with a place for `{text}`, up to where the answer begins.
        labels: all possible answers.
    """

    name: str
    prompt: str
    labels: tuple[str, ...]

    @staticmethod
    def load(name: str) -> Task:
        """Read prompt and labels from the adapter's training record."""
        record = json.loads((HERE / "adapters" / name / "training.json").read_text(encoding="utf-8"))
        return Task(name, record["prompt"], tuple(record["labels"]))

    @property
    def adapter(self) -> Path:
        """The folder of the task's own adapter."""
        return HERE / "adapters" / self.name

    def ask(self, example: Example) -> str:
        """Return the prompt for one example."""
        return self.prompt.replace("{text}", example.text)

    def examples(self, split: Split, count: int | None = None) -> list[Example]:
        """Return a split, or a stratified sample of `count` from it.

        The sample is fixed: the first example of every label in the file's order, then the second of every label, and
        so on.
        """
        lines = (HERE / "tasks" / self.name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        everything = [Example(**json.loads(line)) for line in lines]
        if count is None:
            return everything
        by_label = [[e for e in everything if e.label == label] for label in self.labels]
        return [e for e in chain.from_iterable(zip_longest(*by_label)) if e is not None][:count]


def load_tasks() -> tuple[Task, ...]:
    """Return the three tasks."""
    return tuple(Task.load(name) for name in NAMES)


def hits(examples: Sequence[Example], predicted: Sequence[str]) -> NDArray[np.bool_]:
    """Return which predictions are the gold label, (n,)."""
    return np.array([e.label == p for e, p in zip(examples, predicted, strict=True)])


def margin(right: NDArray[np.bool_]) -> float:
    """Return the half width of the 95 % interval of an accuracy (Wilson's, which also holds when all are right)."""
    share, n, z = float(right.mean()), len(right), _CONFIDENCE
    return z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)


@dataclass(frozen=True)
class Outcome:
    """Which examples of one task the base model, the task's own adapter and a merged adapter got right; each (n,)."""

    base: NDArray[np.bool_]
    single: NDArray[np.bool_]
    merged: NDArray[np.bool_]

    @property
    def recovery(self) -> float:
        """(merged − base) / (single − base) of the accuracies; NaN where the single adapter gains nothing."""
        headroom = float(self.single.mean() - self.base.mean())
        return float(self.merged.mean() - self.base.mean()) / headroom if headroom > 0 else math.nan

    def resampled(self, rng: np.random.Generator) -> Outcome:
        """Draw as many examples with replacement, the same ones for all three."""
        picked = rng.integers(0, len(self.base), len(self.base))
        return Outcome(self.base[picked], self.single[picked], self.merged[picked])


def mean_and_worst(outcomes: Mapping[str, Outcome]) -> tuple[float, float]:
    """Return the mean and the smallest recovery over the tasks."""
    recoveries = [o.recovery for o in outcomes.values()]
    return float(np.mean(recoveries)), float(np.min(recoveries))


def intervals(outcomes: Mapping[str, Outcome], draws: int = 2000, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Return 95 % intervals of every task's recovery, and of `mean` and `worst`, by paired bootstrap over examples.

    Draws in which a single adapter gains nothing have no recovery and are left out.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(draws):
        drawn = {name: outcome.resampled(rng) for name, outcome in outcomes.items()}
        rows.append([*(o.recovery for o in drawn.values()), *mean_and_worst(drawn)])
    return {name: _middle(column) for name, column in zip([*outcomes, "mean", "worst"], np.array(rows).T, strict=True)}


def _middle(values: NDArray[np.float64]) -> tuple[float, float]:
    known = values[~np.isnan(values)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)
