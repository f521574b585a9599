"""Answers → a number.

Every metric is a function of sums over examples: `statistics` are what is summed, `from_sums` makes the number. So a
bootstrap over examples is a product of two matrices. Macro-F1's own value is scikit-learn's, word alignment is jiwer's,
ROUGE is rouge-score's.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait.extras import optional, require
from plait.records import Record
from plait.tasks import harness
from plait.tasks.schema import LmEval, Normalization, Task

Array = NDArray[np.float64]


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
    statistics: Callable[[Sequence[Answer]], Array]
    from_sums: Callable[[Array], Array]
    value: Callable[[Sequence[Answer]], float]
    stderr: Callable[[Sequence[Answer]], float | None] = lambda answers: None
    outcomes: Callable[[Array], Array | None] = lambda statistics: None


def metric_of(task: Task) -> Metric:
    """Return a task's metric.

    Raises:
        TaskError: of a task of the harness: it has no such metric, or one that is no function of sums.
    """
    return _of_harness(task) if isinstance(task, LmEval) else _METRICS[task.metric](task)


def _summed(name: str, statistics: Callable[[Sequence[Answer]], Array], *, higher_is_better: bool = True) -> Metric:
    """Return a ratio of two sums: a mean of shares where higher is better."""

    def value(answers: Sequence[Answer]) -> float:
        return float(_ratio(statistics(answers).sum(0)))

    return Metric(name, higher_is_better, statistics, _ratio, value, outcomes=_of_shares)


def _of_shares(statistics: Array) -> Array | None:
    """Return the worst and the best example of a mean of shares; None where values are not shares."""
    values, weights = statistics[:, 0], statistics[:, 1]
    plain = np.isin(weights, (0, 1)).all() and (values >= 0).all() and (values <= 1).all()
    return np.array([[[0.0, 1.0], [1.0, 1.0]]]) if plain else None


def _ratio(sums: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


def _with_ones(values: Iterable[float]) -> Array:
    column = np.array(list(values), dtype=np.float64)
    return np.stack([column, np.ones_like(column)], axis=1)


def _accuracy(task: Task) -> Metric:
    return _summed("accuracy", lambda answers: _with_ones(a.given == a.target for a in answers))


def _macro_f1(task: Task) -> Metric:
    """Mean of the classes' F1 over the classes that occur as target or answer, as scikit-learn's default."""
    require("metric 'macro_f1'", {"eval": ["sklearn"]})
    classes: tuple[str, ...] = task.labels  # type: ignore[union-attr]

    def statistics(answers: Sequence[Answer]) -> Array:
        given, target = (_one_hot([a.given for a in answers], classes), _one_hot([a.target for a in answers], classes))
        return np.concatenate([given * target, given + target], axis=1)

    def from_sums(sums: Array) -> Array:
        hits, seen = np.split(sums, 2, axis=-1)
        occurs = seen > 0
        f1 = np.where(occurs, 2 * hits / np.where(occurs, seen, 1), 0)
        return np.asarray(f1.sum(-1) / occurs.sum(-1))

    def value(answers: Sequence[Answer]) -> float:
        f1_score = optional("sklearn.metrics", "eval", "metric 'macro_f1'").f1_score
        return float(f1_score([a.target for a in answers], [a.given for a in answers], average="macro"))

    def outcomes(statistics: Array) -> Array:
        """Return an example of every class that occurs, taken for the next of them and for itself."""
        one = np.eye(len(classes))
        occurring = np.flatnonzero(np.split(statistics, 2, axis=1)[1].sum(0))
        wrong = [np.concatenate([0 * one[c], one[c] + one[d]]) for c, d in zip(occurring, np.roll(occurring, 1), strict=True)]
        right = [np.concatenate([one[c], 2 * one[c]]) for c in occurring]
        return np.stack([np.stack(wrong), np.stack(right)], axis=1)

    return Metric("macro_f1", True, statistics, from_sums, value, outcomes=outcomes)  # noqa: FBT003


def _one_hot(words: Sequence[str | None], classes: Sequence[str]) -> Array:
    return np.array([[word == c for c in classes] for word in words], dtype=np.float64)


def _exact_match(task: Task) -> Metric:
    clean = _normalizer(task)
    return _summed("exact_match", lambda answers: _with_ones(clean(a.given or "") == clean(a.target) for a in answers))


def _error_rate(name: str) -> Callable[[Task], Metric]:
    def metric(task: Task) -> Metric:
        clean = _normalizer(task)
        align = optional("jiwer", "eval", f"metric {name!r}")
        process = align.process_words if name == "wer" else align.process_characters

        def statistics(answers: Sequence[Answer]) -> Array:
            rows = []
            for a in answers:
                found = process(clean(a.target), clean(a.given or ""))
                errors = found.substitutions + found.deletions + found.insertions
                rows.append((errors, found.hits + found.substitutions + found.deletions))
            return np.array(rows, dtype=np.float64)

        return _summed(name, statistics, higher_is_better=False)

    return metric


def _rouge(name: str) -> Callable[[Task], Metric]:
    def metric(task: Task) -> Metric:
        clean = _normalizer(task)
        scorer = optional("rouge_score.rouge_scorer", "eval", f"metric {name!r}").RougeScorer([name])

        def statistics(answers: Sequence[Answer]) -> Array:
            return _with_ones(scorer.score(clean(a.target), clean(a.given or ""))[name].fmeasure for a in answers)

        return _summed(name, statistics)

    return metric


def _perplexity(task: Task) -> Metric:
    """Exp of the mean negative log-likelihood per token, over all tokens of all texts."""

    def statistics(answers: Sequence[Answer]) -> Array:
        return np.array([(-a.scores[0], a.tokens[0]) for a in answers], dtype=np.float64)

    def from_sums(sums: Array) -> Array:
        return np.asarray(np.exp(_ratio(sums)))

    def value(answers: Sequence[Answer]) -> float:
        return float(from_sums(statistics(answers).sum(0)))

    return Metric("perplexity", False, statistics, from_sums, value)  # noqa: FBT003


def _of_harness(task: LmEval) -> Metric:
    """Return a metric of the harness: its own aggregation of its own values, and for the bootstrap the sums behind it."""
    found = harness.metric_of(task)
    finish = _FINISHED[found.aggregation]

    def statistics(answers: Sequence[Answer]) -> Array:
        return np.array([_NOTHING if not a.scores else (*a.scores, 1.0)[:2] for a in answers], dtype=np.float64)

    def values(answers: Sequence[Answer]) -> list[Any]:
        return [a.scores if len(a.scores) > 1 else a.scores[0] for a in answers if a.scores]

    def value(answers: Sequence[Answer]) -> float:
        known = values(answers)
        return float(found.aggregate(known)) if known else math.nan

    shares = _of_shares if found.aggregation == "mean" and found.higher_is_better else lambda statistics: None

    def stderr(answers: Sequence[Answer]) -> float | None:
        known = values(answers)
        return float(found.stderr(known)) if found.stderr is not None and len(known) > 1 else None

    return Metric(found.metric, found.higher_is_better, statistics, lambda sums: finish(_ratio(sums)), value, stderr, shares)


def _normalizer(task: Task) -> Callable[[str], str]:
    """Return what is done to answer and target before they are compared; the order is fixed."""
    steps: tuple[Normalization, ...] = getattr(task, "normalize", ())

    def clean(text: str) -> str:
        if "lower" in steps:
            text = text.lower()
        if "punctuation" in steps:
            text = text.translate(_NO_PUNCTUATION)
        if "whitespace" in steps:
            text = " ".join(text.split())
        return text.strip()

    return clean


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NOTHING = (0.0, 0.0)  # an example that the metric leaves out
#: The harness's aggregations, as functions of Σ value / Σ weight.
_FINISHED: Mapping[harness.Aggregation, Callable[[Array], Array]] = {
    "mean": lambda ratio: ratio,
    "perplexity": lambda ratio: np.exp(-ratio),
    "weighted_perplexity": lambda ratio: np.exp(-ratio),
    "bits_per_byte": lambda ratio: -ratio / math.log(2),
}
_METRICS: Mapping[str, Callable[[Task], Metric]] = {
    "accuracy": _accuracy,
    "macro_f1": _macro_f1,
    "exact_match": _exact_match,
    "wer": _error_rate("wer"),
    "cer": _error_rate("cer"),
    "rouge1": _rouge("rouge1"),
    "rouge2": _rouge("rouge2"),
    "rougeL": _rouge("rougeL"),
    "perplexity": _perplexity,
}
