"""The trials of a search: each is asked as long as it can still win, and what came of it is put into the study.

What is tried, and where it is stopped, depends on the seed and the trials that had ended before a batch began, so that a search
that was killed continues as if it had not been, and what is done side by side may end in any order.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import Any

from optuna.trial import Trial

from plait.errors import PlanError, RecipeError
from plait.evaluation.session import Wanted
from plait.libraries.optuna import quiet_optuna
from plait.recipes.candidates import Point, zero_path
from plait.search.judging import Judged, Score, cannot_win, estimate
from plait.search.outcome import Outcome, Studied, as_told
from plait.search.record import Run, TaskOutcome
from plait.search.request import Sweep
from plait.search.sampling import sampler_of
from plait.search.selection import ranked, reason_to_stop
from plait.search.space import point_key
from plait.search.study import Study

_FRUITLESS = 30  # suggestions in a row that are there already, or cannot be merged


class Trials:
    """The trials of one search.

    Args:
        sweep: what is asked for.
        study: where its trials are.

    Attributes:
        start: the recipe that the search starts from, as a candidate.
    """

    def __init__(self, sweep: Sweep, study: Study) -> None:
        self._sweep, self._study, self._spec = sweep, study, sweep.spec
        self._known: dict[str, Judged] = {}  # point → its answers
        _ = sweep.judge.tasks  # base and own adapters answer first: without a recovery nothing is tried
        self.start = self._evaluated_start()

    def run(self) -> str | None:
        """Try candidates until the budget is used; return why, where it ends before."""
        self._begin()
        with quiet_optuna():
            sampler = sampler_of(self._spec, self._sweep.space, self._study.parallel)
        while True:
            batch, finished = self._study.open_batch(), self._study.finished()
            if batch is None:
                ended, reason = self._end(finished)
                if ended:
                    return reason
            else:
                finished = [found for found in finished if found.number < batch.first]  # what was known when it began
            size = self._size(finished) if batch is None or batch.size is None else batch.size
            begun = None if batch is None or batch.size is None else batch
            together = []
            for _ in range(size - (0 if begun is None else self._study.ended_of(begun))):
                trial, point, begun = self._study.next(sampler, begun, size)
                together.append((trial, point))
            self._try(together, finished)

    def _size(self, finished: Sequence[Studied]) -> int:
        """Return how many trials the next batch has."""
        sizes = [self._study.parallel]
        if self._spec.used_budget is not None:
            sizes.append(self._spec.used_budget - sum(found.is_new for found in finished))
        if self._spec.used_type == "grid":
            sizes.append(self._study.waiting() + self._study.left_over())
        return max(1, min(sizes))

    def _try(self, together: Sequence[tuple[Trial, Point]], known: Sequence[Studied]) -> None:
        """Evaluate trials of one batch, and report what came of them in their order.

        Args:
            together: the trials with their points.
            known: trials that had ended when the batch began, against which all of it races.
        """
        earlier = {point_key(f.outcome.params): f for f in reversed(self._study.finished()) if f.outcome.repeats is None}
        firsts: dict[str, int] = {}  # point → number of the trial that evaluates it
        for trial, point in together:
            key = point_key(point)
            if key not in earlier or earlier[key].number > trial.number:
                firsts.setdefault(key, trial.number)
        new = [(point, trial.number) for trial, point in together if firsts.get(point_key(point)) == trial.number]
        outcomes = dict(zip((number for _, number in new), self._tried(new, known), strict=True))
        for trial, point in together:
            key = point_key(point)
            if trial.number in outcomes:
                outcome = outcomes[trial.number]
            else:
                number = firsts[key] if key in firsts else earlier[key].number
                same = outcomes[number] if key in firsts else earlier[key].outcome
                outcome = same.model_copy(update={"repeats": number, "seconds": 0.0, "examples": 0})
            self._study.tell(trial, outcome, self._values(outcome))

    def _evaluated_start(self) -> Run:
        began = time.perf_counter()
        subject = self._sweep.start
        judged = self._asked_everything(self._sweep.judge.begin(subject.candidate), "start")
        self._known["start"] = judged
        point = self._sweep.space.start or {}
        outcome = self._outcome(point, subject.candidate.key, judged.score, time.perf_counter() - began)
        return Studied(number=0, phase="start", outcome=outcome).run().model_copy(update={"number": None})

    def _begin(self) -> None:
        """Tell the study what is known, and which points come first."""
        space, study = self._sweep.space, self._study
        if space.start is not None:
            start = self._outcome(space.start, self.start.key, self._known["start"].score, self.start.seconds)
            study.add("start", start, self._values(start))
        if self._spec.zero_baseline:
            zero = self._zero()
            study.add("zero", zero, self._values(zero))
        for run, point in self._sweep.earlier:
            earlier = _outcome_of(run, point, run.goal(self._spec.maximize[0]))
            study.add("warm_start", earlier, self._values(earlier))
        points = [space.wanted(point) for point in self._spec.points]
        study.enqueue([*points, *(space.grid() if self._spec.used_type == "grid" else [])])

    def _end(self, finished: Sequence[Studied]) -> tuple[bool, str | None]:
        """Return whether the search ends, and why, where that is before its budget."""
        budget, space = self._spec.used_budget, self._sweep.space
        if budget is not None and sum(found.is_new for found in finished) >= budget:
            return True, None
        if self._spec.used_type == "grid" and not self._study.waiting():
            return True, None
        if reason := reason_to_stop([self.start, *(f.run() for f in finished)], self._spec, space.parameters):
            return True, reason
        tried = {point_key(f.outcome.params) for f in finished if f.outcome.repeats is None}
        if space.size is not None and len(tried) >= space.size:
            return True, None if budget is None else f"all {space.size} candidates were tried"
        last = finished[-_FRUITLESS:]
        if len(last) == _FRUITLESS and all(f.outcome.repeats is not None or f.outcome.error is not None for f in last):
            return True, f"{_FRUITLESS} suggestions in a row were there already, or could not be merged"
        return False, None

    def _tried(self, new: Sequence[tuple[Point, int]], known: Sequence[Studied]) -> list[Outcome]:
        """Evaluate candidates, as far as they can still win; side by side on a cluster."""
        if not new:
            return []
        best = self._best(known)
        numbers = [number for _, number in new]
        name = f"trial {numbers[0]}" if len(new) == 1 else f"trials {', '.join(map(str, numbers))}"
        with self._sweep.progress.trial(name, self._sweep.judge.total * len(new)):
            return self._sweep.evaluator.session.together([self._trying(*one, *best) for one in new])

    def _trying(self, point: Point, number: int, best_run: Run, best: Judged) -> Generator[Wanted, None, Outcome]:
        """Evaluate one candidate, as far as it can still win; yield what is asked next."""
        began = time.perf_counter()
        try:
            subject = self._sweep.subject(point, f"trial {number}")
        except (PlanError, RecipeError) as error:
            return Outcome(params=dict(point), error=str(error), seconds=round(time.perf_counter() - began, 3))
        candidate = self._sweep.judge.begin(subject.candidate)
        # one that is worse than the base somewhere ranks behind all others, whatever its score
        races = best_run.nonnegative or self._spec.maximize[0] == "worst_recovery" or not self._spec.constraint_nonnegative
        while not candidate.complete and not (races and cannot_win(candidate, best)):
            names = candidate.next(best)
            yield candidate.wanted(names)
            candidate.ask(names)
        key, seconds = subject.candidate.key, time.perf_counter() - began
        if not candidate.complete:
            left = {"stopped": True, "score": estimate(candidate, best), "expected": candidate.expected(best)}
            return self._outcome(point, key, candidate.score, seconds, **left)
        self._known[point_key(point)] = candidate
        return self._outcome(point, key, candidate.score, seconds)

    def _best(self, finished: Sequence[Studied]) -> tuple[Run, Judged]:
        """Return the best candidate so far with its answers; of a shared storage, the best that was evaluated here.

        A process that continues finds the answers where they are kept.
        """
        runs = [self.start, *(f.run() for f in finished if f.outcome.repeats is None)]
        for i in ranked(runs, self._spec):
            run, key = runs[i], point_key(runs[i].params)
            if run.phase == "start":
                return run, self._known["start"]
            if key not in self._known and self._sweep.options.storage is None and run.phase != "warm_start":
                judged = self._sweep.judge.begin(self._sweep.subject(run.params, f"trial {run.number}").candidate)
                self._known[key] = self._asked_everything(judged, f"trial {run.number}, kept answers")
            if key in self._known:
                return run, self._known[key]
        raise AssertionError("the start was not evaluated")

    def _asked_everything(self, judged: Judged, name: str) -> Judged:
        with self._sweep.progress.trial(name, self._sweep.judge.total):
            self._sweep.evaluator.session.prepare(judged.everything())
            while left := judged.left():
                judged.ask(left)
        return judged

    def _outcome(self, point: Point, key: str, found: Score, seconds: float, **stopped: Any) -> Outcome:
        """Return what came of a candidate; of one that was stopped with the score that it would have reached."""
        plain: dict[str, Any] = {
            "params": dict(point),
            "key": key,
            "score": None if stopped else found.goal(self._spec.maximize[0]),
            "worst": found.worst,
            "mean": found.mean,
            "results": _outcomes(found),
            "examples": found.examples,
            "seconds": round(seconds, 3),
        }
        return Outcome(**{**plain, **stopped})

    def _values(self, outcome: Outcome) -> list[float]:
        """Return the numbers that Optuna gets of a candidate; none of one that has failed."""
        if outcome.error is not None:
            return []
        if len(self._spec.maximize) == 1:
            return [_told(outcome.score)]
        run = Studied(number=0, phase="search", outcome=outcome).run()
        return [_told(run.goal(name)) for name in self._spec.maximize]

    def _zero(self) -> Outcome:
        """Return the base model as a candidate of scale 0."""
        results = {
            task.name: TaskOutcome(metric=task.base_value, recovery=0.0, interval=None) for task in self._sweep.judge.tasks
        }
        path = zero_path(self._sweep.space.parameters)
        point = {**self._sweep.space.anywhere(), **({} if path is None else {path: 0.0})}
        return Outcome(params=point, score=0.0, worst=0.0, mean=0.0, results=results)


def _outcomes(score: Score) -> dict[str, TaskOutcome]:
    return {
        name: TaskOutcome(metric=score.metric[name], recovery=value, interval=score.intervals[name])
        for name, value in score.recovery.items()
    }


def _outcome_of(run: Run, point: Point, goal: float | None) -> Outcome:
    """Return the candidate of an earlier study as one of this."""
    return Outcome(
        params=dict(point),
        key=run.key,
        score=goal,
        worst=run.worst,
        mean=run.mean,
        results=run.results,
        examples=run.examples,
    )


def _told(value: float | None) -> float:
    """Return a number of a candidate that was asked everything, as the storage gets it.

    Raises:
        AssertionError: there is none, though base and own adapters define a recovery of every task.
    """
    if value is None:
        raise AssertionError("a candidate that was asked everything has no recovery")
    return as_told(value)
