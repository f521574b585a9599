"""The linear family: one coefficient per adapter, exact whatever the ranks."""

from __future__ import annotations

from dataclasses import replace

from plait.methods.base import NoParams, Preset, Source, register
from plait.stages.pipeline import Pipeline
from plait.stages.sums import Sum

_TASK_ARITHMETIC = Source("Ilharco et al. 2023, Task Arithmetic", "https://arxiv.org/abs/2212.04089")


LINEAR = Preset(
    name="linear",
    summary="Weighted sum of the deltas, exact by concatenating factors.",
    equation="ΔW = Σ wₜ ΔWₜ",
    params=NoParams,
    source=_TASK_ARITHMETIC,
    deviation="The paper's single λ is `scale`; weights default to 1. In `factors` space it is PEFT's `linear`.",
    combines="linear",
    stages=lambda params: Pipeline(Sum()),
)

register(LINEAR)
register(replace(LINEAR, name="cat", summary="PEFT's name for the exact weighted sum; the same as `linear`."))
register(replace(LINEAR, name="task_arithmetic", summary="The paper's name for the exact weighted sum; the same as `linear`."))
register(
    replace(
        LINEAR,
        name="svd",
        summary="Weighted sum, then the best approximation of the largest source rank (or `output.rank`).",
        equation="ΔW = SVDᵣ(Σ wₜ ΔWₜ)",
        source=Source("PEFT add_weighted_adapter(combination_type='svd'); Eckart & Young 1936"),
        deviation="QR of the stacked factors and an R × R SVD, not a dense one; √S on both factors, where PEFT puts S on B.",
        spaces=("delta", "core", "knots"),
        auto_rank="largest",
    )
)
