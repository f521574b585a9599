"""The metrics, one function each.

Macro-F1's own value is scikit-learn's, word alignment is jiwer's, ROUGE is rouge-score's, correlations are scipy's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import eq
from typing import TypeAlias

import numpy as np

from plait.errors import TaskError, did_you_mean
from plait.extras import optional, require
from plait.plugins import Registry
from plait.tasks.answers import Answer, FloatArray, Metric, ratio, summed
from plait.tasks.normalizing import Normalizer, normalizer
from plait.tasks.schema import Task

OfTask: TypeAlias = Callable[[Task], Metric]
#: Name → what makes a task's metric. Third parties add theirs by the entry-point group `plait.metrics`, under the name.
METRICS: Registry[OfTask] = Registry("plait.metrics", "metric")
_PORTION = 256  # answers that are left out at a time
_TINY = 1e-9
_NAMED_BY: dict[str, tuple[str, ...]] = {}  # metric → kinds of tasks that it names


def metric_of(task: Task) -> Metric:
    """Return a task's metric.

    Raises:
        TaskError: there is no such metric, or it does not suit the task.
    """
    own = task.own_metric()
    if own is not None:
        return own
    if task.metric not in metrics_of(type(task), task.kind):
        raise TaskError(f"task {task.name!r}: metric {not_a_metric(type(task), task.kind, str(task.metric))}")
    return METRICS[str(task.metric)](task)


def metrics_of(task: type[Task], kind: str) -> tuple[str, ...]:
    """Return the names of the metrics that suit a kind of task: those that it names, and those that name it."""
    return tuple(name for name in METRICS if name in task.metrics or kind in _NAMED_BY.get(name, ()))


def not_a_metric(task: type[Task], kind: str, name: str) -> str:
    """Return, in words, which metrics a task may have in place of one that does not suit it."""
    known = metrics_of(task, kind)
    allowed = ", ".join(map(repr, known[:-1])) + (" or " if known[1:] else "") + "".join(map(repr, known[-1:]))
    return f"is {name!r}; it must be {allowed}.{did_you_mean(name, known)}"


def metric(name: str, *, kinds: Sequence[str] = ()) -> Callable[[OfTask], OfTask]:
    """Register a function that makes the metric of a task.

    Args:
        name: as a task's file has it.
        kinds: of tasks that it suits, besides those that name it.
    """

    def register(make: OfTask) -> OfTask:
        METRICS.add(name, make)
        _NAMED_BY[name] = tuple(kinds)
        return make

    return register


def mean(name: str, *, kinds: Sequence[str] = ()) -> Callable[[Callable[[Task], Callable[[Answer], float]]], OfTask]:
    """Register a function of a task that returns the score of one answer; the metric is the mean, and higher is better.

    Args:
        name: as a task's file has it.
        kinds: of tasks that it suits, besides those that name it.
    """

    def register(make: Callable[[Task], Callable[[Answer], float]]) -> OfTask:
        def of_task(task: Task) -> Metric:
            score = make(task)
            return summed(name, lambda answers: _with_ones(score(a) for a in answers))

        return metric(name, kinds=kinds)(of_task)

    return register


def _with_ones(values: Iterable[float]) -> FloatArray:
    column = np.array(list(values), dtype=np.float64)
    return np.stack([column, np.ones_like(column)], axis=1)


@mean("accuracy")
def _accuracy(task: Task) -> Callable[[Answer], float]:
    return lambda answer: answer.given == answer.target


@metric("macro_f1")
def _macro_f1(task: Task) -> Metric:
    """Mean of the classes' F1 over the classes that occur as target or answer, as scikit-learn's default."""
    require("metric 'macro_f1'", {"eval": ["sklearn"]})
    classes = task.closed_labels or ()

    def statistics(answers: Sequence[Answer]) -> FloatArray:
        given, target = (_one_hot([a.given for a in answers], classes), _one_hot([a.target for a in answers], classes))
        return np.concatenate([given * target, given + target], axis=1)

    def from_sums(sums: FloatArray) -> FloatArray:
        hits, seen = np.split(sums, 2, axis=-1)
        occurs = seen > 0
        f1 = np.where(occurs, 2 * hits / np.where(occurs, seen, 1), 0)
        return np.asarray(f1.sum(-1) / occurs.sum(-1))

    def value(answers: Sequence[Answer]) -> float:
        f1_score = optional("sklearn.metrics", "eval", "metric 'macro_f1'").f1_score
        return float(f1_score([a.target for a in answers], [a.given for a in answers], average="macro"))

    def outcomes(statistics: FloatArray) -> FloatArray:
        """Return an example of every class that occurs, taken for the next of them and for itself."""
        one = np.eye(len(classes))
        occurring = np.flatnonzero(np.split(statistics, 2, axis=1)[1].sum(0))
        wrong = [np.concatenate([0 * one[c], one[c] + one[d]]) for c, d in zip(occurring, np.roll(occurring, 1), strict=True)]
        right = [np.concatenate([one[c], 2 * one[c]]) for c in occurring]
        return np.stack([np.stack(wrong), np.stack(right)], axis=1)

    return Metric("macro_f1", True, statistics, from_sums, value, outcomes=outcomes)  # noqa: FBT003


def _one_hot(words: Sequence[str | None], classes: Sequence[str]) -> FloatArray:
    return np.array([[word == c for c in classes] for word in words], dtype=np.float64)


@mean("exact_match")
def _exact_match(task: Task) -> Callable[[Answer], float]:
    clean = _normalizer(task)
    return lambda answer: clean(answer.given or "") == clean(answer.target)


def _error_rate(task: Task, name: str) -> Metric:
    clean = _normalizer(task)
    align = optional("jiwer", "eval", f"metric {name!r}")
    process = align.process_words if name == "wer" else align.process_characters

    def statistics(answers: Sequence[Answer]) -> FloatArray:
        rows = []
        for a in answers:
            found = process(clean(a.target), clean(a.given or ""))
            errors = found.substitutions + found.deletions + found.insertions
            rows.append((errors, found.hits + found.substitutions + found.deletions))
        return np.array(rows, dtype=np.float64)

    return summed(name, statistics, higher_is_better=False)


@metric("wer")
def _wer(task: Task) -> Metric:
    return _error_rate(task, "wer")


@metric("cer")
def _cer(task: Task) -> Metric:
    return _error_rate(task, "cer")


def _rouge(task: Task, name: str) -> Callable[[Answer], float]:
    clean = _normalizer(task)
    scorer = optional("rouge_score.rouge_scorer", "eval", f"metric {name!r}").RougeScorer([name])
    return lambda answer: scorer.score(clean(answer.target), clean(answer.given or ""))[name].fmeasure


@mean("rouge1")
def _rouge1(task: Task) -> Callable[[Answer], float]:
    return _rouge(task, "rouge1")


@mean("rouge2")
def _rouge2(task: Task) -> Callable[[Answer], float]:
    return _rouge(task, "rouge2")


@mean("rougeL")
def _rouge_l(task: Task) -> Callable[[Answer], float]:
    return _rouge(task, "rougeL")


@metric("perplexity")
def _perplexity(task: Task) -> Metric:
    """Exp of the mean negative log-likelihood per token, over all tokens of all texts."""

    def statistics(answers: Sequence[Answer]) -> FloatArray:
        return np.array([(-a.scores[0], a.tokens[0]) for a in answers], dtype=np.float64)

    def from_sums(sums: FloatArray) -> FloatArray:
        return np.asarray(np.exp(ratio(sums)))

    def value(answers: Sequence[Answer]) -> float:
        return float(from_sums(statistics(answers).sum(0)))

    return Metric("perplexity", False, statistics, from_sums, value)  # noqa: FBT003


@metric("word_accuracy")
def _word_accuracy(task: Task) -> Metric:
    """Share of words with the right label, over all words of all texts."""

    def statistics(answers: Sequence[Answer]) -> FloatArray:
        pairs = [(_tags(a.given), _tags(a.target)) for a in answers]
        return np.array([(sum(map(eq, given, right)), len(right)) for given, right in pairs], dtype=np.float64)

    return summed("word_accuracy", statistics)


@metric("entity_f1")
def _entity_f1(task: Task) -> Metric:
    """F1 of entities over all texts, right where kind, beginning and end are: 2 · right / (given + there), as conlleval's."""

    def statistics(answers: Sequence[Answer]) -> FloatArray:
        pairs = [(entities(_tags(a.given)), entities(_tags(a.target))) for a in answers]
        return np.array([(2 * len(given & right), len(given) + len(right)) for given, right in pairs], dtype=np.float64)

    def from_sums(sums: FloatArray) -> FloatArray:
        return np.where(sums[..., 1] > 0, ratio(sums), 0.0)  # no entity is there and none is given: 0, as in seqeval

    def value(answers: Sequence[Answer]) -> float:
        return float(from_sums(statistics(answers).sum(0)))

    return Metric("entity_f1", True, statistics, from_sums, value)  # noqa: FBT003


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return kind, first word and one after the last of every entity.

    As conlleval reads labels of the schemes IOB1, IOB2 and IOBES: an entity begins with B or S, after E, S or O, and where the
    kind changes.

    Args:
        tags: O, or B-…, I-…, E-…, S-… with the kind.
    """
    found: set[tuple[str, int, int]] = set()
    begun, last = 0, ("O", "")
    for i, tag in enumerate([*tags, "O"]):
        letter, _, what = tag.partition("-")
        goes_on = letter in "IE" and last[0] in "BI" and what == last[1]
        if last[0] != "O" and not goes_on:
            found.add((last[1], begun, i))
        if not goes_on:
            begun = i
        last = letter, what
    return found


def _tags(text: str | None) -> list[str]:
    return (text or "").split()


@metric("mean_squared_error")
def _mean_squared_error(task: Task) -> Metric:
    def statistics(answers: Sequence[Answer]) -> FloatArray:
        given, right = _numbers(answers)
        return _with_ones((given - right) ** 2)

    return summed("mean_squared_error", statistics, higher_is_better=False)


@metric("pearson")
def _pearson(task: Task) -> Metric:
    """Pearson's correlation of answers and targets; 0 where one of the two is constant."""
    require("metric 'pearson'", {"eval": ["scipy"]})

    def statistics(answers: Sequence[Answer]) -> FloatArray:
        # Standardized sides have the same correlation, without cancellation in the sums.
        x, y = (np.asarray((side - side.mean()) / (side.std() or 1.0)) for side in _numbers(answers))
        return np.stack([x, y, x * x, y * y, x * y, np.ones_like(x)], axis=1)

    def from_sums(sums: FloatArray) -> FloatArray:
        x, y, xx, yy, xy, n = np.moveaxis(sums, -1, 0)
        return _quotient(n * xy - x * y, np.sqrt(np.maximum(n * xx - x * x, 0) * np.maximum(n * yy - y * y, 0)))

    def value(answers: Sequence[Answer]) -> float:
        return _correlation("pearson", *_numbers(answers))

    return Metric("pearson", True, statistics, from_sums, value)  # noqa: FBT003


@metric("spearman")
def _spearman(task: Task) -> Metric:
    """Spearman's rank correlation of answers and targets; 0 where one of the two is constant.

    It is not a function of sums. What is summed are pseudo-values, n ρ − (n − 1) ρ₋ᵢ with ρ₋ᵢ without answer i (Tukey 1958),
    moved so that their mean is ρ.
    """
    require("metric 'spearman'", {"eval": ["scipy"]})

    def statistics(answers: Sequence[Answer]) -> FloatArray:
        x, y = _numbers(answers)
        without = _spearman_without_each(x, y)
        return _with_ones(_correlation("spearman", x, y) + (len(x) - 1) * (without.mean() - without))

    def value(answers: Sequence[Answer]) -> float:
        return _correlation("spearman", *_numbers(answers))

    return Metric("spearman", True, statistics, ratio, value)  # noqa: FBT003


def _spearman_without_each(x: FloatArray, y: FloatArray) -> FloatArray:
    """Return the rank correlation without each of n pairs, (n,), in portions of bounded memory."""
    rank = optional("scipy.stats", "eval", "metric 'spearman'").rankdata
    ranks, found = (rank(x), rank(y)), np.zeros(len(x))
    for at in range(0, len(x), _PORTION):
        some = np.arange(at, min(at + _PORTION, len(x)))
        left = np.ones((len(some), len(x)))
        left[np.arange(len(some)), some] = 0
        # a rank is one less without what is smaller, and a half less without what is equal
        u, v = (
            (r - (side > side[some, None]) - 0.5 * (side == side[some, None])) * left
            for r, side in zip(ranks, (x, y), strict=True)
        )
        n = len(x) - 1
        a, b = u - u.sum(1, keepdims=True) / max(n, 1) * left, v - v.sum(1, keepdims=True) / max(n, 1) * left
        found[some] = _quotient((a * b).sum(1), np.sqrt((a * a).sum(1) * (b * b).sum(1)))
    return found


def _correlation(name: str, x: FloatArray, y: FloatArray) -> float:
    stats = optional("scipy.stats", "eval", f"metric {name!r}")
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float({"pearson": stats.pearsonr, "spearman": stats.spearmanr}[name](x, y).statistic)


def _numbers(answers: Sequence[Answer]) -> tuple[FloatArray, FloatArray]:
    """Return answers and targets, (n,) each."""
    return (np.array([a.scores[0] for a in answers]), np.array([float(a.target) for a in answers]))


def _quotient(above: FloatArray, below: FloatArray) -> FloatArray:
    """Return a quotient; 0 where it is divided by 0, or by what is left of rounding."""
    usable = below > _TINY
    return np.where(usable, above / np.where(usable, below, 1.0), 0.0)


def _normalizer(task: Task) -> Normalizer:
    """Return what is done to answer and target before they are compared."""
    return normalizer(getattr(task, "normalize", ()), getattr(task, "spellings", None))


METRICS.load_plugins()
