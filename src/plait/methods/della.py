"""DELLA: drop entries at random, the smaller the likelier."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from plait.linalg.sparsify import row_ranks
from plait.methods.base import Block, ElementwiseMethod, Source, register
from plait.methods.ties import ElectionParams, check_election, elect_and_merge, majority


class DellaParams(ElectionParams):
    """Parameters of `della`."""

    density: Annotated[float, Field(gt=0, le=1, description="Mean probability with which an entry is kept (1 − p).")] = 0.7
    epsilon: Annotated[
        float,
        Field(ge=0, lt=0.5, description="The smallest entry of a row is kept with density − ε, the largest with + ε."),
    ] = 0.07

    @model_validator(mode="after")
    def _probabilities(self) -> DellaParams:
        if not 0 < self.density - self.epsilon <= self.density + self.epsilon <= 1:
            raise ValueError(f"density ± epsilon is {self.density} ± {self.epsilon}; both ends must lie in (0, 1]")
        return self


def magnitude_probabilities(x: Tensor, density: float, epsilon: float) -> Tensor:
    """Return keep probabilities (p, q), linear in the rank of |x| within its row from density − ε to density + ε."""
    columns = x.shape[-1]
    if columns == 1:
        return torch.full_like(x, density)
    return row_ranks(x).to(x.dtype).mul_(2 * epsilon / (columns - 1)).add_(density - epsilon)


def drop_by_rank(block: Block, params: DellaParams) -> Tensor:
    """Drop by magnitude rank and rescale by 1 / probability, (T, p, q)."""
    kept = []
    for t, x in enumerate(block.x):
        p = magnitude_probabilities(x, params.density, params.epsilon)
        kept.append(torch.where(block.uniform(t) < p, x / p, 0))
    return torch.stack(kept)


def della(block: Block, params: DellaParams) -> Tensor:
    """Drop, rescale, elect a sign, average those that agree; (p, q)."""
    return elect_and_merge(block, drop_by_rank(block, params), params)


register(
    ElementwiseMethod(
        name="della",
        summary="Drop entries at random, small ones more likely, rescale, then elect signs and average.",
        equation="pᵢ = density − ε + 2ε · rankᵢ / (n − 1);  x̂ = m ⊙ x / p;  then elect and average as TIES",
        params=DellaParams,
        source=Source("Deep et al. 2024, DELLA-Merging, §3", "https://arxiv.org/abs/2406.11617"),
        deviation=(
            "`density` = 1 − the paper's p, ε = half its window (0.14). Survivors are rescaled by 1/p as in the paper "
            "(mergekit matches the L1 norm). The paper's λ = 1.1 is `scale`, 1 by default."
        ),
        randomised=True,
        combine=della,
        check=check_election,
        surveys=lambda params: majority(params, "model", lambda block: drop_by_rank(block, params)),
    )
)
