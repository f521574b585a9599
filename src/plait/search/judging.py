"""Candidates on the examples, part by part: what they kept so far, and whether they can still win.

The parts of a task are nested samples as `eval.subset` takes them, each example in one part. Every candidate is asked those of
a task in the same order, so that two of them are compared on the same examples by the same draws. Which task comes next is
decided by what is known: the smallest recovery decides, and no task can raise it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from plait.errors import TaskError, did_you_mean
from plait.evaluation.candidates import Candidate, base_candidate
from plait.evaluation.pipeline import Evaluator
from plait.evaluation.recovery import PairedStatistics, central_interval, recovery, task_seed
from plait.evaluation.session import TaskExamples
from plait.evaluation.subsets import choose_subset
from plait.recipes.evaluation import Subset
from plait.recipes.search import SearchSpec
from plait.records import Record
from plait.tasks.answers import Answer, FloatArray
from plait.tasks.metrics import metric_of
from plait.tasks.schema import Task

_SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
_FEWEST = 12  # examples of a task at the first look
_TAIL = 97.5
Interval = tuple[float, float]


class Score(Record):
    """What a candidate kept on the examples that it was asked.

    Attributes:
        recovery: task → share of the own adapter's gain; None where base or own adapter leave it undefined on few examples.
        intervals: task → its 95 % interval, paired.
        metric: task → the metric.
        worst: the smallest recovery.
        mean: over the tasks.
        examples: how many were asked, over all tasks.
    """

    recovery: dict[str, float | None]
    intervals: dict[str, Interval | None]
    metric: dict[str, float]
    worst: float | None
    mean: float | None
    examples: int

    def goal(self, name: str) -> float | None:
        """Return one of the numbers that a search maximizes."""
        if name in ("worst_recovery", "mean_recovery"):
            return self.worst if name == "worst_recovery" else self.mean
        return self.recovery[name.removesuffix(".recovery")]


@dataclass(frozen=True)
class _TaskParts:
    """One task: its parts, and the answers of base and own adapter in the order of the parts."""

    entry: TaskExamples
    parts: tuple[TaskExamples, ...]
    base: tuple[Answer, ...]
    own: tuple[Answer, ...]

    @property
    def name(self) -> str:
        return self.entry.task.name

    def size(self, count: int) -> int:
        """Return how many examples the first `count` parts have."""
        return sum(len(part.examples.items) for part in self.parts[:count])

    def gain(self, size: int) -> float:
        """Return by how much the own adapter's metric differs from the base's on the first `size` examples."""
        metric = metric_of(self.entry.task)
        return abs(metric.value(self.own[:size]) - metric.value(self.base[:size]))

    @property
    def base_value(self) -> float:
        return metric_of(self.entry.task).value(self.base)


class Judge:
    """Asks candidates on one split of the tasks.

    Args:
        evaluator: of the split and subset on which candidates are compared.
        spec: what is maximized, and whether candidates race.

    Attributes:
        races: whether candidates are asked part by part.
        total: examples of all tasks.

    Raises:
        TaskError: a goal is not one of a task.
    """

    def __init__(self, evaluator: Evaluator, spec: SearchSpec) -> None:
        self.evaluator, self.spec = evaluator, spec
        names = [entry.task.name for entry in evaluator.tasks]
        for goal in spec.maximize:
            task = goal.removesuffix(".recovery")
            if goal not in ("worst_recovery", "mean_recovery") and task not in names:
                near = did_you_mean(task, names)
                raise TaskError(f"search.maximize: {task!r} is not one of the tasks {', '.join(names)}.{near}")
        self.races = spec.race and len(spec.maximize) == 1  # a front has no best candidate to race against
        self.total = sum(len(entry.examples.items) for entry in evaluator.tasks)

    @cached_property
    def tasks(self) -> tuple[_TaskParts, ...]:
        """The tasks with the answers of base and own adapters, which are asked when this is first read.

        Raises:
            TaskError: an own adapter is not better than the base, so that no candidate has a recovery.
        """
        session, found, flat = self.evaluator.session, [], []
        self.evaluator.prepare([])
        for entry in self.evaluator.tasks:
            parts, order = _parts(entry, shares_of(len(entry.examples.items)) if self.races else (1.0,))
            own = session.own(entry.task)
            if own is None:
                raise AssertionError("a task without an adapter of its own was not refused")
            base, alone = (session.answers(c, entry) for c in (base_candidate(self.evaluator.singles), own))
            metric = metric_of(entry.task)
            if recovery(metric, metric.value(base), metric.value(alone), metric.value(alone)) is None:
                flat.append(f"{entry.task.name} (base {metric.value(base):.4g}, own adapter {metric.value(alone):.4g})")
            found.append(_TaskParts(entry, parts, tuple(base[i] for i in order), tuple(alone[i] for i in order)))
        if flat:
            raise TaskError(
                f"no recovery on split {self.spec.split!r}: the own adapter is not better than the base on {', '.join(flat)}. "
                "A score leaves no task out: take them out, give more examples (--subset, search.subset), or another split."
            )
        return tuple(found)

    def begin(self, candidate: Candidate) -> Judged:
        """Return a candidate that has not been asked anything."""
        return Judged(self, candidate)


class Judged:
    """What one candidate has answered so far.

    Args:
        judge: of the search.
        candidate: what answers; it is let go when everything has been asked.
    """

    def __init__(self, judge: Judge, candidate: Candidate) -> None:
        self._judge = judge
        self._candidate: Candidate | None = candidate
        self._asked = {task.name: 0 for task in judge.tasks}  # parts
        self._answers: dict[str, list[Answer]] = {task.name: [] for task in judge.tasks}
        self._drawn: dict[tuple[str, int], FloatArray] = {}

    @property
    def complete(self) -> bool:
        """Whether it was asked everything."""
        return all(self._asked[task.name] == len(task.parts) for task in self._judge.tasks)

    def wanted(self, names: Sequence[str]) -> list[tuple[Candidate, TaskExamples]]:
        """Return what `ask` asks: the next part of these tasks."""
        return [] if self._candidate is None else [(self._candidate, part) for _, part in self._parts(names)]

    def everything(self) -> list[tuple[Candidate, TaskExamples]]:
        """Return all that is left."""
        if self._candidate is None:
            return []
        return [(self._candidate, part) for task in self._judge.tasks for part in task.parts[self._asked[task.name] :]]

    def ask(self, names: Sequence[str]) -> None:
        """Ask the next part of these tasks; with the last one, the merge is let go.

        Raises:
            AssertionError: it was asked everything.
        """
        if self._candidate is None:
            raise AssertionError("a candidate that was asked everything is asked again")
        for name, part in self._parts(names):
            self._answers[name] += self._judge.evaluator.session.answers(self._candidate, part)
            self._asked[name] += 1
        if self.complete:
            self._candidate = None

    def left(self) -> list[str]:
        """Return the tasks of which it was not asked everything."""
        return [name for name, _ in self._parts([task.name for task in self._judge.tasks])]

    def next(self, best: Judged) -> list[str]:
        """Return the tasks that it is asked next: in a race the one that is likely to decide, else all.

        For the worst recovery that is the task with the smallest recovery, as far as it is known, and as the best has it where
        nothing is; for one task's own recovery this task; for the mean all of them.
        """
        left, goal = self.left(), self.goal_name
        if not self._judge.races or goal == "mean_recovery":
            return left
        if goal != "worst_recovery":
            name = goal.removesuffix(".recovery")
            return [name] if name in left else left
        known, there = self.expected(best), best.recoveries()
        return [min(left, key=lambda name: known[name][0] if name in known else there[name] or 0.0)]

    @property
    def goal_name(self) -> str:
        """What is maximized."""
        return self._judge.spec.maximize[0]

    @property
    def goal(self) -> float:
        """Its value, of one that was asked everything.

        Raises:
            AssertionError: it was not.
        """
        values = {name: np.array([value], dtype=float) for name, value in self.recoveries().items()}
        if not self.complete:
            raise AssertionError("a candidate that was not asked everything has no score")
        return float(goal_of(values, self.goal_name)[0])

    @property
    def score(self) -> Score:
        """What it kept so far: of the tasks of which it was asked something."""
        values = self.recoveries()
        metrics = {t.name: metric_of(t.entry.task).value(given) for t in self._judge.tasks if (given := self._answers[t.name])}
        intervals = {n: None if v is None else central_interval(self._draws(n, self._asked[n]), v) for n, v in values.items()}
        known = [v for v in values.values() if v is not None]
        whole = len(known) == len(self._judge.tasks)  # a number over the tasks leaves none out
        return Score(
            recovery=values,
            intervals=intervals,
            metric=metrics,
            worst=min(known) if whole else None,
            mean=sum(known) / len(known) if whole else None,
            examples=sum(map(len, self._answers.values())),
        )

    def recoveries(self, like: Judged | None = None) -> dict[str, float | None]:
        """Return task → recovery, on what it was asked, or on what another was; None where it is undefined on so few examples.

        Tasks of which nothing was asked are left out.
        """
        values: dict[str, float | None] = {}
        for task in self._judge.tasks:
            metric, size = metric_of(task.entry.task), task.size((like or self)._asked[task.name])
            if size:
                base, own, merged = (metric.value(given[:size]) for given in (task.base, task.own, self._answers[task.name]))
                values[task.name] = recovery(metric, base, own, merged)
        return values

    def expected(self, best: Judged) -> dict[str, tuple[float, float]]:
        """Return what it would reach on all examples: task → recovery, and its standard deviation.

        Of a task of which everything was asked, that is what it has. Of others, it is that of the best, which was asked
        everything, and the difference on what both were asked; the deviation is that of its paired draws, less the share of
        the examples that are known. Tasks that leave it undefined, or of which nothing was asked, are left out.
        """
        return {name: (value, float(np.std(draws))) for name, (value, draws) in self._at_the_end(best).items()}

    def hope(self, best: Judged) -> FloatArray | None:
        """Return draws of what its goal can still become on all examples; None where nothing limits it yet."""
        found, goal = {name: value + draws for name, (value, draws) in self._at_the_end(best).items()}, self.goal_name
        names = [task.name for task in self._judge.tasks]
        needed = [] if goal == "worst_recovery" else names if goal == "mean_recovery" else [goal.removesuffix(".recovery")]
        return goal_of(found, goal) if found and all(name in found for name in needed) else None

    def _at_the_end(self, best: Judged) -> dict[str, tuple[float, FloatArray]]:
        """Return task → the recovery that is expected on all examples, and draws of how far it may be off.

        Draws of few examples hold no difference that those do not have. So as much is added as one more answer that differs
        would (Agresti and Min, 2005, add to counts of pairs for that reason), with a normal variable.
        """
        found: dict[str, tuple[float, FloatArray]] = {}
        mine, others, whole = self.recoveries(), best.recoveries(self), best.recoveries()
        spec = self._judge.evaluator.spec
        count = spec.draws
        for task in self._judge.tasks:
            name, parts = task.name, self._asked[task.name]
            own, other, end = mine.get(name), others.get(name), whole[name]
            if own is not None and parts == len(task.parts):
                found[name] = (own, np.zeros(count))
            elif own is not None and other is not None and end is not None:
                lead = self._draws(name, parts) - best._draws(name, parts)
                known = lead[np.isfinite(lead)]
                if len(known) > count / 2:
                    size = task.size(parts)
                    normal = np.random.default_rng((*task_seed(spec.seed, name), 1)).standard_normal(count)
                    off = np.resize(known - known.mean(), count) + normal / (size * task.gain(size))
                    found[name] = (end + (own - other), off * math.sqrt(1 - size / task.size(len(task.parts))))
        return found

    def _parts(self, names: Sequence[str]) -> list[tuple[str, TaskExamples]]:
        """Return the next part of each of these tasks that has one."""
        tasks = [task for task in self._judge.tasks if task.name in names and self._asked[task.name] < len(task.parts)]
        return [(task.name, task.parts[self._asked[task.name]]) for task in tasks]

    def _draws(self, name: str, parts: int) -> FloatArray:
        """Return draws of a task's recovery on its first parts."""
        if (name, parts) not in self._drawn:
            spec = self._judge.evaluator.spec
            task = next(task for task in self._judge.tasks if task.name == name)
            metric, size = metric_of(task.entry.task), task.size(parts)
            base, own, merged = (
                np.asarray(metric.statistics(given[:size])) for given in (task.base, task.own, self._answers[name])
            )
            drawn = PairedStatistics(metric, base, own, merged).draws(spec.draws, task_seed(spec.seed, name))
            self._drawn[name, parts] = np.asarray(drawn.recovery)
        return self._drawn[name, parts]


def goal_of(recoveries: Mapping[str, FloatArray], goal: str) -> FloatArray:
    """Return the draws of a goal from those of the tasks' recoveries."""
    stacked = np.stack(list(recoveries.values()))
    if goal == "worst_recovery":
        return np.asarray(stacked.min(0))
    return np.asarray(stacked.mean(0)) if goal == "mean_recovery" else recoveries[goal.removesuffix(".recovery")]


def cannot_win(candidate: Judged, best: Judged) -> bool:
    """Whether a candidate ends below the best, by the upper end of the 95 % interval of what it can still become."""
    hope = candidate.hope(best)
    return hope is not None and float(np.percentile(hope, _TAIL)) < best.goal


def estimate(candidate: Judged, best: Judged) -> float:
    """Return what a candidate that was stopped would have reached at most; never above the best, by which it was stopped."""
    found = {name: np.array([value]) for name, (value, _) in candidate.expected(best).items()}
    return min(best.goal, float(goal_of(found, candidate.goal_name)[0]))


def shares_of(count: int) -> tuple[float, ...]:
    """Return the shares of a task's examples after which candidates are compared.

    Args:
        count: its examples.
    """
    return (*(share for share in _SHARES if count * share >= _FEWEST), 1.0)


def _parts(entry: TaskExamples, shares: Sequence[float]) -> tuple[tuple[TaskExamples, ...], list[int]]:
    """Return a task's parts, each example in one of them, and the examples' indices in that order."""
    if len(shares) == 1:
        return (entry,), list(range(len(entry.examples.items)))
    count, taken, groups = len(entry.examples.items), set[int](), []
    for share in shares:
        chosen = choose_subset(entry.examples, Subset(max_samples=math.ceil(count * share)))
        indices = range(count) if chosen is None else chosen.indices
        groups.append([i for i in indices if i not in taken])
        taken |= {*indices}
    parts = tuple(TaskExamples(entry.examples.take(group), entry.subset) for group in groups)
    return parts, [i for group in groups for i in group]


def check_owners(tasks: Sequence[Task], names: Sequence[str]) -> None:
    """Refuse tasks that have no adapter of their own among those that are merged.

    Raises:
        TaskError: there are some.
    """
    if lost := [task for task in tasks if task.own_adapter not in names]:
        shown = ", ".join(f"{task.name!r} ({task.own_adapter!r})" for task in lost)
        raise TaskError(
            f"no adapter of these tasks' own is known: {shown}; there are {', '.join(names)}. A score leaves no task out: name "
            "its own with 'adapter' in the task's file, call the adapter so (NAME=PATH), or take the task out."
        )
