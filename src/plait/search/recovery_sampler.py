"""A sampler for one goal, by a Gaussian process per task: the goal is a known function of the tasks' recoveries.

The smallest of several recoveries has a kink wherever another task becomes the worst, while every recovery by itself changes
smoothly. So each is learned by a process of its own, and the improvement of the goal is expected over all of them:
Bayesian optimization of composite functions (Astudillo and Frazier, arXiv 1906.01537, section 3, with their Monte Carlo
estimate of the expected improvement). Differences: the processes of two tasks are independent, and the largest expectation is
sought among points at random and near good ones, not by gradients, since spaces have choices and integers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import qmc

from plait.recipes.candidates import Point, SearchParameter
from plait.search.judging import goal_of
from plait.search.outcome import FOUND, Outcome, as_told
from plait.search.space import SearchSpace, point_key
from plait.tasks.answers import FloatArray

_POINTS = 2048  # at random, of which the one with the largest expectation is taken
_NEAR, _STEPS, _LEADERS = 192, (0.03, 0.1), 3  # and near each of the best: how many, standard deviations, how many best
_DRAWS = 256
_FLAT = 1e-9  # an expected improvement below it says nothing
_APART = 0.03  # of the range: candidates that are nearer in everything give the same answers, or nearly
_SCALE = 0.1  # of recoveries that do not differ
_JITTER = 1e-6  # variance of a recovery that all examples gave, besides the noise that a process finds


class RecoverySampler(BaseSampler):
    """Suggests the candidate whose goal is expected to improve most, given every task's recoveries so far.

    The first `init_points` candidates are points of a scrambled Sobol sequence.

    Args:
        space: the candidates.
        goal: `worst_recovery`, `mean_recovery` or `TASK.recovery`.
        nonnegative: whether a candidate that is worse than the base on some task ranks behind all others.
        init_points: candidates before the first that is expected to be good.
        seed: of the search.
    """

    def __init__(self, space: SearchSpace, goal: str, *, nonnegative: bool, init_points: int, seed: int) -> None:
        self._space, self._goal, self._nonnegative = space, goal, nonnegative
        self._init_points, self._seed = init_points, seed

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return all parameters: they are sampled together."""
        return self._space.distributions({p.path for p in self._space.parameters})

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """Return the values of the parameters that the suggested candidate has."""
        others = [t for t in study.get_trials(deepcopy=False) if t.params and t.number != trial.number]
        points = {t.number: self._space.point(t.params) for t in others}
        known = [found for t in others if (found := _observed(t, points[t.number])) is not None]
        if len(known) < self._init_points or not any(found.complete for found in known):
            return self._space.labels(self._spread(trial.number, {point_key(point) for point in points.values()}))
        begun = [points[t.number] for t in others if t.state is TrialState.RUNNING]
        rng = np.random.default_rng([self._seed, trial.number])
        chosen = self._expected(known, begun, list(points.values()), rng)
        return self._space.labels(chosen)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return the value of a parameter that a point which was given leaves out."""
        sampler = RandomSampler(seed=(self._seed * 1_000_003 + trial.number) % 2**32)
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def _spread(self, number: int, tried: set[str]) -> Point:
        """Return a point of the Sobol sequence that was not tried, if there is one."""
        sequence = qmc.Sobol(len(self._space.parameters), seed=self._seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # counts that are not powers of two are not balanced
            points = [self._space.at(row) for row in sequence.random(number + 100)[number:]]
        return next((point for point in points if point_key(point) not in tried), points[0])

    def _expected(
        self, known: Sequence[_Observed], begun: Sequence[Point], tried: Sequence[Point], rng: np.random.Generator
    ) -> Point:
        """Return the point whose goal is expected to improve most.

        Args:
            known: candidates with recoveries, one of them complete at least.
            begun: of trials whose recoveries are not known yet.
            tried: of all trials, those that could not be merged included; the suggestion keeps apart from them.
            rng: of the points and the draws.
        """
        features = partial(_features, self._space.parameters)
        at, complete = features([found.point for found in known]), [found for found in known if found.complete]
        names = tuple(complete[0].recoveries)
        processes = [_Process(at, [found.recoveries.get(name) for found in known], rng) for name in names]
        if begun:
            for process in processes:
                process.expect(features(begun))
        goals = self._goals({name: np.array([found.recoveries[name][0] for found in complete]) for name in names})
        order, normal = np.argsort(-goals, kind="stable"), rng.standard_normal((len(names), _DRAWS))

        def most_promising(points: Sequence[Point], there: FloatArray) -> Point:
            drawn = self._goals({name: p.draws(there, z) for name, p, z in zip(names, processes, normal, strict=True)})
            expected = np.maximum(drawn - goals[order[0]], 0).mean(1)
            return points[int(np.argmax(expected if expected.max() > _FLAT else drawn.mean(1) + drawn.std(1)))]

        leaders = [complete[i].point for i in order[:_LEADERS]]
        points = [self._space.at(row) for row in rng.random((_POINTS, len(self._space.parameters)))]
        keys, there = {point_key(point) for point in tried}, features(tried)

        def apart(some: Sequence[Point]) -> tuple[list[Point], FloatArray]:
            """Return those that were not tried, away from what was tried where some are, and their features."""
            anew = [point for key, point in {point_key(p): p for p in some}.items() if key not in keys]
            if not anew:
                return [], there[:0]
            rows = features(anew)
            away = np.flatnonzero(np.abs(there - rows[:, None]).max(2).min(1) >= _APART)
            chosen = away if len(away) else np.arange(len(anew))
            return [anew[i] for i in chosen], rows[chosen]

        anew, rows = apart([*points, *(p for leader in leaders for p in self._near(leader, rng))])
        if not anew:
            return points[0]
        first = most_promising(anew, rows)
        nearer, rows = apart(self._near(first, rng))
        return most_promising([first, *nearer], np.concatenate([features([first]), rows]))

    def _near(self, point: Point, rng: np.random.Generator) -> list[Point]:
        """Return points near one."""
        middle = self._space.unit(point)
        steps = np.concatenate([rng.normal(0, step, (_NEAR // len(_STEPS), len(middle))) for step in _STEPS])
        return [self._space.at(row) for row in np.clip(middle + steps, 0, 1)]

    def _goals(self, recoveries: Mapping[str, FloatArray]) -> FloatArray:
        """Return the goal of each; the worst recovery of one that ranks behind since it is below 0."""
        found = goal_of(recoveries, self._goal)
        worst = np.stack(list(recoveries.values())).min(0)
        return np.where(worst < 0, worst, found) if self._nonnegative else found


class _Process:
    """The recoveries of one task as a Gaussian process: Matérn 5/2 with a length per feature, and noise.

    Args:
        at: features, [trials, features].
        values: recovery and its variance per trial; None where it has none.
        rng: of the starts of the fit.
    """

    def __init__(self, at: FloatArray, values: Sequence[tuple[float, float] | None], rng: np.random.Generator) -> None:
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        self._at = at[[i for i, value in enumerate(values) if value is not None]]
        found, variance = np.array([value for value in values if value is not None]).T
        self._middle, self._scale = found.mean(), found.std() or _SCALE
        self._found, self._variance = (found - self._middle) / self._scale, variance / self._scale**2 + _JITTER
        shape = Matern([0.5] * at.shape[1], (0.1, 10.0), nu=2.5)
        kernel = ConstantKernel(1.0, (0.05, 20.0)) * shape + WhiteKernel(1e-2, (1e-4, 0.2))
        self._fitted = GaussianProcessRegressor(
            kernel, alpha=self._variance, n_restarts_optimizer=1, random_state=int(rng.integers(2**31))
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of lengths at their bounds: features that change nothing
            self._fitted.fit(self._at, self._found)

    def expect(self, at: FloatArray) -> None:
        """Take trials that have begun for what is expected of them: later ones of their batch avoid their places."""
        from sklearn.gaussian_process import GaussianProcessRegressor

        self._found = np.concatenate([self._found, self._fitted.predict(at)])
        self._variance = np.concatenate([self._variance, np.full(len(at), _JITTER)])
        self._at = np.concatenate([self._at, at])
        same = GaussianProcessRegressor(self._fitted.kernel_, alpha=self._variance, optimizer=None)
        self._fitted = same.fit(self._at, self._found)

    def draws(self, at: FloatArray, normal: FloatArray) -> FloatArray:
        """Return draws of the recoveries without noise, [points, draws], from draws of a standard normal variable."""
        mean, deviation = self._fitted.predict(at, return_std=True)
        smooth = np.sqrt(np.maximum(deviation**2 - self._fitted.kernel_.k2.noise_level, 0.0))
        return np.asarray((mean[:, None] + smooth[:, None] * normal) * self._scale + self._middle)


@dataclass(frozen=True)
class _Observed:
    """A candidate with its recoveries.

    Attributes:
        point: path → value.
        recoveries: task → recovery, as the search gets it, and the variance of its estimate.
        complete: whether it was asked everything.
    """

    point: Point
    recoveries: Mapping[str, tuple[float, float]]
    complete: bool


def _observed(trial: FrozenTrial, point: Point) -> _Observed | None:
    """Return what came of a trial; None of one that has not ended, could not be merged, or repeats another."""
    if trial.state is not TrialState.COMPLETE or FOUND not in trial.user_attrs:
        return None
    outcome = Outcome.model_validate(trial.user_attrs[FOUND])
    if outcome.repeats is not None:
        return None
    values = (
        {name: (as_told(value), deviation**2) for name, (value, deviation) in outcome.expected.items()}
        if outcome.stopped
        else {name: (as_told(result.recovery), 0.0) for name, result in outcome.results.items() if result.recovery is not None}
    )
    return _Observed(point, values, not outcome.stopped)


def _features(parameters: Sequence[SearchParameter], points: Sequence[Point]) -> FloatArray:
    """Return points as a process has them, [points, features].

    Numbers lie between 0 and 1; two choices have the distance 1; a parameter that a point does not have is in the middle.
    """
    return np.array([[x for p in parameters for x in _feature(p, point)] for point in points], dtype=float)


def _feature(parameter: SearchParameter, point: Point) -> list[float]:
    has, value = parameter.path in point, point.get(parameter.path)
    if parameter.is_numeric:
        return [parameter.unit(value) if has else 0.5]
    return [float(has and value == choice) / 2**0.5 for choice in parameter.ordered]
