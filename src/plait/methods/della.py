"""DELLA: drop entries at random, the smaller the likelier."""

from __future__ import annotations

from plait.methods.base import Preset, Source, register
from plait.stages.elect import Elect, ElectFields
from plait.stages.pipeline import Pipeline
from plait.stages.sparsify import DropByRank, DropByRankFields


class DellaParams(ElectFields, DropByRankFields):
    """Parameters of `della`."""


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
