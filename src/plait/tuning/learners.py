"""What learns: the factors of a merge, or coefficients of columns. The loop sees both alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from plait.mixture import Mixture
from plait.mixture.columns import Columns
from plait.mixture.factors import LearnedFactors
from plait.recipes.tuning import Granularity, TuneSpec
from plait.tuning.links import LINKS, normalized


class Learner(ABC):
    """Float32 parameters that act on the live base."""

    @abstractmethod
    def named(self) -> dict[str, nn.Parameter]:
        """Return all that is learned, by name."""

    @abstractmethod
    def acting(self, heads: str | None = None) -> AbstractContextManager[nn.Module]:
        """Make it act, with gradients."""

    @abstractmethod
    def settle(self) -> None:
        """Project the parameters to their allowed range and apply them to the model; called after every change."""

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters."""
        return list(self.named().values())

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the parameters, as `load` takes it."""
        return {name: p.detach().clone() for name, p in self.named().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set the parameters."""
        with torch.no_grad():
            for name, p in self.named().items():
                p.copy_(state[name])
        self.settle()


class FactorLearner(Learner):
    """Low-rank factors; see `Mixture.learning`."""

    def __init__(self, mixture: Mixture, factors: LearnedFactors) -> None:
        self._mixture = mixture
        self.factors = factors

    def named(self) -> dict[str, nn.Parameter]:
        """Return A and B transposed of every target."""
        return dict(self.factors.named())

    def acting(self, heads: str | None = None) -> AbstractContextManager[nn.Module]:
        """Make the factors act."""
        return self._mixture.learning(self.factors, heads=heads)

    def settle(self) -> None:
        """Let the parameters act."""
        self.factors.refresh()


class CoefficientLearner(Learner):
    """Λ over columns, of which the first may be a merge result, whose coefficient has no link.

    Args:
        mixture: whose base the columns act on.
        columns: deltas side by side.
        granularity: what the entries of Λ mean.
        start: Λ at the start; float32.
        spec: link and bounds.
        free: columns at the front that are without a link.
        fixed: a factor on Λ that is not learned (the levels below, in a tree).
        groups: columns → parameter: columns of a group share one (a node's child). None: every column has its own.
    """

    def __init__(
        self,
        mixture: Mixture,
        columns: Columns,
        granularity: Granularity,
        start: Tensor,
        spec: TuneSpec,
        *,
        free: int = 0,
        fixed: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> None:
        self.columns = columns
        self.granularity: Granularity = granularity
        self._mixture = mixture
        self._spec = spec
        self._free = free
        self._fixed = fixed
        self._groups = groups
        self._link = LINKS[spec.used_link](spec)
        found = self._link.begin(start[..., free:])
        if free:
            found["free"] = start[..., :free].clone()
        self._named = {name: nn.Parameter(value.to(torch.float32)) for name, value in found.items()}

    def named(self) -> dict[str, nn.Parameter]:
        """Return the link's parameters, `u` first."""
        return self._named

    def values(self) -> Tensor:
        """Return Λ as it is now; gradients reach the parameters."""
        found = self._link.values(dict(self._named))
        if self._spec.normalize:
            found = normalized(found)
        if self._groups is not None:
            found = found[..., self._groups]
        if self._free:
            found = torch.cat([self._named["free"], found], -1)
        return found if self._fixed is None else found * self._fixed

    def acting(self, heads: str | None = None) -> AbstractContextManager[nn.Module]:
        """Make the columns act."""
        return self._mixture.combined(self.columns, self.values(), self.granularity, heads=heads)

    def settle(self) -> None:
        """Project."""
        with torch.no_grad():
            self._link.settle({name: p.data for name, p in self._named.items()})
