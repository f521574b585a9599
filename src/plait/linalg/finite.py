"""Whether all entries of a tensor are finite, in one pass without a copy."""

from __future__ import annotations

from plait.deferred import Tensor, torch


def all_finite(x: Tensor) -> bool:
    """Return whether no entry is NaN or infinite: then their sum is finite too, unless it overflows (checked separately)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return bool(torch.isfinite(x.sum(dtype=wide))) or bool(torch.isfinite(x).all())
