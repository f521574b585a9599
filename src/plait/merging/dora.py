"""DoRA, exactly: a linear merge of DoRA adapters is a DoRA adapter.

W'ₜ = mₜ ⊙ (W + sₜBₜAₜ) / ‖W + sₜBₜAₜ‖_row is a row scaling and a LoRA: with cₜ = mₜ / ‖W + sₜBₜAₜ‖_row,
ΔWₜ = diag(cₜ − 1) W + diag(cₜ) sₜBₜAₜ. Sums stay in that form, diag(d) W + L, and
diag(1 + d) (W + diag(1 + d)⁻¹ L) is DoRA again with B'A' = diag(1 + d)⁻¹ L and m' = (1 + d) ⊙ ‖W + B'A'‖_row.
What a truncation leaves out of L, it leaves out of ΔW: L is truncated, before it becomes B'A'.
Source: Liu et al. 2024 (arXiv:2402.09353), eq. 5; the closure under sums is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from plait.adapters.lowrank import LowRank
from plait.deferred import Tensor, torch
from plait.errors import PlanError
from plait.linalg.blocks import block_ranges
from plait.linalg.factored import rank_for_energy

_SMALLEST = 1e-6  # of 1 + d: below this a row of the merged model vanishes, and its direction with it


def row_norms(weight: Tensor, delta: LowRank) -> Tensor:
    """Return ‖W + BA‖ of every row, (d_out,), by blocks of rows.

    Args:
        weight: (d_out, d_in).
        delta: of the same shape.
    """
    norms = [torch.linalg.vector_norm(weight[i:j] + delta.b[i:j] @ delta.a, dim=1) for i, j in block_ranges(*weight.shape)]
    return torch.cat(norms)


def merge_dora(
    module: str,
    weight: Tensor,
    deltas: Sequence[LowRank],
    magnitudes: Sequence[Tensor | None],
    coefficients: Sequence[float],
) -> tuple[LowRank, Tensor]:
    """Merge one module linearly.

    Args:
        module: its path, for messages.
        weight: (d_out, d_in) of the base model.
        deltas: with scalings folded in, rank 0 for an adapter without the module.
        magnitudes: (d_out,) per adapter; None for a plain LoRA, whose rows are not rescaled.
        coefficients: per adapter.

    Returns:
        L, and 1 + d (d_out,), for `peft_factors`.

    Raises:
        PlanError: a row of the merged weight vanishes, so that it has no direction to rescale.
    """
    scales = [
        torch.ones(weight.shape[0], dtype=weight.dtype) if m is None else m.to(weight.dtype) / row_norms(weight, d)
        for d, m in zip(deltas, magnitudes, strict=True)
    ]
    gain = 1 + sum((c * (scale - 1) for c, scale in zip(coefficients, scales, strict=True)), torch.zeros(()))
    sound = gain.isfinite() & (gain.abs() >= _SMALLEST)  # a row of W + sBA that is zero has no direction
    if not bool(sound.all()):
        raise PlanError(
            f"{module}: {int((~sound).sum())} rows of the base model vanish under these adapters and weights; "
            "DoRA cannot express that. Change the weights."
        )
    parts = [LowRank(d.a, d.b * scale.unsqueeze(1)) for d, scale in zip(deltas, scales, strict=True)]
    return LowRank.concatenate(parts, coefficients), gain


def peft_factors(weight: Tensor, delta: LowRank, gain: Tensor) -> tuple[LowRank, Tensor]:
    """Return B'A' and m', (d_out,), of diag(d) W + L, for L as it is kept and gain 1 + d."""
    factors = LowRank(delta.a, delta.b / gain.unsqueeze(1))
    return factors, gain * row_norms(weight, factors)


def total_energy(weight: Tensor, delta: LowRank, gain: Tensor) -> float:
    """Return ‖diag(d) W + L‖²_F for L and 1 + d, by blocks of rows."""
    blocks = ((gain[i:j, None] - 1) * weight[i:j] + delta.b[i:j] @ delta.a for i, j in block_ranges(*weight.shape))
    return math.fsum(float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2 for x in blocks)


def dora_rank_at_energy(weight: Tensor, delta: LowRank, gain: Tensor, share: float) -> int:
    """Return the lowest rank of L that keeps a share of ‖diag(d) W + L‖²: d is kept exactly, so L may lose the rest of all."""
    if delta.rank == 0:
        return 1
    s = delta.singular_values()
    own = float(s.square().sum())
    spared = (1 - share) * total_energy(weight, delta, gain)
    return rank_for_energy(s, 1 - spared / own) if spared < own else 1
