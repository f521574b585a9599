"""`factors`: A and B merged separately, as PEFT's `add_weighted_adapter` does. For reproduction only."""

from __future__ import annotations

from collections.abc import Sequence

from plait.adapters.lowrank import LowRank
from plait.deferred import Tensor, torch
from plait.spaces.base import Array, Frame, Space, in_memory


class Factors(Space):
    """PEFT 0.21's rule: with c = weight · scaling, A is weighted by sign(c) √|c| and B by √|c|, each on its unscaled factor.

    The product of the sums holds T(T − 1) cross terms BᵢAⱼ, and turning one adapter's factors (BG, G⁻¹A: the same delta)
    changes the result. It is here so that a merge made with PEFT can be made again, and compared.
    """

    name = "factors"
    about = "A and B separately, as PEFT does; inexact, for reproduction only"
    low_rank = True
    arrays = ("A", "B")

    def frame(self, factors: Sequence[LowRank], scalings: Sequence[float]) -> Frame:
        """Return the unscaled A (r, d_in) and B (d_out, r) as two stacks; absent adapters are zeros."""
        rank = max(f.rank for f in factors)
        full = [f if f.rank else f.padded(rank) for f in factors]
        a, b = torch.stack([f.a for f in full]), torch.stack([f.b for f in full])
        s = torch.tensor(scalings, dtype=torch.float64)

        def on_a(weights: Tensor) -> Tensor:
            c = weights.double() * s
            return c.sign() * c.abs().sqrt()

        def on_b(weights: Tensor) -> Tensor:
            return (weights.double() * s).abs().sqrt()

        arrays = (
            Array("A", (a.shape[1], a.shape[2]), in_memory(a), on_a),
            Array("B", (b.shape[1], b.shape[2]), in_memory(b), on_b),
        )
        return Frame(arrays, lambda merged: LowRank(merged[0].dense(), merged[1].dense()), a.dtype, a.nbytes + b.nbytes)

    def rank(self, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """Return the common rank."""
        return max(ranks)


FACTORS = Factors()
