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
from plait.mixture.pieces import Piece
from plait.mixture.places import Place


@dataclass(frozen=True, eq=False)
class Stack:
    """The pieces of T adapters at one target.

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
    def of(place: Place, pieces: Sequence[Piece | None]) -> Stack:
        """Stack one piece per adapter; None where an adapter lacks the target. Factors take the weight's dtype and device.

        Factors in the base's dtype lose nothing that shows: what they add is rounded to that dtype by every layer's output.

        Raises:
            AdapterError: DoRA or a bias where it has no form here.
        """
        if place.layout.kind in ("embedding", "experts") and any(p is not None and p.bias is not None for p in pieces):
            raise AdapterError(f"{place.path!r}: lora_bias on an embedding or a fused parameter is not covered.")
        pieces, gains = _resolve_dora(place, pieces)
        present = [p for p in pieces if p is not None]
        ranks = [p.rank if p is not None else 0 for p in pieces]
        a = torch.stack([torch.cat([p.slices[i].a for p in present]) for i in range(place.layout.stack)])
        bt = torch.stack([torch.cat([p.slices[i].b.mT for p in present]) for i in range(place.layout.stack)])
        biases = _rows([p.bias if p is not None else None for p in pieces], place)
        owners = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
        stack = Stack(a, bt, (0, *accumulate(ranks)), owners, gains, biases)
        return stack.to(*place.home) if place.home is not None else stack

    @property
    def rank(self) -> int:
        """R, the sum of the adapters' ranks."""
        return self.bounds[-1]

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


def _resolve_dora(place: Place, pieces: Sequence[Piece | None]) -> tuple[list[Piece | None], Tensor | None]:
    """Turn DoRA into LoRA and a gain: ΔW = diag(c − 1) W + diag(c) s B A with c = m / ‖W + s B A‖ (see `merging.dora`)."""
    if not any(p is not None and p.magnitude is not None for p in pieces):
        return list(pieces), None
    problem = place.dense_problem()
    if place.layout.stack > 1 or place.layout.kind == "experts":
        problem = f"{place.path!r}: DoRA on groups or fused parameters is not covered."
    if problem:
        raise AdapterError(f"DoRA needs the base's weights. {problem}")
    resolved: list[Piece | None] = []
    gains: list[Tensor | None] = []
    for piece in pieces:
        if piece is None or piece.magnitude is None:
            resolved.append(piece)
            gains.append(None)
            continue
        delta = piece.slices[0]
        (weight,) = place.matrices(place.weight.detach().to("cpu", delta.a.dtype))
        scale = piece.magnitude / row_norms(weight, delta)
        if not bool(torch.isfinite(scale).all()):
            raise AdapterError(f"{place.path!r}: a row of W + s B A is zero; DoRA cannot rescale it.")
        resolved.append(Piece((LowRank(delta.a, delta.b * scale.unsqueeze(1)),), piece.bias))
        gains.append(scale - 1)
    return resolved, _rows(gains, place)


def _rows(parts: Sequence[Tensor | None], place: Place) -> Tensor | None:
    """Stack vectors (d_out,) to (T, d_out), zero where there is none; None when there is none at all."""
    if all(p is None for p in parts):
        return None
    width = place.layout.stack * place.layout.d_out
    return torch.stack([torch.zeros(width) if p is None else p.float() for p in parts])
