"""Candidates on the examples, in growing parts: what they kept so far, and whether they can still win.

The parts of a task are nested samples as `eval.subset` takes them, each example in one part. Every candidate is asked them in
the same order, so that two of them are compared on the same examples by the same draws.
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
from plait.evaluation.recovery import BootstrapDraws, PairedStatistics, central_interval, recovery, task_seed
from plait.evaluation.session import TaskExamples
from plait.evaluation.subsets import choose_subset
from plait.recipes.evaluation import Subset
from plait.recipes.search import SearchSpec
from plait.records import Record
from plait.tasks.answers import Answer, FloatArray
from plait.tasks.metrics import metric_of
from plait.tasks.schema import Task

_SHARES = (1 / 8, 1 / 4, 1 / 2)
_FEWEST = 12  # examples per task at the first look
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

    def size(self, rung: int) -> int:
        """Return how many examples the first parts have."""
        return sum(len(part.examples.items) for part in self.parts[:rung])

    @property
    def base_value(self) -> float:
        return metric_of(self.entry.task).value(self.base)


class Judge:
    """Asks candidates on one split of the tasks.

    Args:
        evaluator: of the split and subset on which candidates are compared.
        spec: what is maximized, and whether candidates race.

    Attributes:
        rungs: number of parts.
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
        self._shares = shares_of(min(len(entry.examples.items) for entry in evaluator.tasks)) if spec.race else (1.0,)
        if len(spec.maximize) > 1:  # a front has no best candidate to race against
            self._shares = (1.0,)
        self.rungs = len(self._shares)
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
            parts, order = _parts(entry, self._shares)
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
                "A score leaves no task out: take these tasks out, give more examples (search.subset), or another search.split."
            )
        return tuple(found)

    def begin(self, candidate: Candidate) -> Judged:
        """Return a candidate that has not been asked anything."""
        return Judged(self, candidate)


class Judged:
    """What one candidate has answered so far.

    Attributes:
        rung: number of parts that it was asked.
    """

    def __init__(self, judge: Judge, candidate: Candidate) -> None:
        self._judge = judge
        self._candidate: Candidate | None = candidate  # until everything is asked: a merge in memory
        self.rung = 0
        self._answers: dict[str, list[Answer]] = {task.name: [] for task in judge.tasks}
        self._drawn: dict[int, dict[str, BootstrapDraws]] = {}

    @property
    def complete(self) -> bool:
        """Whether it was asked everything."""
        return self.rung == self._judge.rungs

    def wanted(self, parts: int | None = 1) -> list[tuple[Candidate, TaskExamples]]:
        """Return what `ask` asks in the next `parts` calls; in all that are left when None."""
        if self._candidate is None:
            return []
        until = self._judge.rungs if parts is None else self.rung + parts
        return [(self._candidate, part) for task in self._judge.tasks for part in task.parts[self.rung : until]]

    def ask(self) -> None:
        """Ask the next part of every task; with the last one, the merge is let go.

        Raises:
            AssertionError: it was asked everything.
        """
        if self._candidate is None:
            raise AssertionError("a candidate that was asked everything is asked again")
        for task in self._judge.tasks:
            self._answers[task.name] += self._judge.evaluator.session.answers(self._candidate, task.parts[self.rung])
        self.rung += 1
        if self.complete:
            self._candidate = None

    @property
    def score(self) -> Score:
        """What it kept so far."""
        values, metrics = {}, {}
        for task in self._judge.tasks:
            metric, answers = metric_of(task.entry.task), self._answers[task.name]
            base, own = (metric.value(given[: len(answers)]) for given in (task.base, task.own))
            metrics[task.name] = metric.value(answers)
            values[task.name] = recovery(metric, base, own, metrics[task.name])
        drawn = self._draws(self.rung)
        intervals = {n: None if v is None else central_interval(drawn[n].recovery, v) for n, v in values.items()}
        known = [v for v in values.values() if v is not None]
        whole = len(known) == len(values)  # a number over the tasks leaves none out
        return Score(
            recovery=values,
            intervals=intervals,
            metric=metrics,
            worst=min(known) if whole else None,
            mean=sum(known) / len(known) if whole else None,
            examples=sum(map(len, self._answers.values())),
        )

    def lead(self, best: Judged) -> FloatArray:
        """Return draws of how much larger its goal is than that of the best, on the examples that both were asked."""
        goal = self._judge.spec.maximize[0]
        return goal_of({n: d.recovery for n, d in self._draws(self.rung).items()}, goal) - goal_of(
            {n: d.recovery for n, d in best._draws(self.rung).items()}, goal
        )

    def recoveries(self, rung: int) -> dict[str, float | None]:
        """Return task → its recovery as it was after so many parts; None where it is undefined on so few examples."""
        values: dict[str, float | None] = {}
        for task in self._judge.tasks:
            metric, size = metric_of(task.entry.task), task.size(rung)
            base, own, merged = (metric.value(given[:size]) for given in (task.base, task.own, self._answers[task.name]))
            values[task.name] = recovery(metric, base, own, merged)
        return values

    def at(self, rung: int) -> float | None:
        """Return its goal as it was after so many parts."""
        values = self.recoveries(rung)
        if any(v is None for v in values.values()):
            return None
        return float(goal_of({n: np.array([v], dtype=float) for n, v in values.items()}, self._judge.spec.maximize[0])[0])

    def expected(self, best: Judged) -> dict[str, tuple[float, float]]:
        """Return what a candidate that was stopped would have reached: task → recovery, and its standard deviation.

        The recovery is that of the best, which was asked everything, and the difference on what both were asked. The deviation
        is that of its paired draws, less the share of the examples that are known. Tasks that leave it undefined are left out.
        """
        mine, others, whole = self.recoveries(self.rung), best.recoveries(self.rung), best.recoveries(best.rung)
        found = {}
        for task in self._judge.tasks:
            values = mine[task.name], others[task.name], whole[task.name]
            own, other = (of._draws(self.rung)[task.name].recovery for of in (self, best))
            known = (own - other)[np.isfinite(own - other)]
            if any(value is None for value in values) or not len(known):
                continue
            here, there, all_of_it = (float(value) for value in values if value is not None)
            left = 1 - task.size(self.rung) / task.size(self._judge.rungs)
            found[task.name] = (all_of_it + here - there, float(np.std(known)) * math.sqrt(left))
        return found

    def _draws(self, rung: int) -> dict[str, BootstrapDraws]:
        if rung not in self._drawn:
            spec = self._judge.evaluator.spec
            found = {}
            for task in self._judge.tasks:
                metric, size = metric_of(task.entry.task), task.size(rung)
                base, own, merged = (
                    np.asarray(metric.statistics(given[:size])) for given in (task.base, task.own, self._answers[task.name])
                )
                sides = PairedStatistics(metric, base, own, merged)
                found[task.name] = sides.draws(spec.draws, task_seed(spec.seed, task.name))
            self._drawn[rung] = found
        return self._drawn[rung]


def goal_of(recoveries: Mapping[str, FloatArray], goal: str) -> FloatArray:
    """Return the draws of a goal from those of the tasks' recoveries."""
    stacked = np.stack(list(recoveries.values()))
    if goal == "worst_recovery":
        return np.asarray(stacked.min(0))
    return np.asarray(stacked.mean(0)) if goal == "mean_recovery" else recoveries[goal.removesuffix(".recovery")]


def cannot_win(candidate: Judged, best: Judged) -> bool:
    """Whether a candidate is behind the best by more than the paired 95 % interval of their difference."""
    lead = candidate.lead(best)
    known = lead[np.isfinite(lead)]
    return len(known) > len(lead) / 2 and float(np.percentile(known, _TAIL)) < 0


def estimate(candidate: Judged, best: Judged, value: float) -> float:
    """Return what a candidate that was stopped would have reached: the best's value and the difference on what both were asked.

    It is never above the best's, by which it was stopped.
    """
    mine, others = candidate.at(candidate.rung), best.at(candidate.rung)
    if mine is None or others is None:
        lead = candidate.lead(best)
        return value + min(0.0, float(np.mean(lead[np.isfinite(lead)])))
    return value + min(0.0, mine - others)


def shares_of(fewest: int) -> tuple[float, ...]:
    """Return the shares of the examples after which candidates are compared.

    Args:
        fewest: examples of the smallest task.
    """
    return (*(share for share in _SHARES if fewest * share >= _FEWEST), 1.0)


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
