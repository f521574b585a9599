"""From parameters u to coefficients Λ and back, one class per link. The columns of Λ are those of its last dimension."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from plait.recipes.tuning import TuneSpec

_EDGE = 1e-3  # how near to its bounds a bounded link starts
_LEAST = 1e-8


class Link(ABC):
    """A differentiable map of parameters to coefficients."""

    def __init__(self, spec: TuneSpec) -> None:
        self.spec = spec

    @abstractmethod
    def begin(self, values: Tensor) -> dict[str, Tensor]:
        """Return the parameters that give coefficients (…, T), as near as the link reaches."""

    def values(self, parameters: dict[str, Tensor]) -> Tensor:
        """Return the coefficients (…, T)."""
        return parameters["u"]

    def settle(self, parameters: dict[str, Tensor]) -> None:  # noqa: B027 (most need nothing)
        """Project the parameters to their allowed range after an update."""


class Raw(Link):
    """Λ = u."""

    def begin(self, values: Tensor) -> dict[str, Tensor]:
        """Take the coefficients as they are."""
        return {"u": values.clone()}


class Projected(Raw):
    """Λ = u, clamped to [lowest, highest] after every update."""

    def begin(self, values: Tensor) -> dict[str, Tensor]:
        """Take the coefficients, clamped."""
        return {"u": values.clamp(self.spec.lowest, self.spec.highest)}

    def settle(self, parameters: dict[str, Tensor]) -> None:
        """Clamp."""
        parameters["u"].clamp_(self.spec.lowest, self.spec.highest)


class Sigmoid(Link):
    """Λ = 1 / (1 + e⁻ᵘ), in (0, 1)."""

    def begin(self, values: Tensor) -> dict[str, Tensor]:
        """Invert."""
        return {"u": values.clamp(_EDGE, 1 - _EDGE).logit()}

    def values(self, parameters: dict[str, Tensor]) -> Tensor:
        """Apply."""
        return parameters["u"].sigmoid()


class Tanh(Link):
    """Λ = tanh u, in (−1, 1) (SuperMerge)."""

    def begin(self, values: Tensor) -> dict[str, Tensor]:
        """Invert."""
        return {"u": values.clamp(_EDGE - 1, 1 - _EDGE).atanh()}

    def values(self, parameters: dict[str, Tensor]) -> Tensor:
        """Apply."""
        return parameters["u"].tanh()


class Softmax(Link):
    """Λ = softmax u over the columns: their sum is 1."""

    def begin(self, values: Tensor) -> dict[str, Tensor]:
        """Take the logarithms of the shares; equal ones where there are none."""
        return {"u": _shares(values).log()}

    def values(self, parameters: dict[str, Tensor]) -> Tensor:
        """Apply."""
        return parameters["u"].softmax(-1)


class SimplexScaled(Link):
    """Λ = m ⊙ softmax u, one magnitude m for all, per row, or per row and column; m may become negative."""

    def begin(self, values: Tensor) -> dict[str, Tensor]:
        """Take shares, and the sums as magnitudes."""
        rows = values.clamp(min=0).sum(-1, keepdim=True)
        given = self.spec.magnitude_initial
        magnitude = rows if given is None else torch.full_like(rows, given)
        match self.spec.magnitude:
            case "global":
                magnitude = magnitude.mean().reshape((1,) * values.ndim)
            case "per_task":
                magnitude = magnitude.expand(values.shape).clone()
        return {"u": _shares(values).log(), "m": magnitude}

    def values(self, parameters: dict[str, Tensor]) -> Tensor:
        """Apply."""
        m = parameters["m"] if self.spec.learn_magnitude else parameters["m"].detach()
        return m * parameters["u"].softmax(-1)


LINKS: dict[str, type[Link]] = {
    "raw": Raw,
    "projected": Projected,
    "sigmoid": Sigmoid,
    "tanh": Tanh,
    "softmax": Softmax,
    "simplex_scaled": SimplexScaled,
}


def normalized(values: Tensor) -> Tensor:
    """Return coefficients divided by their sum over the columns, which counts as 1e-8 at least."""
    return values / values.sum(-1, keepdim=True).clamp(min=_LEAST)


def _shares(values: Tensor) -> Tensor:
    positive = values.clamp(min=0)
    total = positive.sum(-1, keepdim=True)
    even = torch.full_like(positive, 1 / positive.shape[-1])
    return torch.where(total > 0, positive / total.clamp(min=_LEAST), even).clamp(min=1e-6)
