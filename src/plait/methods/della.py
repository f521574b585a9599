"""DELLA: drop entries at random, the smaller the likelier."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from plait.methods.base import Preset, Source, register
from plait.methods.ties import ElectionParams
from plait.stages.elect import Elect
from plait.stages.pipeline import Pipeline
from plait.stages.sparsify import DropByRank


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


register(
    Preset(
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
        stages=lambda params: Pipeline(pre=(DropByRank.of(params),), combine=Elect.of(params)),
    )
)
