"""Answers, and what makes a number of them.

Every metric is a function of sums over examples: `statistics` are what is summed, `from_sums` makes the number. So a
bootstrap over examples is a product of two matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from plait.records import Record

FloatArray = NDArray[np.float64]


class Answer(Record):
    """What was made of one example.

    Attributes:
        id: of the example.
        target: the right answer.
        given: the answer; None for perplexity, where none is given.
        scores: log-likelihood per choice (nats, before `length` and `calibrated`); of the target alone for perplexity;
            the head's outputs for sequence classification; empty for generation. Of the harness's tasks, its metric's value
            of this example, one number or a sum and its weight; empty where it has none.
        tokens: number of tokens of each scored text; empty for sequence classification, generation and the harness.
    """

    id: str
    target: str
    given: str | None
    scores: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Metric:
    """How answers are judged.

    Attributes:
        name: as in a task's file.
        higher_is_better: its orientation.
        statistics: answers → (n, k), to be summed over examples.
        from_sums: (…, k) → (…); NaN where it is not defined.
        value: answers → the reported number.
        stderr: answers → its standard error, as the harness's own tasks report it; None for other tasks.
        outcomes: statistics → what one more example might be, (variants, 2, k): wrong and right, in so many ways. None where
            examples are not right or wrong.
    """

    name: str
    higher_is_better: bool
    statistics: Callable[[Sequence[Answer]], FloatArray]
    from_sums: Callable[[FloatArray], FloatArray]
    value: Callable[[Sequence[Answer]], float]
    stderr: Callable[[Sequence[Answer]], float | None] = lambda answers: None
    outcomes: Callable[[FloatArray], FloatArray | None] = lambda statistics: None


def summed(name: str, statistics: Callable[[Sequence[Answer]], FloatArray], *, higher_is_better: bool = True) -> Metric:
    """Return a ratio of two sums: a mean of shares where higher is better."""

    def value(answers: Sequence[Answer]) -> float:
        return float(ratio(statistics(answers).sum(0)))

    return Metric(name, higher_is_better, statistics, ratio, value, outcomes=of_shares)


def of_shares(statistics: FloatArray) -> FloatArray | None:
    """Return the worst and the best example of a mean of shares; None where values are not shares."""
    values, weights = statistics[:, 0], statistics[:, 1]
    plain = np.isin(weights, (0, 1)).all() and (values >= 0).all() and (values <= 1).all()
    return np.array([[[0.0, 1.0], [1.0, 1.0]]]) if plain else None


def ratio(sums: FloatArray) -> FloatArray:
    """Return the first of two sums over the second, (…, 2) → (…); NaN where both are 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])
