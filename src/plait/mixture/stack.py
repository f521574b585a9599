"""All adapters' factors of one target, side by side, so that two small products serve any number of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from plait.adapters.lowrank import LowRank
from plait.errors import AdapterError
from plait.merging.dora import row_norms
from plait.mixture.deltas import AdapterDelta
from plait.mixture.modules import TargetModule


@dataclass(frozen=True, eq=False)
class Stack:
    """The deltas of T adapters at one target.

    ΔW = Σₖ λ[owner(k)] bₖ aₖ; where adapters are DoRA or have a bias, the output also gets (Σₜ λₜ gainₜ) ⊙ W x + Σₜ λₜ biasₜ.

    Attributes:
        a: (slices, R, d_in).
        bt: (slices, R, d_out); B transposed, so that the part of a range of adapters is contiguous.
        bounds: T + 1 offsets into R.
        owners: (R,) int64, the adapter of every rank.
        gains: (T, d_out), DoRA's row scaling minus 1; None without DoRA.
        biases: (T, d_out) of `lora_bias`; None without.
    """

    a: Tensor
    bt: Tensor
    bounds: tuple[int, ...]
    owners: Tensor
    gains: Tensor | None
    biases: Tensor | None

    @staticmethod
    def of(target: TargetModule, deltas: Sequence[AdapterDelta | None]) -> Stack:
        """Stack one delta per adapter; None where an adapter lacks the target. Factors take the weight's dtype and device.

        Factors in the base's dtype lose nothing that shows: what they add is rounded to that dtype by every layer's output.

        Raises:
            AdapterError: DoRA or a bias where it has no form here.
        """
        if not target.layout.takes_bias and any(d is not None and d.bias is not None for d in deltas):
            raise AdapterError(f"{target.path!r}: lora_bias on an embedding or a fused parameter is not covered.")
        deltas, gains = _resolve_dora(target, deltas)
        present = [d for d in deltas if d is not None]
        ranks = [d.rank if d is not None else 0 for d in deltas]
        a = torch.stack([torch.cat([d.slices[i].a for d in present]) for i in range(target.layout.stack)])
        bt = torch.stack([torch.cat([d.slices[i].b.mT for d in present]) for i in range(target.layout.stack)])
        biases = _rows([d.bias if d is not None else None for d in deltas], target)
        owners = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
        stack = Stack(a, bt, (0, *accumulate(ranks)), owners, gains, biases)
        return stack.to(*target.home) if target.home is not None else stack

    @property
    def rank(self) -> int:
        """R, the sum of the adapters' ranks."""
        return self.bounds[-1]

    def weighted(self, share: Tensor, *, per_rank: bool) -> tuple[LowRank, ...]:
        """Return Σ of the deltas with coefficients (T,), or one per rank, (R,) or longer; per matrix, on the processor."""
        factors = share[: self.rank] if per_rank else share[self.owners.cpu()]
        return tuple(
            LowRank(a, (bt * factors.to(bt.dtype).unsqueeze(1)).mT) for a, bt in zip(self.a.cpu(), self.bt.cpu(), strict=True)
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> Stack:
        """Return it on a device; only the factors take the dtype."""
        return Stack(
            self.a.to(device, dtype),
            self.bt.to(device, dtype),
            self.bounds,
            self.owners.to(device),
            None if self.gains is None else self.gains.to(device),
            None if self.biases is None else self.biases.to(device),
        )


def _resolve_dora(
    target: TargetModule, deltas: Sequence[AdapterDelta | None]
) -> tuple[list[AdapterDelta | None], Tensor | None]:
    """Turn DoRA into LoRA and a gain: ΔW = diag(c − 1) W + diag(c) s B A with c = m / ‖W + s B A‖ (see `merging.dora`)."""
    if not any(d is not None and d.magnitude is not None for d in deltas):
        return list(deltas), None
    problem = target.dense_problem()
    if not target.layout.takes_dora:
        problem = f"{target.path!r}: DoRA on groups or fused parameters is not covered."
    if problem:
        raise AdapterError(f"DoRA needs the base's weights. {problem}")
    resolved: list[AdapterDelta | None] = []
    gains: list[Tensor | None] = []
    for delta in deltas:
        if delta is None or delta.magnitude is None:
            resolved.append(delta)
            gains.append(None)
            continue
        factors = delta.slices[0]
        (weight,) = target.matrices(target.weight.detach().to("cpu", factors.a.dtype))
        scale = delta.magnitude / row_norms(weight, factors)
        if not bool(torch.isfinite(scale).all()):
            raise AdapterError(f"{target.path!r}: a row of W + s B A is zero; DoRA cannot rescale it.")
        resolved.append(AdapterDelta((LowRank(factors.a, factors.b * scale.unsqueeze(1)),), delta.bias))
        gains.append(scale - 1)
    return resolved, _rows(gains, target)


def _rows(parts: Sequence[Tensor | None], target: TargetModule) -> Tensor | None:
    """Stack vectors (d_out,) to (T, d_out), zero where there is none; None when there is none at all."""
    if all(p is None for p in parts):
        return None
    width = target.layout.outputs
    return torch.stack([torch.zeros(width) if p is None else p.float() for p in parts])
