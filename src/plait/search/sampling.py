"""Optuna's samplers, such that what they suggest for a trial depends on the seed, its number, the finished trials and those of
its batch before it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from optuna import Study
from optuna import __version__ as version
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from plait.errors import PlanError
from plait.libraries.optuna import process_knows_pending, without_trial
from plait.notices import announce
from plait.recipes.search import SearchSpec
from plait.search.recovery_sampler import RecoverySampler
from plait.search.space import SearchSpace

_MOST = 2**32  # Optuna takes seeds below it


class NumberedSampler(BaseSampler):
    """A sampler that is made anew for every trial: nothing is lost with a process that ends.

    Args:
        make: seed → a sampler.
        seed: of the search.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed
        self._number, self._sampler = -1, make(seed)

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        if trial.number != self._number:
            self._number, self._sampler = trial.number, self._make((self._seed * 1_000_003 + trial.number) % _MOST)
        return self._sampler

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the parameters that are sampled together."""
        return self._of(trial).infer_relative_search_space(without_trial(study, trial.number), trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """Return their values."""
        return self._of(trial).sample_relative(without_trial(study, trial.number), trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return the value of another parameter."""
        seen = without_trial(study, trial.number)
        return self._of(trial).sample_independent(seen, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Tell the sampler of a trial that begins."""
        self._of(trial).before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Tell the sampler of a trial that ends."""
        self._of(trial).after_trial(study, trial, state, values)


def sampler_of(spec: SearchSpec, space: SearchSpace, parallel: int = 1) -> BaseSampler:
    """Return the sampler that a search asks for; a grid's points are given, and nothing is sampled.

    Args:
        spec: what is asked for.
        space: the candidates.
        parallel: trials of a batch: later ones know of those before them that they have begun, and avoid their places.

    Raises:
        PlanError: the installed Optuna's Gaussian process does not know of trials that have begun.
    """
    if spec.used_type in ("grid", "random"):
        return NumberedSampler(lambda seed: RandomSampler(seed=seed), spec.seed)
    count = spec.used_init_points
    if len(spec.maximize) == 1:
        goal, behind = spec.maximize[0], spec.constraint_nonnegative
        return RecoverySampler(space, goal, nonnegative=behind, init_points=count, seed=spec.seed)
    if not space.is_conditional:
        if parallel > 1 and not process_knows_pending():
            raise PlanError(
                f"search.parallel is {parallel}: the Gaussian process of the installed Optuna ({version}) would suggest the "
                "same candidate several times. Install optuna 5.0 or later, or give --parallel 1 or --type random."
            )
        return NumberedSampler(
            lambda seed: GPSampler(seed=seed, n_startup_trials=count, warn_independent_sampling=False), spec.seed
        )
    announce(
        "search: some parameters belong to some of the methods only, which a Gaussian process has no place for; the "
        "tree-structured Parzen estimator (TPE) searches in its place."
    )
    return NumberedSampler(
        lambda seed: TPESampler(seed=seed, n_startup_trials=count, multivariate=True, group=True, constant_liar=True),
        spec.seed,
    )
