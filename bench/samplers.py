"""How good a candidate twenty trials find, by sampler, on made-up problems: three tasks, three weights, the worst decides.

`python bench/samplers.py` prints, per sampler, the mean of the best worst recovery and in how many of the searches it is above
the best of a grid of 27. A task's examples are answered rightly where a margin is positive: it grows with the weight of the
task's own adapter until that is large enough, and changes with the weights of the others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from itertools import product

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler

from plait.libraries.optuna import quiet_optuna
from plait.recipes.loading import load_recipe
from plait.search.outcome import FOUND, Outcome, as_told
from plait.search.record import TaskOutcome
from plait.search.sampling import NumberedSampler, sampler_of
from plait.search.space import SearchSpace

NAMES = ("a", "b", "c")
PATHS = tuple(f"adapters.{name}.weight" for name in NAMES)
LEVELS = (0.1, 0.2, 0.4)  # of the grid
EXAMPLES, BUDGET = 100, 20
SAMPLERS: Mapping[str, Callable[[int], BaseSampler] | None] = {
    "random": lambda seed: RandomSampler(seed=seed),
    "Optuna's TPE, of the goal": lambda seed: TPESampler(seed=seed, n_startup_trials=8, multivariate=True),
    "Optuna's Gaussian process, of the goal": lambda seed: GPSampler(
        seed=seed, n_startup_trials=8, warn_independent_sampling=False
    ),
    "plait's, a Gaussian process per task": None,
}


class Problem:
    """Three tasks whose recoveries depend on three weights.

    Args:
        seed: of everything about it.
    """

    def __init__(self, seed: int) -> None:
        draw, count = np.random.default_rng(seed), len(NAMES)
        self._start = draw.normal(draw.uniform(-0.3, 0.6, (count, 1)), 1, (count, EXAMPLES))
        self._gain = np.zeros((count, count, EXAMPLES))
        for task, adapter in product(range(count), repeat=2):
            own = task == adapter
            middle = draw.uniform(0.8, 2.5) if own else draw.uniform(-0.5, 0.1)
            self._gain[task, adapter] = draw.normal(middle, 1.0 if own else draw.uniform(0.5, 1.5), EXAMPLES)
        self._enough, self._harm = draw.uniform(0.25, 1.0, count), draw.uniform(0.2, 1.5, (count, count))
        self._base = self._accuracy(np.zeros(count))
        self._own = np.array([self._accuracy(np.eye(count)[task])[task] for task in range(count)])

    @property
    def is_usable(self) -> bool:
        """Whether every adapter gains enough on its own task for a recovery to mean something."""
        return bool((self._own - self._base > 0.08).all())

    def recoveries(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the tasks' recoveries under these weights."""
        return (self._accuracy(weights) - self._base) / (self._own - self._base)

    def grid(self) -> float:
        """Return the best worst recovery of a grid."""
        return max(float(self.recoveries(np.array(at)).min()) for at in product(LEVELS, repeat=len(NAMES)))

    def _accuracy(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        found = []
        for task, enough in enumerate(self._enough):
            margin = self._start[task].copy()
            for adapter, weight in enumerate(weights):
                if adapter == task:
                    margin += self._gain[task, task] * enough * np.tanh(weight / enough)
                else:
                    margin += self._gain[task, adapter] * weight - self._harm[task, adapter] * weight**2
            found.append((margin > 0).mean())
        return np.array(found)


def search(problem: Problem, make: Callable[[int], BaseSampler] | None, seed: int) -> float:
    """Return the best worst recovery that a search finds."""
    recipe = load_recipe(
        "version: 1\nadapters: [a=./a, b=./b, c=./c]\nmethod: linear\n"
        f"search: {{budget: {BUDGET}, seed: {seed}, space: {{'adapters.*.weight': 0.05..1:log}}}}\n"
    )
    space, study, best = SearchSpace(recipe), optuna.create_study(direction="maximize"), -np.inf
    study.sampler = sampler_of(recipe.search, space) if make is None else NumberedSampler(make, seed)
    for _ in range(BUDGET):
        trial = study.ask()
        point = space.suggest(trial)
        found = problem.recoveries(np.array([point[path] for path in PATHS], dtype=float))
        worst, mean = float(found.min()), float(found.mean())
        recoveries = zip(NAMES, found, strict=True)
        results = {name: TaskOutcome(metric=0.0, recovery=float(x), interval=None) for name, x in recoveries}
        outcome = Outcome(params=point, score=worst, worst=worst, mean=mean, results=results)
        trial.set_user_attr(FOUND, outcome.model_dump(mode="json"))
        study.tell(trial, as_told(worst))
        best = max(best, worst)
    return best


def main() -> None:
    """Compare the samplers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=12, help="how many [%(default)s]")
    parser.add_argument("--seeds", type=int, default=3, help="searches of each [%(default)s]")
    options = parser.parse_args()
    usable = (problem for problem in map(Problem, range(10_000)) if problem.is_usable)
    problems = [next(usable) for _ in range(options.problems)]
    grids = np.array([[problem.grid()] for problem in problems])
    print(f"{'a grid of 27':40} {grids.mean():.3f}")
    with quiet_optuna():
        for name, make in SAMPLERS.items():
            found = np.array([[search(problem, make, seed) for seed in range(options.seeds)] for problem in problems])
            print(f"{name:40} {found.mean():.3f}  above the grid in {int((found > grids).sum())} of {found.size}", flush=True)


if __name__ == "__main__":
    main()
