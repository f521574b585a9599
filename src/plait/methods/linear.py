"""The linear family: one coefficient per adapter, exact whatever the ranks."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from plait.methods.base import LinearMethod, NoParams, Source, register

_TASK_ARITHMETIC = Source("Ilharco et al. 2023, Task Arithmetic", "https://arxiv.org/abs/2212.04089")


def _weights(weights: Tensor, params: NoParams, module: str) -> Tensor:
    return weights


LINEAR = LinearMethod(
    name="linear",
    summary="Weighted sum of the deltas, exact by concatenating factors.",
    equation="ΔW = Σ wₜ ΔWₜ",
    params=NoParams,
    source=_TASK_ARITHMETIC,
    deviation="The paper's single λ is `scale`; weights default to 1. In `factors` space it is PEFT's `linear`.",
    coefficients=_weights,
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
