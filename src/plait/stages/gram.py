"""Combines whose coefficients depend on lengths and angles of the deltas: exact by concatenation, no matrix is formed.

The deltas are points of a Euclidean space, ⟨ΔWᵢ, ΔWⱼ⟩ its inner products; a path on a sphere between them stays in their span,
so every result here is Σ cₜ ΔWₜ.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from plait.deferred import Tensor, torch
from plait.records import Record
from plait.stages.base import GramCombine, Scope, StageParams, register_stage

_FLAT = 1e-6  # sines and lengths below this, relative to 1, are round-off of a Gram matrix
EachScope = Annotated[Scope, Field(description="Lengths and angles of each module's delta, or of the complete task vector.")]


class SlerpFields(Record):
    """Parameters of `slerp`, the stage and the method."""

    t: Annotated[float, Field(ge=0, le=1, description="How far: 0 is the first adapter, 1 the second.")] = 0.5
    norm: Annotated[
        Literal["raw", "interpolate"],
        Field(description="Put the deltas as they are into the formula, or turn the direction and interpolate the norm."),
    ] = "raw"
    scope: EachScope = "module"


@register_stage
class Slerp(SlerpFields, StageParams, GramCombine):
    """Go along the arc from the first delta to the second, wₜ ΔWₜ each (Shoemake 1985, eq. in §3.3).

    Straight, (1 − t) and t, where there is no one arc: one of them is zero, or they are parallel or antipodal.
    """

    name: Literal["slerp"] = "slerp"

    def problems(self, space: str, adapters: int) -> list[str]:
        """Refuse other numbers than two."""
        return (
            []
            if adapters == 2
            else [f"slerp goes from one adapter to another, and there are {adapters}; use 'multislerp' or 'karcher'"]
        )

    def coefficients(self, weights: Tensor, gram: Tensor) -> Tensor:
        """Return c (2,)."""
        way = weights.new_tensor([1 - self.t, self.t])
        lengths, cosines = _sphere(gram * torch.outer(weights, weights))
        angle = torch.arccos(cosines[0, 1])
        if lengths.min() == 0 or angle.sin() < _FLAT:
            return way * weights
        arc = (way * angle).sin() / angle.sin()
        return arc * weights * ((way @ lengths) / lengths if self.norm == "interpolate" else 1)


class MultiSlerpFields(Record):
    """Parameters of `multislerp`, the stage and the method."""

    normalize: Annotated[bool, Field(description="Divide the weights by the sum of their magnitudes.")] = True
    scope: EachScope = "module"


@register_stage
class MultiSlerp(MultiSlerpFields, StageParams, GramCombine):
    """Take the direction of the mean of the unit deltas, and the mean of their norms: Σ wₜ‖ΔWₜ‖ · m/‖m‖, m = Σ wₜ ΔWₜ/‖ΔWₜ‖.

    A negative weight turns its delta round. Unit deltas that cancel have no direction: the weighted mean is taken then.
    """

    name: Literal["multislerp"] = "multislerp"

    def coefficients(self, weights: Tensor, gram: Tensor) -> Tensor:
        """Return c (T,)."""
        points = _points(weights, gram, normalize=self.normalize)
        length = _length(points.share, points.cosines)
        if length <= _FLAT * points.share.sum():
            return points.share * points.turn
        return points.on_sphere(points.share / length)


class KarcherFields(Record):
    """Parameters of `karcher`, the stage and the method."""

    iterations: Annotated[int, Field(ge=1, le=10000, description="Steps that are made, at most.")] = 100
    tolerance: Annotated[float, Field(gt=0, le=1, description="Stop when a step turns by less, in radians.")] = 1e-9
    scope: EachScope = "module"


@register_stage
class Karcher(KarcherFields, StageParams, GramCombine):
    """Take the point of the sphere nearest to all unit deltas, Σ |wₜ| angle² least, times the weighted mean of their norms.

    Fixed-point iteration from the mean (Karcher 1977; Krakowski et al. 2007). A negative weight turns its delta round; a zero
    delta has no direction and counts with norm 0. Unit deltas that cancel give the weighted mean.
    """

    name: Literal["karcher"] = "karcher"

    def coefficients(self, weights: Tensor, gram: Tensor) -> Tensor:
        """Return c (T,)."""
        points = _points(weights, gram, normalize=True)
        share, cosines = torch.where(points.lengths > 0, points.share, 0), points.cosines
        length = _length(share, cosines)
        if length <= _FLAT * share.sum():
            return points.share * points.turn
        mean, share = share / length, share / share.sum()  # the mean as coefficients of the unit deltas
        for _ in range(self.iterations):
            cosine = (cosines @ mean).clamp(-1, 1)
            pull = share * _angle_over_sine(cosine)
            step = pull - (pull @ cosine) * mean  # in the tangent space at the mean
            angle = _length(step, cosines)
            if angle < self.tolerance:
                break
            mean = angle.cos() * mean + angle.sin() / angle * step
            mean = mean / _length(mean, cosines)
        return points.on_sphere(mean)


class MetaGPTFields(Record):
    """Parameters of `metagpt`, the stage and the method."""

    scope: Annotated[Scope, Field(description="Energies of the complete task vectors, or of each module.")] = "model"


@register_stage
class MetaGPT(MetaGPTFields, StageParams, GramCombine):
    """Weigh the adapters by their share of the energy: Σ wₜ λₜ ΔWₜ, λₜ = ‖τₜ‖² / Σ ‖τₛ‖² (MetaGPT, Theorem 4)."""

    name: Literal["metagpt"] = "metagpt"

    def coefficients(self, weights: Tensor, gram: Tensor) -> Tensor:
        """Return c (T,)."""
        energy = gram.diagonal().clamp(min=0)
        return weights * energy / energy.sum() if energy.sum() > 0 else weights / len(weights)


class ModelStockFields(Record):
    """Parameters of `model_stock`, the stage and the method."""

    scope: EachScope = "module"


@register_stage
class ModelStock(ModelStockFields, StageParams, GramCombine):
    """Shrink the mean by how much the adapters agree: t · mean(wₜ ΔWₜ), t = T cos θ / (1 + (T − 1) cos θ) (Model Stock, eq. 3).

    cos θ is the mean over all pairs. It is meant for runs of one task: where deltas point against each other t is negative.
    """

    name: Literal["model_stock"] = "model_stock"

    def coefficients(self, weights: Tensor, gram: Tensor) -> Tensor:
        """Return c (T,)."""
        count = len(weights)
        if count == 1:
            return weights
        _, cosines = _sphere(gram * torch.outer(weights, weights))
        cosine = cosines.triu(1).sum() / (count * (count - 1) / 2)
        left = 1 + (count - 1) * cosine  # ‖mean of the unit deltas‖² times T: nothing is left where they cancel
        return weights * cosine / left if left > _FLAT else torch.zeros_like(weights)


class _Points(NamedTuple):
    """The deltas as points of a sphere.

    Attributes:
        lengths: ‖ΔWₜ‖, (T,).
        turn: −1 where a negative weight turns a delta round, (T,).
        share: |wₜ|, (T,).
        cosines: of the turned unit deltas, (T, T); 0 for a zero delta.
    """

    lengths: Tensor
    turn: Tensor
    share: Tensor
    cosines: Tensor

    def on_sphere(self, mean: Tensor) -> Tensor:
        """Return the coefficients of the deltas for a unit mean (T,) of unit deltas, at the weighted mean of their norms."""
        safe = torch.where(self.lengths > 0, self.lengths, 1)
        return torch.where(self.lengths > 0, (self.share @ self.lengths) * mean * self.turn / safe, 0)


def _points(weights: Tensor, gram: Tensor, *, normalize: bool) -> _Points:
    share, turn = weights.abs(), torch.where(weights < 0, -1.0, 1.0).to(weights.dtype)
    if normalize and share.sum() > 0:
        share = share / share.sum()
    lengths, cosines = _sphere(gram)
    return _Points(lengths, turn, share, cosines * torch.outer(turn, turn))


def _sphere(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lengths (T,) and cosines (T, T) of points with these inner products; a cosine with a zero point is 0."""
    lengths = gram.diagonal().clamp(min=0).sqrt()
    products = torch.outer(lengths, lengths)
    return lengths, torch.where(products > 0, gram / torch.where(products > 0, products, 1), 0).clamp(-1, 1)


def _length(coefficients: Tensor, gram: Tensor) -> Tensor:
    """Return ‖Σ cₜ pₜ‖ of points with inner products `gram`."""
    return (coefficients @ gram @ coefficients).clamp(min=0).sqrt()


def _angle_over_sine(cosine: Tensor) -> Tensor:
    """Return θ / sin θ, its limit 1 at θ = 0, and 0 at θ = π, where no way round is the shortest."""
    angle = torch.arccos(cosine)
    sine = angle.sin()
    return torch.where(sine > _FLAT, angle / torch.where(sine > _FLAT, sine, 1), (cosine > 0).to(cosine.dtype))
